"""Benchmarks of serving and converting language models."""
