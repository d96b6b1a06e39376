"""The CPU kernel gives the bytes of the reference: any shape, batch, thread count, processor."""

import os
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path

import pytest
import torch

from dialect_kernels import DIALECT_FP4, SEMANTIC_32, PackedTensor, cpu, reference
from dialect_kernels.cpu import calls

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=f"no CPU kernel: {cpu.why_not()}"),
    pytest.mark.usefixtures("poisoned_outputs"),
]

BOOKS = [DIALECT_FP4, SEMANTIC_32]
BLOCK_SIZES = [16, 32, 64]
FORMATS = ["dialect", "fp8", "none"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = [0, 1, 2, 3, 8, 15, 16, 17, 31, 33, 64, 65]
ROWS = [1, 7, 8, 9, 33]
COLUMNS = [0, 1, 31, 32, 33, 95, 128]
INSTRUCTIONS = (
    cpu.INSTRUCTIONS[: cpu.INSTRUCTIONS.index(cpu.features()) + 1] if cpu.available() else ()
)

by_book = pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
by_block_size = pytest.mark.parametrize("block_size", BLOCK_SIZES)
by_format = pytest.mark.parametrize("activation_format", FORMATS)


def random(rows: int, columns: int, seed: int, spread: float = 1.5) -> torch.Tensor:
    """Gaussian with log-normal channels: several deltas and many dialects in every row."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.exp(spread * torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) * channels


def assert_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same bits, except that any NaN is as good as another."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    number = torch.int32 if want.dtype == torch.float32 else torch.int16
    zeroed = [torch.where(y.isnan(), 0.0, y).view(number) for y in (got, want)]
    assert torch.equal(*zeroed)


def any_bytes(rows: int, columns: int, book, block_size: int, seed: int) -> PackedTensor:
    """A weight whose bytes are random: reserved deltas, code 8, any row exponent."""
    generator = torch.Generator().manual_seed(seed)

    def bytes_(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    blocks = -(-columns // block_size)
    row_exponent = bytes_(rows).view(torch.int8)
    row_exponent[-1] = -128
    row_exponent[: rows // 2].clamp_(-8, 8)
    return PackedTensor(
        bytes_(rows, blocks * block_size // 2),
        bytes_(rows, blocks),
        row_exponent,
        (rows, columns),
        book,
        block_size,
    )


@by_format
@by_block_size
@by_book
def test_linear_is_the_reference_at_every_edge(book, block_size, activation_format):
    """The reference computes 65 tokens once; every smaller batch is compared with its first."""
    for i, (rows, columns, dtype) in enumerate(product(ROWS, COLUMNS, DTYPES)):
        p = reference.quantize(random(rows, columns, seed=i), book, block_size)
        x = random(max(TOKENS), columns, seed=1000 + i).to(dtype)
        bias = random(1, rows, seed=2000 + i)[0].to(dtype) if i % 2 else None
        want = reference.dialect_linear(x, p, bias, activation_format)
        for tokens, instructions in product(TOKENS, INSTRUCTIONS):
            got = calls.linear(x[:tokens], p, bias, activation_format, instructions=instructions)
            assert_bits(got, want[:tokens])


@by_format
@by_book
def test_one_by_one_and_with_any_number_of_threads(book, activation_format):
    """More tokens than one tile, more groups than one task."""
    p = reference.quantize(random(150, 320, seed=1), book)
    x = random(200, 320, seed=2).to(torch.bfloat16)
    batched = calls.linear(x, p, None, activation_format, threads=1)
    one_by_one = torch.cat([calls.linear(row[None], p, None, activation_format) for row in x])
    assert_bits(one_by_one, batched)
    for threads, instructions in product([1, 2, 3, 4], INSTRUCTIONS):
        options = {"threads": threads, "instructions": instructions}
        assert_bits(calls.linear(x, p, None, activation_format, **options), batched)
    assert_bits(batched[:3], reference.dialect_linear(x[:3], p, None, activation_format))


def test_a_hundred_runs_are_identical():
    p = reference.quantize(random(64, 256, seed=1))
    x = random(5, 256, seed=2)
    first = calls.linear(x, p, None, "dialect", threads=4)
    for _ in range(100):
        assert_bits(calls.linear(x, p, None, "dialect", threads=4), first)


@by_format
@by_block_size
@by_book
def test_a_token_that_is_not_finite_is_nan_and_alone(book, block_size, activation_format):
    p = reference.quantize(random(20, 128, seed=3), book, block_size)
    x = random(5, 128, seed=4)
    x[1, 5], x[3, 127], x[4, 0] = torch.nan, torch.inf, -torch.inf
    for dtype, instructions in product(DTYPES, INSTRUCTIONS):
        tokens = x.to(dtype)
        got = calls.linear(tokens, p, None, activation_format, instructions=instructions)
        assert_bits(got, reference.dialect_linear(tokens, p, None, activation_format))
        if activation_format != "none":
            assert got[[1, 3, 4]].isnan().all()
        assert got[[0, 2]].isfinite().all()


@by_format
@by_block_size
@by_book
def test_any_byte_is_safe_and_means_what_the_reference_says(book, block_size, activation_format):
    p = any_bytes(33, 256, book, block_size, seed=5)
    x = random(4, 256, seed=6)
    want = reference.dialect_linear(x, p, None, activation_format)
    assert want[:, -1].isnan().all()
    for instructions in INSTRUCTIONS:
        assert_bits(calls.linear(x, p, None, activation_format, instructions=instructions), want)
    assert_bits(calls.dequantize(p), p.dequantize(torch.float32))


@by_format
@pytest.mark.parametrize("exponent", [-149, -140, -126, -100, 100, 126])
def test_tiny_and_huge_activations(exponent, activation_format):
    """Subnormals, scales that underflow to zero, sums that overflow; and mixtures of all."""
    p = reference.quantize(random(16, 64, seed=7))
    x = random(3, 64, seed=8, spread=0.5).double() * 2.0**exponent
    x = x.clamp(-3e38, 3e38).to(torch.float32)
    x[1, ::2] = random(1, 32, seed=9)[0]
    x[2, :5] = 0
    want = reference.dialect_linear(x, p, None, activation_format)
    for instructions in INSTRUCTIONS:
        assert_bits(calls.linear(x, p, None, activation_format, instructions=instructions), want)


@by_format
def test_outputs_are_rounded_once_to_nearest_even(activation_format):
    """Biases between two 16-bit numbers, subnormal and overflowing halves among them."""
    p = reference.quantize(torch.zeros(64, 32))
    generator = torch.Generator().manual_seed(10)
    bits = torch.randint(-(2**31), 2**31 - 1, (200, 64), generator=generator).to(torch.int32)
    bits[:, :24] = (bits[:, :24] & 0x3FFF) | 0x33800000 + (bits[:, :24] & 0x0F800000)
    bits[:, 24:32] = bits[:, 24:32] & -0x2000 | 0x1000  # halfway between two halves
    bits[:, 32:40] = bits[:, 32:40] & -0x10000 | 0x8000  # halfway between two bfloat16
    for bias in bits.view(torch.float32):
        for dtype in DTYPES:
            got = calls.linear(torch.zeros(1, 32, dtype=dtype), p, bias, activation_format)
            assert_bits(got[0], bias.to(dtype))


def test_half_precision_inputs_are_read_exactly():
    """All 65536 bit patterns of both 16-bit types against a weight that selects them."""
    one = reference.quantize(torch.eye(32)[:8])
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 32)
        x = torch.where(x.isfinite(), x, 0)
        assert_bits(calls.linear(x, one, None, "none"), x[:, :8] + 0.0)


def adversarial(rule: str) -> dict[str, torch.Tensor]:
    """Matrices of 256 columns on which a quantizer that is nearly right goes wrong."""
    generator = torch.Generator().manual_seed(11)
    integers = torch.randint(-31, 32, (24, 256), generator=generator)
    wide = random(24, 256, 12) * 2.0 ** torch.randint(-30, 9, (24, 256), generator=generator)
    midpoints = integers / 4 * 2.0 ** (torch.arange(24) - 12)[:, None]
    ulps = torch.randint(-1, 2, (24, 256), generator=generator, dtype=torch.int32)
    sparse = torch.where(torch.rand(24, 256, generator=generator) < 0.02, wide, 0)
    zero_blocks = random(24, 256, 13)
    zero_blocks[::2, 64:128] = 0
    negative_zero = torch.full((2, 256), -0.0)
    negative_zero[1, 200] = -3.0
    return {
        "gaussian": random(24, 256, 14),
        "wide": wide,
        "midpoints": midpoints,
        "one ulp beside midpoints": (midpoints.view(torch.int32) + ulps).view(torch.float32),
        "small integers": integers.float() % 5,
        "equal magnitudes": integers.sign() * 7.0,
        "largest magnitudes": torch.where(integers < 0, -1.0, 1.0) * (8 - 2.0**-21),
        "largest in bfloat16": torch.where(integers < 0, -1.0, 1.0) * (8 - 2.0**-5),
        "subnormals": random(24, 256, 15) * 2.0**-140,
        "around the lowest exponent": random(24, 256, 16) * 2.0**-119,
        "around the highest exponent": random(24, 256, 17, 0.1).clamp(-3.9, 3.9) * 2.0**126,
        "sparse": sparse,
        "zero blocks": zero_blocks,
        "negative zeros": negative_zero,
    }


RULES = [(book, rule) for book in BOOKS for rule in book.rules]


@by_block_size
@pytest.mark.parametrize(("book", "rule"), RULES, ids=lambda value: getattr(value, "name", value))
def test_quantizer_gives_the_bytes_of_the_reference(book, rule, block_size):
    for name, data in adversarial(rule).items():
        for dtype, window in product(DTYPES, (book.largest_stored_delta, 2, 0)):
            x = data.to(dtype)
            x = torch.where(x.isfinite(), x, 0)[:, : 256 - window]  # columns of padding as well
            want = reference.quantize(x, book, block_size, rule, window)
            below = reference.blocks_below_window(x, block_size, window)
            for instructions in INSTRUCTIONS:
                got, counted = calls.quantize(
                    x, book, block_size, rule, window, instructions=instructions
                )
                case = f"{name}, {dtype}, window {window}, {instructions}"
                assert torch.equal(got.row_exponent, want.row_exponent), case
                assert torch.equal(got.meta, want.meta), case
                assert torch.equal(got.codes, want.codes), case
                assert torch.equal(counted, below), case


@by_book
def test_quantizer_with_any_number_of_threads_and_empty_matrices(book):
    x = random(37, 128, seed=18)
    first, counted = calls.quantize(x, book, 32, "mse", 7, threads=1)
    for threads in (2, 3, 4):
        again, count = calls.quantize(x, book, 32, "mse", 7, threads=threads)
        assert all(map(torch.equal, again.tensors, first.tensors))
        assert torch.equal(count, counted)
    for shape in ((0, 64), (3, 0)):
        empty = torch.zeros(shape)
        got = cpu.quantize(empty, book, 32, "mse", 7, "none")
        want = reference.quantize(empty, book)
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.row_exponent, want.row_exponent)


def test_quantizer_survives_what_its_callers_refuse():
    """NaN and Inf must not be used as an index; the row is marked and holds nothing."""
    x = random(4, 64, seed=19)
    x[1, 3], x[2, 0], x[2, 1] = torch.nan, torch.inf, -torch.inf
    got = cpu.quantize(x, DIALECT_FP4, 32, "mse", 13, "none")
    assert (got.row_exponent == -128).tolist() == [False, True, True, False]
    assert not got.codes[1:3].any()
    assert not got.meta[1:3].any()


def test_several_python_threads_at_once():
    p = reference.quantize(random(64, 256, seed=20))
    xs = [random(6, 256, seed=21 + i) for i in range(4)]
    want = [calls.linear(x, p, None, "dialect") for x in xs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(calls.linear(xs[i], p, None, "dialect", threads=3), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_process_gets_threads_of_its_own():
    p = reference.quantize(random(64, 256, seed=30))
    x = random(6, 256, seed=31)
    want = calls.linear(x, p, None, "dialect", threads=2)
    child = os.fork()
    if child == 0:
        same = torch.equal(calls.linear(x, p, None, "dialect", threads=2), want)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


CALL_AND_LOOK = """
before = set(os.listdir("/proc/self/task"))
calls.quantize(torch.ones(256, 64), DIALECT_FP4, 32, "mse", 13, threads=2)
started = set(os.listdir("/proc/self/task")) - before
name_of = lambda task: open(f"/proc/self/task/{task}/comm").read().strip()
(helper,) = [task for task in started if name_of(task) == "dialect-helper"]
print(*sorted(os.sched_getaffinity(0)), "|", *sorted(os.sched_getaffinity(int(helper))))
"""
PINNED_LATE = f"""
import os, threading
import torch
from dialect_kernels import DIALECT_FP4
from dialect_kernels.cpu import calls
end = threading.Event()
threading.Thread(target=end.wait, daemon=True).start()  # keeps both CPUs
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
{CALL_AND_LOOK}
end.set()
"""
PINNED_EARLY = f"""
import os
import torch
from dialect_kernels import DIALECT_FP4
from dialect_kernels.cpu import calls
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})  # the only thread there is
{CALL_AND_LOOK}
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("script", [PINNED_LATE, PINNED_EARLY], ids=["late", "early"])
def test_helpers_do_not_inherit_the_pin_of_the_calling_thread(script):
    """What an engine or OpenMP does to the thread that calls us: OpenMP's inherit it."""
    taken = os.sched_getaffinity(0)
    caller, _, helper = run(script, {"OMP_NUM_THREADS": "1"}).stdout.partition("|")
    assert set(map(int, caller.split())) == {min(taken)}
    assert set(map(int, helper.split())) >= taken - {min(taken)}
    assert min(taken) not in set(map(int, helper.split()))


