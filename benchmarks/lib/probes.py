"""Properties of a GPU's arithmetic that its manuals do not state, each measured on the device.

python -m benchmarks.lib.probes      # prints them as JSON
"""

# Kernel arguments are Triton's: pointers and tensors have no Python types.
from __future__ import annotations

import json

import torch
import triton
import triton.language as tl

_LARGEST = 2.0**14
"""The first product of a sum; E4M3 operands reach from here down to 2**-18."""


@triton.jit
def one_step_kernel(p_w, p_x, p_y, FIRST: tl.constexpr):
    """w [64, 32] times x [16, 32], both E4M3, on one MMA of K = 32; float32 [64, 16].

    FIRST: the accumulator starts from y, not from zero.
    """
    o_row, o_token, o_column = tl.arange(0, 64), tl.arange(0, 16), tl.arange(0, 32)
    w = tl.load(p_w + o_row[:, None] * 32 + o_column[None, :])
    x = tl.load(p_x + o_token[:, None] * 32 + o_column[None, :])
    p_tile = p_y + o_row[:, None] * 16 + o_token[None, :]
    total = tl.load(p_tile) if FIRST else tl.zeros((64, 16), tl.float32)
    tl.store(p_tile, tl.dot(w, tl.trans(x), total))


def fp8_accumulator_bits(device: torch.device | str = "cuda") -> dict[str, int]:
    """Fraction bits that FP8 tensor cores keep of a sum, relative to its largest term.

    A product of 2**14 and one of 2**(14 - n) are added; n is the largest for which the small one
    survives, inside one MMA (``within``) and added to an accumulator that holds the large one
    (``across``). The mode ``exact`` on FP8 needs 13 within: block sums are integers below 2**13.
    """
    return {"within": _survives(device, across=False), "across": _survives(device, across=True)}


def _survives(device: torch.device | str, across: bool) -> int:
    kept = 0
    for bits in range(1, 33):
        small = _LARGEST * 2.0**-bits
        w, x = torch.zeros(64, 32), torch.zeros(16, 32)
        half = bits // 2
        left, right = 2.0 ** (7 - half), 2.0 ** (7 - (bits - half))
        assert left * right == small
        w[:, 1], x[:, 1] = left, right
        y = torch.zeros(64, 16, device=device)
        if across:
            y.fill_(_LARGEST)
        else:
            w[:, 0], x[:, 0] = 2.0**7, 2.0**7
        fp8 = torch.float8_e4m3fn
        one_step_kernel[(1,)](w.to(device, fp8), x.to(device, fp8), y, FIRST=across)
        if (y.double().cpu() == _LARGEST + small).all():
            kept = bits
    return kept


def main() -> None:
    """Measure and print."""
    name = torch.cuda.get_device_name()
    print(json.dumps({"gpu": name, "fp8_accumulator_bits": fp8_accumulator_bits()}, indent=1))


if __name__ == "__main__":
    main()
