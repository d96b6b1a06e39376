"""vLLM as a library: its engine in this process, without a server in front of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .protocol import serve

_CACHE_BYTES = 256 << 20


class VllmEngine:
    """A checkpoint in vLLM.

    Args:
        path: its directory.
        options: ``threads``; ``context`` in tokens; ``eager``: whether it runs uncompiled;
            ``quantization``: the method, or None for what the checkpoint states.
    """

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        os.environ.update(
            OMP_NUM_THREADS=str(options["threads"]),
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
        )
        # here, because these variables are read during the import
        import torch
        import vllm

        self._vllm = vllm
        self._engine = vllm.LLM(
            path,
            dtype="bfloat16",
            quantization=options["quantization"],
            enforce_eager=options["eager"],
            max_model_len=options["context"],
            max_num_batched_tokens=options["context"],
            max_num_seqs=8,
            kv_cache_memory_bytes=_CACHE_BYTES,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self._captured: list[torch.Tensor] = []
        self._engine.apply_model(self._capture_logits)
        self._threads = torch.get_num_threads()
        self._requests = 0

    def describe(self) -> dict[str, Any]:
        """Name and version, and the number of threads."""
        return {"engine": f"vllm {self._vllm.__version__}", "threads": self._threads}

    def generate(self, prompt: Sequence[int], tokens: int) -> Iterator[int]:
        """The next tokens of a prompt, each as soon as it is known."""
        sent = self._send(prompt, tokens)
        known = 0
        while self._engine.llm_engine.has_unfinished_requests():
            for answer in self._engine.llm_engine.step():
                found = answer.outputs[0].token_ids
                if answer.request_id == sent and len(found) > known:
                    yield from found[known:]
                    known = len(found)

    def logits(self, window: Sequence[int]) -> np.ndarray:
        """float32 [T - 1, V]: what follows each token of a window but the last."""
        self._captured.clear()
        self._send(window, 1, prompt_logprobs=0)
        while self._engine.llm_engine.has_unfinished_requests():
            self._engine.llm_engine.step()
        found: np.ndarray = max(self._captured, key=len).float().numpy()
        return found

    def _send(self, prompt: Sequence[int], tokens: int, **options: Any) -> str:
        self._requests += 1
        chosen = self._vllm.SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **options
        )
        name = str(self._requests)
        given = {"prompt_token_ids": list(prompt)}
        self._engine.llm_engine.add_request(name, given, chosen)
        return name

    def _capture_logits(self, model: Any) -> None:
        """Keep the logits of many tokens, of which vLLM passes on no more than a few a token."""
        compute = model.compute_logits

        def compute_and_keep(hidden: Any, *arguments: Any) -> Any:
            logits = compute(hidden, *arguments)
            if len(logits) > 1:
                self._captured.append(logits)
            return logits

        model.compute_logits = compute_and_keep


if __name__ == "__main__":
    serve(VllmEngine)
