"""Moving shapes: a small trained video model, and what `make video` does with it."""
