"""PyTorch: transformers' model in bfloat16, in a loop without ``generate``'s own work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from .protocol import serve


class TransformersEngine:
    """A 16-bit checkpoint in transformers.

    Args:
        path: the checkpoint's directory.
        options: ``threads``.
    """

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, local_files_only=True
        )
        self._model = model.eval()

    def describe(self) -> dict[str, Any]:
        """Name and version, and the number of threads."""
        name = f"transformers {transformers.__version__}"
        return {"engine": name, "threads": torch.get_num_threads()}

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], tokens: int) -> Iterator[int]:
        """The next tokens of a prompt, each as soon as it is known."""
        given, cache = torch.tensor([prompt]), None
        for _ in range(tokens):
            found = self._model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, given = found.past_key_values, found.logits.argmax(dim=-1)
            yield int(given)

    @torch.inference_mode()
    def logits(self, window: Sequence[int]) -> np.ndarray:
        """float32 [T, V]: what follows each token of a window."""
        found: np.ndarray = self._model(torch.tensor([window])).logits[0].float().numpy()
        return found


if __name__ == "__main__":
    serve(TransformersEngine)
