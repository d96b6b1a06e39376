"""Quantized layers, what they keep of the originals, and what guards them."""
