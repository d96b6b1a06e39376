"""Format `none` on CPU: integers where they give the bits of float64, float64 where they do not."""

from itertools import product

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, PackedTensor, cpu, reference
from dialect_kernels.cpu import calls

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=f"no CPU kernel: {cpu.why_not()}"),
    pytest.mark.usefixtures("poisoned_outputs"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INSTRUCTIONS = (
    cpu.INSTRUCTIONS[: cpu.INSTRUCTIONS.index(cpu.features()) + 1] if cpu.available() else ()
)
COLUMNS = 2560  # so many blocks that some of them may be exceptions, whatever their size

by_block_size = pytest.mark.parametrize("block_size", [16, 32, 64])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weight(rows: int, block_size: int, scale: float = 0.05, book=DIALECT_FP4) -> PackedTensor:
    return reference.quantize(random(rows, COLUMNS, seed=rows) * scale, book, block_size)


def check(x: torch.Tensor, p: PackedTensor, bias: torch.Tensor | None = None) -> None:
    """Every instruction set gives the reference's bits, for a batch, its parts and one by one."""
    want = reference.dialect_linear(x, p, bias, "none")
    whole = slice(None)
    for instructions, part in product(INSTRUCTIONS, [whole, *map(slice, range(len(x)), (1, 3))]):
        y = calls.linear(x[part], p, bias, "none", threads=2, instructions=instructions)
        assert torch.equal(y.isnan(), want[part].isnan()), (instructions, part)
        assert torch.equal(y.nan_to_num(0.5), want[part].nan_to_num(0.5)), (instructions, part)


def exceptional(dtype: torch.dtype, count: int) -> torch.Tensor:
    """Seven tokens of small integers; token t has t * count / 6 elements that no digits hold."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randint(-64, 65, (7, COLUMNS), generator=generator).to(torch.float32)
    for t in range(7):
        where = torch.randperm(COLUMNS, generator=generator)[: t * count // 6]
        x[t, where] = 2.0**-14 * (1 + 2.0**-9)
    return x.to(dtype)


@by_dtype
@by_block_size
@pytest.mark.parametrize("count", [0, 6, 40, 400])
def test_blocks_that_do_not_fit(count, block_size, dtype):
    """None, single ones in the order of the blocks, and more than a token may have."""
    x = exceptional(dtype, count)
    check(x, weight(19, block_size))
    check(x, weight(16, block_size, book=SEMANTIC_32), random(1, 16, seed=1)[0])


@by_block_size
def test_exceptions_are_added_in_their_place(block_size):
    """Sums that cancel: what an exception adds is lost or kept, depending on when it is added."""
    x = torch.ones(4, COLUMNS)
    x[:, : COLUMNS // 2] = 4096
    x[:, COLUMNS // 2 :] = -4096
    x[1, 0] = x[2, COLUMNS // 2 - 1] = x[3, -1] = 4096 * (1 + 2.0**-23)
    check(x, weight(24, block_size))


@by_dtype
@by_block_size
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_activations_like_real_ones(spread, block_size, dtype):
    channels = torch.exp(spread * random(1, COLUMNS, seed=2)[0])
    check(
        (random(5, COLUMNS, seed=3) * channels).clamp(-6e4, 6e4).to(dtype), weight(35, block_size)
    )


@by_block_size
@pytest.mark.parametrize("magnitude", [2.0 - 2.0**-7, 2.0 - 2.0**-22, 1.0, 2.0 - 2.0**-15])
def test_the_largest_digits(magnitude, block_size):
    """All products of one sign, every element at the top of its block."""
    w = torch.full((16, COLUMNS), 15.0)
    w[8:] = -15.0
    check(torch.full((3, COLUMNS), magnitude), reference.quantize(w, DIALECT_FP4, block_size))
    check(torch.full((3, COLUMNS), -magnitude), reference.quantize(w, DIALECT_FP4, block_size))


@by_dtype
@pytest.mark.parametrize("scale", [2.0**-120, 2.0**-45, 2.0**-30, 2.0**35, 2.0**50, 2.0**110])
def test_small_and_large_weights(scale, dtype):
    p = weight(20, 32, scale)
    for factor in (1, 2.0**-20, 2.0**10):
        check((random(3, COLUMNS, seed=4) * factor).to(dtype), p)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_small_and_large_activations(dtype):
    """Beside ordinary ones: in the same block, in another block, in another token."""
    for value in (
        2.0**-149,
        2.0**-126,
        2.0**-51,
        2.0**-50,
        2.0**50,
        1.99 * 2.0**50,
        2.0**51,
        2.0**120,
    ):
        x = random(4, COLUMNS, seed=5)
        x[0, 0] = x[1, -1] = value
        x[2] = value
        check(x.to(dtype), weight(17, 32))


@by_block_size
def test_not_finite(block_size):
    x = random(5, COLUMNS, seed=6).to(torch.bfloat16)
    x[1, 3], x[2, -1], x[4, 0] = torch.nan, torch.inf, -torch.inf
    p = weight(21, block_size)
    p.row_exponent[4] = -128
    check(x, p)


def test_zero_tokens_and_zero_blocks():
    x = random(4, COLUMNS, seed=7).to(torch.bfloat16)
    x[0] = 0
    x[1] = -0.0
    x[2, 64:1024] = 0
    check(x, weight(18, 32))


@by_block_size
def test_any_byte_is_safe(block_size):
    generator = torch.Generator().manual_seed(8)

    def bytes_(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    for low, high in ((-128, 128), (-25, 41)):
        row_exponent = torch.randint(low, high, (33,), generator=generator).to(torch.int8)
        stored = (bytes_(33, COLUMNS // 2), bytes_(33, COLUMNS // block_size), row_exponent)
        p = PackedTensor(*stored, (33, COLUMNS), SEMANTIC_32, block_size)
        check(random(3, COLUMNS, seed=9).to(torch.bfloat16), p)


def test_many_tokens_of_both_kinds():
    """More than a tile of each, in turns."""
    x = random(230, 320, seed=10).to(torch.bfloat16).to(torch.float32)
    x[::3] = random(77, 320, seed=11)
    p = reference.quantize(random(40, 320, seed=12) * 0.05)
    want = reference.dialect_linear(x, p, None, "none")
    for instructions, threads in product(INSTRUCTIONS, (1, 2, 3)):
        options = {"instructions": instructions, "threads": threads}
        assert torch.equal(calls.linear(x, p, None, "none", **options), want)
