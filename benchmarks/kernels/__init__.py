"""Benchmarks of formats and kernels."""
