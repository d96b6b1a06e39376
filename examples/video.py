"""Generate a video in 16 bit and with SemanticDialect, and compare the two.

    python -m examples.video

The pipeline is the small one that ships; any diffusers pipeline has the same three methods.
"""

from __future__ import annotations

import torch

import diffusers_hook  # noqa: F401 - gives the pipeline its three methods
from demo.video.metrics import psnr
from demo.video.pipeline import MODEL, MovingShapesPipeline

PROMPT = "a red circle moves up-left, fast"


def main(steps: int = 8) -> None:
    """Print how close the two videos are, and what the hook did."""
    pipe = MovingShapesPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)

    def generate() -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        frames: torch.Tensor = pipe(PROMPT, num_inference_steps=steps, generator=noise).frames
        return frames

    plain = generate()
    pipe.enable_semantic_dialect(progress=False)
    quantized = generate()
    print(f"{PROMPT}: PSNR {psnr(quantized, plain)[0]:.1f} dB against 16 bit")
    print(pipe.semantic_dialect_summary())
    pipe.disable_semantic_dialect()
    assert torch.equal(generate(), plain), "disabling restores the 16-bit weights bit for bit"


if __name__ == "__main__":
    main()
