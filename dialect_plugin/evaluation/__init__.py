"""How much a quantized model loses against its 16-bit original, on text."""
