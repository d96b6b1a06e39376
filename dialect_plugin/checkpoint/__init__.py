"""Checkpoints on disk: read, choose layers, convert, inspect, export."""
