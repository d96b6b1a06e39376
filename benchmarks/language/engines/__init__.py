"""Engines that :mod:`benchmarks.language.bench_peers` compares, each in a process of its own."""
