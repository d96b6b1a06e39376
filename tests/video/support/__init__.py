"""Tiny transformers, pipelines and references for the tests of the video hook."""
