"""The model that ships: its text and its training."""
