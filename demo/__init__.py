"""The shipped model and the demonstration that runs on it."""
