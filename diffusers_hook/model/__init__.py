"""A transformer as a whole: choose its layers, swap them, save, load and describe it."""