AFTER_TORCH = """
import os, torch
from dialect_kernels import DIALECT_FP4, cpu
torch.set_num_threads(2)
torch.randn(1 << 22).exp_()
before = set(os.listdir("/proc/self/task"))
cpu.quantize(torch.ones(256, 64), DIALECT_FP4, 32, "mse", 13, "none")
print(cpu.describe(), len(set(os.listdir("/proc/self/task")) - before))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_torchs_threads_do_the_work_where_they_are_free_to():
    described, _, started = run(AFTER_TORCH, {}).stdout.strip().rpartition(" ")
    assert described.endswith("2 threads (PyTorch's OpenMP) on 2 CPUs")
    assert started == "0", "nobody has to share a CPU with them"


def test_bad_arguments_are_refused():
    p = reference.quantize(random(8, 64, seed=32))
    x = random(2, 64, seed=33)
    with pytest.raises(ValueError, match=r"x: has shape \[2, 63\]"):
        calls.linear(x[:, :63], p, None, "dialect")
    with pytest.raises(ValueError, match=r"bias: has shape \[7\]"):
        calls.linear(x, p, torch.zeros(7), "dialect")
    with pytest.raises(ValueError, match="weight: is on meta; it must be on cpu"):
        calls.linear(x, p.to("meta"), None, "dialect")
    with pytest.raises(ValueError, match="instructions: 'sse'"):
        calls.linear(x, p, None, "dialect", instructions="sse")
    with pytest.raises(ValueError, match="rule 'lut'"):
        cpu.quantize(x, DIALECT_FP4, 32, "lut", 13, "none")
    for block_size in (8, 128):
        with pytest.raises(ValueError, match=f"block_size: {block_size}; allowed are 16, 32 and"):
            cpu.quantize(x, DIALECT_FP4, block_size, "mse", 13, "none")
    with pytest.raises(ValueError, match=r"x: torch.float64 on cpu"):
        cpu.quantize(x.double(), DIALECT_FP4, 32, "mse", 13, "none")
    with pytest.raises(ValueError, match=r"bias: has shape \[8\] on meta"):
        calls.linear(x, p, torch.zeros(8, device="meta"), "dialect")


def test_strided_inputs():
    p = reference.quantize(random(9, 64, seed=34))
    x = random(64, 6, seed=35).t()
    want = calls.linear(x.contiguous(), p, None, "dialect")
    assert_bits(calls.linear(x, p, None, "dialect"), want)
    got = cpu.quantize(x, DIALECT_FP4, 32, "mse", 13, "none")
    assert torch.equal(got.codes, reference.quantize(x).codes)


def run(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    return done
