"""Nothing of the size of the decoded weight is ever allocated, by torch or by the C++ code."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dialect_kernels import SEMANTIC_32, cpu, dialect_linear, quantize, semantic_linear

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"no CPU kernel: {cpu.why_not()}")

ROWS, COLUMNS, TOKENS = 768, 1024, 4
SMALLEST_COPY = ROWS * COLUMNS  # bytes: the weight as int8 or FP8

FORMATS = ["dialect", "fp8", "none"]


def largest_allocation(call: Callable[[], object]) -> int:
    """The most bytes that one allocation of torch took, inside ops too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    sizes = [
        event.nbytes() for event in recorded.profiler.kineto_results.events() if event.nbytes() > 0
    ]
    assert sizes, "the profiler saw no allocation, not even the output's"
    return max(sizes)


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    x = torch.randn(TOKENS, COLUMNS, generator=generator).to(torch.bfloat16)
    return x, quantize(weight, SEMANTIC_32)


@pytest.mark.parametrize("activation_format", FORMATS)
def test_torch_allocates_no_decoded_weight(activation_format, layer):
    largest = largest_allocation(lambda: dialect_linear(*layer, None, activation_format))
    assert TOKENS * ROWS <= largest < SMALLEST_COPY // 8


def test_torch_allocates_no_decoded_weight_for_salient_tokens(layer):
    salient, group = torch.tensor([0, 2]), torch.tensor([0, 0, 1, -1])
    largest = largest_allocation(lambda: semantic_linear(*layer, None, salient, group))
    assert TOKENS * ROWS <= largest < SMALLEST_COPY // 8


def test_the_trace_would_see_one(layer, monkeypatch):
    """Without the kernel torch decodes the weight in every call."""
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert largest_allocation(lambda: dialect_linear(*layer)) >= 4 * SMALLEST_COPY


PEAK = """
import sys
from pathlib import Path
import torch
from dialect_kernels import DIALECT_FP4, PackedTensor
from dialect_kernels.cpu import calls

def memory(field):  # KiB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

def growth(call):
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before

rows = columns = 4096
def weight(rows, columns):
    codes = torch.ones(rows, columns // 2, dtype=torch.uint8)
    meta = torch.ones(rows, columns // 32, dtype=torch.uint8)
    row_exponent = torch.zeros(rows, dtype=torch.int8)
    return PackedTensor(codes, meta, row_exponent, (rows, columns), DIALECT_FP4, 32)

p = weight(rows, columns)
x, salient = torch.ones(8, columns), torch.arange(8)
small = torch.ones(8, 64)
few = weight(8, 64)
for instructions in sys.argv[1:]:
    options = {"threads": 2, "instructions": instructions}
    for name in ("dialect", "fp8", "none"):  # threads, and whatever else the first call makes
        calls.linear(small, few, None, name, **options)
    for name in ("dialect", "fp8", "none"):
        print(instructions, name, growth(lambda: calls.linear(x, p, None, name, **options)))
    decomposed = growth(lambda: calls.decomposed_linear(x, p, None, salient, **options))
    print(instructions, "salient", decomposed)
print("any", "decoded", growth(lambda: calls.dequantize(p)))  # last: its memory may be kept
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_the_kernel_keeps_no_decoded_weight():
    """Resident memory of a process with a weight of 16 MiB in FP8; its growth is in KiB."""
    instructions = cpu.INSTRUCTIONS[: cpu.INSTRUCTIONS.index(cpu.features()) + 1]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *instructions],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    growth = {(by, name): int(kib) for by, name, kib in map(str.split, done.stdout.splitlines())}
    assert growth.pop(("any", "decoded")) > 60 << 10  # the measurement sees float32 [4096, 4096]
    assert set(growth) == set(product(instructions, (*FORMATS, "salient")))
    assert all(kib < 2 << 10 for kib in growth.values()), growth
