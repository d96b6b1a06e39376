"""The language demonstration."""
