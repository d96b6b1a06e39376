"""Where a server and its emulation part on a real model, in float32 and in bfloat16.

Server and emulation of the demonstration add in other orders. In W4A4 such a difference, however
small, may move an activation over the edge between two 4-bit codes; from that token on the layers
above amplify it. In float32 the edge is met so rarely that each window has a part before it, in
which the two must agree as closely as in W4A16. *Calibrated* weights are rotated, too.

    python -m benchmarks.language.bench_agreement
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..lib.gate import golden_gate
from ..lib.harness import ROOT, Table, main

PACKAGES = ("torch", "vllm")
MODEL = "smollm2"
TOKENS = 2_048
CONTEXT = 512
AGREED = 1e-3
"""Nats: sums in another order move a log-probability by less, a code that differs by more."""


def measure() -> dict[str, Any]:
    """Per format and dtype: two perplexities, the paired difference, and where the two part."""
    # here, because rendering the tables needs none of it
    from transformers import AutoTokenizer

    from demo.language.perplexity import windows
    from demo.language.real_models import REAL_MODELS, prepare
    from dialect_plugin.calibration.calibrator import Calibrator
    from dialect_plugin.calibration.options import CalibrationOptions
    from dialect_plugin.checkpoint.convert import convert
    from dialect_plugin.scheme import Scheme

    model = prepare(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    text = (ROOT / "demo" / "heldout.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    parts = windows(tokens, CONTEXT - 1, TOKENS, tokenizer.bos_token_id)
    with tempfile.TemporaryDirectory() as directory:
        packed, calibrated = Path(directory, "packed"), Path(directory, "calibrated")
        convert(model, packed)
        calibrator = Calibrator(CalibrationOptions(sequence_length=CONTEXT))
        convert(model, calibrated, Scheme(rotation="hadamard_32"), calibration=calibrator)
        rows = [
            {"weights": path.name} | _row(model, path, activations, dtype, parts)
            for path in (packed, calibrated)
            for dtype in ("float32", "bfloat16")
            for activations in ("none", "dialect")
        ]
    return {"model": REAL_MODELS[MODEL].title, "window": CONTEXT - 1, "rows": rows}


def _row(
    model: Path, packed: Path, activations: Any, dtype: str, parts: Sequence[list[int]]
) -> dict[str, Any]:
    import torch

    from demo.language.emulation import emulate_blockdialect
    from demo.language.perplexity import model_logprobs, server_logprobs
    from demo.language.server import Server
    from dialect_plugin.scheme import METHODS

    method = METHODS[activations]
    arguments = ["--dtype", dtype, "--max-model-len", str(CONTEXT), "--enforce-eager"]
    arguments += ["--quantization", method.quantization]
    with Server(packed, packed.parent / "server.log", *arguments) as server:
        server.wait_until_ready()
        served = server_logprobs(server, parts)
    emulation = emulate_blockdialect(model, packed, activations, getattr(torch, dtype))
    emulated = model_logprobs(emulation, parts)
    return {"format": method.bits, "dtype": dtype} | compare(served, emulated, parts)


def compare(served: Any, emulated: Any, parts: Sequence[list[int]]) -> dict[str, Any]:
    """How two log-probabilities of the same tokens differ.

    Args:
        served, emulated: float64 [number of predicted tokens].
        parts: the windows of these tokens.

    Returns:
        Perplexities; mean and standard error of the difference, in nats; of every window, how many
        tokens come before the two part; the largest difference of these tokens, and the standard
        deviation of the difference of the others (None where there are none).
    """
    import torch

    from demo.language.perplexity import paired_standard_error, perplexity

    difference = served - emulated
    agreed, before, after = [], [], []
    for window in difference.split_with_sizes([len(part) - 1 for part in parts]):
        beyond = (window.abs() > AGREED).nonzero()
        first = int(beyond[0]) if len(beyond) else len(window)
        agreed.append(first)
        before.append(window[:first])
        after.append(window[first:])
    same, others = torch.cat(before), torch.cat(after)
    return {
        "tokens": len(difference),
        "served_perplexity": perplexity(served),
        "emulated_perplexity": perplexity(emulated),
        "mean": float(difference.mean()),
        "standard_error": paired_standard_error(served, emulated, parts),
        "agreed": agreed,
        "largest_before": float(same.abs().max()) if len(same) else None,
        "deviation_after": float(others.std()) if len(others) > 1 else None,
    }


def tables(figures: dict[str, Any]) -> dict[str, Table]:
    """``formats``: a row for each format and dtype."""
    rows = [
        [
            "format",
            "other values",
            "server",
            "emulation",
            "difference, nats",
            "equal tokens",
            "differ by at most",
            "the others, deviation",
        ]
    ]
    for row in figures["rows"]:
        largest, deviation = row["largest_before"], row["deviation_after"]
        rows.append(
            [
                row["format"] + (", calibrated" if row["weights"] == "calibrated" else ""),
                row["dtype"],
                f"{row['served_perplexity']:.3f}",
                f"{row['emulated_perplexity']:.3f}",
                f"{row['mean']:+.4f} ± {row['standard_error']:.4f}",
                f"{sum(row['agreed']):,} of {row['tokens']:,}",
                "–" if largest is None else f"{largest:.0e}",
                "–" if deviation is None else f"{deviation:.2f}",
            ]
        )
    return {"formats": rows}


if __name__ == "__main__":
    main(golden_gate, measure)
