"""The library's FP8 GEMM as the GPU path calls it: accepted for CUDA tensors, and right.

Fake CUDA tensors go through the library's checks (multiples of 16, layouts, dtypes) without a GPU.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dialect_kernels.gpu.library import _scaled_product

FP8 = torch.float8_e4m3fn


def fake(mode, dtype, *shape):
    """A tensor on a CUDA device that is not there."""
    return FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cuda:0"))


def fake_product(tokens, features, columns, bias):
    with FakeTensorMode() as mode:
        return _scaled_product(
            fake(mode, FP8, tokens, columns),
            fake(mode, torch.float32, tokens),
            fake(mode, FP8, features, columns),
            fake(mode, torch.float32, features),
            fake(mode, torch.bfloat16, features) if bias else None,
        )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [16, 48, 4096])
@pytest.mark.parametrize("tokens", [1, 257, 1025])
def test_the_library_takes_what_decoding_gives(tokens, columns, bias):
    for features in (32, 4096):
        y = fake_product(tokens, features, columns, bias)
        assert y.shape == (tokens, features)
        assert y.dtype == torch.bfloat16
        assert y.device.type == "cuda"


def test_fake_tensors_are_checked():
    for shape in ((3, 32, 40), (3, 24, 32)):
        with pytest.raises(RuntimeError, match="divisible by 16"):
            fake_product(*shape, False)


@pytest.mark.parametrize("bias", [False, True])
def test_scales_and_bias(bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (3, 48), generator=generator).to(FP8)
    weight = torch.randint(-8, 9, (32, 48), generator=generator).to(FP8)
    scale = torch.exp2(torch.arange(3.0))
    weight_scale = torch.exp2(-torch.arange(32.0) % 5)
    added = torch.ones(32, dtype=torch.bfloat16) if bias else None
    want = (x.double() * scale[:, None]) @ (weight.double() * weight_scale[:, None]).T
    want = (want + (1 if bias else 0)).to(torch.bfloat16)
    assert torch.equal(_scaled_product(x, scale, weight, weight_scale, added), want)
