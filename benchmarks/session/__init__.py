"""A session on a machine with an NVIDIA GPU that can be had for minutes only."""
