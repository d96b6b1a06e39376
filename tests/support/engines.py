"""vLLM's engine in this process, and the figures that tests compare."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dialect_kernels import quantize
from dialect_kernels.formatbook import SEMANTIC_32, Formatbook, Rotation
from tests.support.served_models import PROMPT, VOCABULARY

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
STORED = ("weight_packed", "weight_meta", "weight_row_exponent")
"""Written out a second time, so that an error in the table of stored names shows."""


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """An ``LLM`` on `model`, shut down at the end.

    float32 activations: what vLLM computes then differs from transformers by rounding errors of
    float32 only, so that a comparison can be tight.
    """
    from vllm import LLM

    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "dtype": "float32",
        "max_logprobs": -1,
        "enable_prefix_caching": False,
    }
    gc.freeze()  # an engine collects garbage six times; its shutdown thaws and collects once more
    llm = LLM(str(model), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def load_model(path: Path, **options: Any) -> torch.nn.Module:
    """The model as vLLM loads it, without an engine; needs the fixture `one_rank`."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    config = _config(path, **options)
    with set_current_vllm_config(config):
        loader = get_model_loader(config.load_config)
        model: torch.nn.Module = loader.load_model(
            vllm_config=config, model_config=config.model_config
        )
    return model


def empty_model(path: Path, **options: Any) -> torch.nn.Module:
    """As :func:`load_model`, before anything is loaded."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    config = _config(path, **options)
    with set_current_vllm_config(config):
        model: torch.nn.Module = initialize_model(
            vllm_config=config, model_config=config.model_config
        )
    return model


def _config(path: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 64,
    }
    arguments = EngineArgs(str(path), enforce_eager=True, **(defaults | options))
    return arguments.create_engine_config()


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The data of all parameters by their names."""
    return {name: value.data for name, value in model.named_parameters()}


def logprobs(llm: Any, **generate: Any) -> torch.Tensor:
    """Log-probabilities [len(PROMPT) - 1, VOCABULARY] of the token after each prefix of PROMPT."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=VOCABULARY, detokenize=False
    )
    prompt = {"prompt_token_ids": PROMPT}
    (output,) = llm.generate([prompt], parameters, use_tqdm=False, **generate)
    rows = []
    for by_token in output.prompt_logprobs[1:]:
        assert len(by_token) == VOCABULARY
        rows.append([by_token[token].logprob for token in range(VOCABULARY)])
    return torch.tensor(rows)


def parameters(llm: Any) -> dict[str, torch.Tensor]:
    """Copies of all parameters of the engine's model."""
    found: list[dict[str, torch.Tensor]] = llm.apply_model(
        lambda model: {name: value.data.clone() for name, value in model.named_parameters()}
    )
    return found[0]


def expected_bytes(
    weights: dict[str, torch.Tensor],
    module: str,
    book: Formatbook = SEMANTIC_32,
    block_size: int = 32,
    rotation: Rotation = "none",
) -> dict[str, torch.Tensor]:
    """The packed parameters of vLLM's `module`, quantized part by part from 16-bit `weights`."""
    parent, _, leaf = module.rpartition(".")
    names = [f"{module}.weight"]
    if names[0] not in weights:
        names = [f"{parent}.{part}.weight" for part in FUSED[leaf]]
    parts = [quantize(weights[name], book, block_size, rotation=rotation) for name in names]
    return {
        f"{module}.weight_packed": torch.cat([part.codes for part in parts]),
        f"{module}.weight_meta": torch.cat([part.meta for part in parts]),
        f"{module}.weight_row_exponent": torch.cat([part.row_exponent for part in parts]),
    }


def expected_experts(
    weights: dict[str, torch.Tensor], module: str, block_size: int = 32
) -> dict[str, torch.Tensor]:
    """The packed experts of vLLM's `module`, from Mixtral's 16-bit `weights`."""
    prefix, found = module.removesuffix(".routed_experts"), {}
    count = len({name.split(".")[-3] for name in weights if name.startswith(f"{prefix}.")})
    for stack, parts in (("w13", ("w1", "w3")), ("w2", ("w2",))):
        experts = [
            [
                quantize(weights[f"{prefix}.{e}.{part}.weight"], SEMANTIC_32, block_size=block_size)
                for part in parts
            ]
            for e in range(count)
        ]
        for field, suffix in zip(("codes", "meta", "row_exponent"), STORED, strict=True):
            found[f"{module}.{stack}_{suffix}"] = torch.stack(
                [torch.cat([getattr(part, field) for part in expert]) for expert in experts]
            )
    return found


def packed_experts(found: dict[str, torch.Tensor]) -> list[str]:
    """Names of vLLM's modules with packed experts."""
    ending = ".w13_weight_packed"
    return [name.removesuffix(ending) for name in found if name.endswith(ending)]


def packed_modules(found: dict[str, torch.Tensor]) -> list[str]:
    """Names of the modules with packed parameters."""
    ending = ".weight_packed"
    return [name.removesuffix(ending) for name in found if name.endswith(ending)]
