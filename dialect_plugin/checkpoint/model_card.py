"""The README.md that goes with a packed checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dialect_kernels import __version__

from .layer_choice import LayerPlan
from .loss import sqnr
from .reader import Checkpoint

if TYPE_CHECKING:
    from .journal import LayerRecord

__all__ = ["model_card"]

_FORMATS = {"dialect": "W4A4", "fp8": "W4A8", "none": "W4A16"}


def model_card(checkpoint: Checkpoint, layers: Sequence[LayerRecord], plan: LayerPlan) -> str:
    """Markdown text: what was done, bits per weight, SQNR per kind of layer, how to serve.

    Args:
        checkpoint: the source.
        layers: what quantizing did, layer by layer.
        plan: what was decided.
    """
    scheme = plan.scheme
    weights = sum(layer.rows * layer.columns for layer in layers)
    bits = 8 * sum(layer.packed_bytes for layer in layers) / weights
    signal, noise = sum(x.signal for x in layers), sum(x.noise for x in layers)
    below = [layer for layer in layers if layer.rows_below_window]
    lines = [
        "---",
        "library_name: vllm",
        "tags: [blockdialect, 4-bit]",
        "---",
        "",
        f"# {checkpoint.architecture}, packed with BlockDialect",
        "",
        f"{len(layers)} linear layers ({weights:,} weights) are stored in the format "
        f"`{scheme.book}` at {bits:.3f} bits per weight; everything else is as in the source.",
        "",
        "| | |",
        "|---|---|",
        f"| architecture | {checkpoint.architecture} |",
        f"| format | `blockdialect` version {scheme.format_version}, book `{scheme.book}` |",
        f"| block size | {scheme.block_size}"
        + (f", {len(scheme.overrides)} layers differ |" if scheme.overrides else " |"),
        f"| activations | {_FORMATS[scheme.activation_format]} unless asked otherwise |",
        "| selection of dialects | exact squared error |",
        f"| SQNR of all quantized weights | {sqnr(signal, noise):.2f} dB |",
        f"| written by | blockdialect {__version__} |",
        "",
        "## Serving",
        "",
        "With vLLM and `blockdialect` installed:",
        "",
        "```",
        "vllm serve DIRECTORY                                     # as the table says",
        "vllm serve DIRECTORY --quantization blockdialect_w4a8    # FP8 activations",
        "vllm serve DIRECTORY --quantization blockdialect_w4a16   # 16-bit activations",
        "```",
        "",
        "## Layers",
        "",
        "| layer | shape | block | SQNR, dB |",
        "|---|---|---:|---:|",
        *(
            f"| {x.name} | {x.rows} x {x.columns} | {x.block_size} "
            f"| {sqnr(x.signal, x.noise):.2f} |"
            for x in layers
        ),
    ]
    if plan.adapted:
        lines += ["", "Other block size than asked for: " + ", ".join(plan.adapted) + "."]
    if plan.indivisible:
        lines += ["", "In 16 bit, no block size divides them: " + ", ".join(plan.indivisible) + "."]
    if plan.has_experts:
        lines += ["", "The experts are in 16 bit."]
    if below:
        names = ", ".join(f"{x.name} ({x.rows_below_window} rows)" for x in below)
        lines += ["", f"Rows with blocks below the exponent window: {names}."]
    return "\n".join(lines) + "\n"
