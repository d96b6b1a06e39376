"""Benchmarks of the video hook."""
