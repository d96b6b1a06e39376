"""Relative MSE on synthetic data: the figures that section 4 of the format's design printed."""

import numpy as np
import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, quantize
from dialect_kernels.baselines import quantize_mxfp4, quantize_nvfp4

ROUND = {
    "MXFP4-32": quantize_mxfp4,
    "NVFP4-16": quantize_nvfp4,
    "DialectFP4 two_stage": lambda x: quantize(x, DIALECT_FP4, 32, "two_stage").dequantize(),
    "DialectFP4 mse": lambda x: quantize(x, DIALECT_FP4, 32, "mse").dequantize(),
    "32-book lut": lambda x: quantize(x, SEMANTIC_32, 32, "lut").dequantize(),
    "32-book mse": lambda x: quantize(x, SEMANTIC_32, 32, "mse").dequantize(),
}
PRINTED = {  # Gaussian, Laplace, Student-t4
    "MXFP4-32": (0.0132, 0.0161, 0.0173),
    "NVFP4-16": (0.0091, 0.0086, 0.0084),
    "DialectFP4 two_stage": (0.0097, 0.0109, 0.0114),
    "DialectFP4 mse": (0.0086, 0.0101, 0.0107),
    "32-book lut": (0.0075, 0.0092, 0.0101),
    "32-book mse": (0.0070, 0.0088, 0.0097),
}
DRAW = (
    lambda rng, shape: rng.standard_normal(shape),
    lambda rng, shape: rng.laplace(size=shape),
    lambda rng, shape: rng.standard_t(4, shape),
)


@pytest.mark.parametrize("name", PRINTED)
def test_relative_mse(name):
    for draw, printed in zip(DRAW, PRINTED[name], strict=True):
        x = torch.from_numpy(draw(np.random.default_rng(0), (256, 4096)).astype(np.float32))
        error = (x.double() - ROUND[name](x).double()).square().sum()
        measured = float(error / x.double().square().sum())
        # half a unit of the printed figure, and the spread of a million draws
        assert abs(measured - printed) <= 0.00005 + 0.015 * printed
