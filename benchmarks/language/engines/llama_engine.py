"""llama.cpp by its C interface: its own loop, without the work that its Python class adds.

Runs in the environment of llama-cpp-python; ``quantize SOURCE TARGET TYPE`` makes the models.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np

from .protocol import serve

TYPES = {
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "mxfp4": llama_cpp.LLAMA_FTYPE_MOSTLY_MXFP4_MOE,
}
_LAYERS = rb"blk\..*(attn|ffn)_.*\.weight"
"""Linear layers; of a dense model, llama.cpp makes these 8 bits by itself where it is MXFP4."""


class LlamaEngine:
    """A GGUF file in llama.cpp.

    Args:
        path: the file.
        options: ``threads`` and ``context`` in tokens.
    """

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        chosen = llama_cpp.llama_context_default_params()
        chosen.n_ctx = chosen.n_batch = chosen.n_ubatch = options["context"]
        chosen.n_threads = chosen.n_threads_batch = self._threads = options["threads"]
        context = llama_cpp.llama_init_from_model(model, chosen) if model else None
        if context is None:
            raise RuntimeError("llama.cpp cannot load the model; its messages are above")
        self._context = context
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(options["context"], 0, 1)

    def describe(self) -> dict[str, Any]:
        """Name and version, and the number of threads."""
        return {"engine": f"llama-cpp-python {llama_cpp.__version__}", "threads": self._threads}

    def generate(self, prompt: Sequence[int], tokens: int) -> Iterator[int]:
        """The next tokens of a prompt, each as soon as it is known."""
        self._clear()
        logits, position = self._decode(prompt, 0, only_last=True), len(prompt)
        for _ in range(tokens):
            token = int(logits[-1].argmax())
            yield token
            logits = self._decode([token], position, only_last=True)
            position += 1

    def logits(self, window: Sequence[int]) -> np.ndarray:
        """float32 [T, V]: what follows each token of a window."""
        self._clear()
        return self._decode(window, 0, only_last=False).copy()

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _decode(self, tokens: Sequence[int], position: int, *, only_last: bool) -> np.ndarray:
        """float32 [1 or T, V]; valid until the next call."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for number, token in enumerate(tokens):
            batch.token[number], batch.pos[number] = token, position + number
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, 0
            batch.logits[number] = not only_last or number == len(tokens) - 1
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed on {len(tokens)} tokens")
        rows = 1 if only_last else len(tokens)
        found = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, shape=(rows * self._vocabulary,)).reshape(rows, -1)


def quantize(source: str, target: str, kind: str) -> None:
    """Quantize a GGUF file as ``llama-quantize`` does; MXFP4 in all linear layers."""
    chosen = llama_cpp.llama_model_quantize_default_params()
    chosen.ftype, chosen.nthread = TYPES[kind], 2
    if kind == "mxfp4":
        override = llama_cpp.llama_model_tensor_override
        overrides = (override * 2)(override(_LAYERS, llama_cpp.GGML_TYPE_MXFP4), override())
        chosen.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(override))
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(chosen)):
        raise SystemExit(f"llama.cpp cannot quantize to {kind}; its messages are above")


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:])
    else:
        serve(LlamaEngine)
