"""Calibrated conversion: what text does to the inputs of a model's layers, block by block."""
