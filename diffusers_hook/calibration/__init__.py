"""Weights that are rounded so that the outputs of their layers change little (rule ``gptq``)."""
