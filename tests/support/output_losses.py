"""The error of a product's outputs, and the estimated loss, by their definitions in float64."""

from dialect_kernels.baselines import quantize_fp8
from dialect_kernels.reference import round_activation


def lost_outputs(exact, packed, x, gradient, activations):
    """(squared error of the outputs, estimated loss in nats), summed over rows and tokens.

    Args:
        exact: the weight before it was rounded, rotated if it is, [N, K].
        packed: the rounded one.
        x: its input, rotated, float32 [T, K].
        gradient: at its output, [T, N].
        activations: "none", "fp8" or "dialect".
    """
    tokens = _rounded(x, activations, packed).double()
    x, exact, gradient = x.double(), exact.double(), gradient.double()
    values = packed.dequantize().double()
    noise = (tokens @ values.T - x @ exact.T).square().sum()
    nats = (gradient.square() * (x @ (values - exact).T).square()).sum()
    nats += ((gradient @ exact).square() * (tokens - x).square()).sum()
    return float(noise), float(nats) / 2


def _rounded(x, activations, packed):
    if activations == "none":
        return x
    if activations == "fp8":
        codes, scale = quantize_fp8(x)
        return codes.float() * scale[:, None]
    return round_activation(x, packed.book, packed.block_size)
