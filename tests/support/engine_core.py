"""vLLM's engine core on tiny models, one after another in this process: loader, scheduler, runner.

What `LLM` puts in front of it (tokenizer, renderer, output processor) is left out, as are process
groups that are torn down between two models: a model takes a fraction of a second.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dialect_kernels.packed import STORED_FIELDS
from dialect_plugin.checkpoint.reader import open_checkpoint
from tests.support.served_models import PROMPT, VOCABULARY


@dataclass(frozen=True)
class Served:
    """What one model computed, and what it held.

    Attributes:
        output: log-probabilities [len(PROMPT) - 1, VOCABULARY] of the token after each prefix of
            PROMPT; of a pooling model its embedding or scores.
        packed: names of the engine's layers with packed weights, and their numbers of weights.
    """

    output: torch.Tensor
    packed: dict[str, int]


def text_models() -> set[str]:
    """The text models of this vLLM whose classes transformers has."""
    import transformers
    from vllm.model_executor.models import registry

    known = {*registry._TEXT_GENERATION_MODELS, *registry._TRANSFORMERS_SUPPORTED_MODELS}
    return {name for name in known & set(dir(transformers)) if "Conditional" not in name}


def serve(model: Path, quantization: str | None = None, **options: Any) -> Served:
    """Load `model` and run PROMPT through it, in float32."""
    with _core(model, quantization=quantization, **options) as core:
        core.add_request(_request(core))
        found: list[Any] = []
        while not found:  # a prompt may take several steps
            outputs, _ = core.step()
            found = outputs[0].outputs if 0 in outputs else []
        [output] = found
        runner = core.model_executor.driver_worker.worker.model_runner
        packed = _packed(runner.get_model())
    if output.pooling_output is not None:
        return Served(output.pooling_output, packed)
    tensors = output.new_prompt_logprobs_tensors
    logprobs = torch.full((len(PROMPT) - 1, VOCABULARY), torch.nan)
    # the first column is the prompt's own token, which the others have too
    logprobs.scatter_(1, tensors.logprob_token_ids[:, 1:].long(), tensors.logprobs[:, 1:])
    return Served(logprobs, packed)


@dataclass(frozen=True)
class Drafted:
    """What one model generated with the help of a draft.

    Attributes:
        tokens: that follow PROMPT, as many as were requested.
        steps: of the engine, of which each gives one token more than it accepts of the draft's.
        shared: of ``embed_tokens`` and ``lm_head``, what the draft has from its target.
        packed: names of the draft's layers with packed weights.
    """

    tokens: list[int]
    steps: int
    shared: list[str]
    packed: list[str]


def generate(model: Path, count: int, **options: Any) -> Drafted:
    """Load `model`, and with ``speculative_config`` its draft; `count` tokens after PROMPT."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    sampling = SamplingParams(
        max_tokens=count, temperature=0, ignore_eos=True, stop_token_ids=[], detokenize=False
    )
    with _core(model, **({"async_scheduling": False} | options)) as core:
        core.add_request(Request("one", PROMPT, sampling, None))
        tokens: list[int] = []
        steps = 0
        while len(tokens) < count:
            outputs, executed = core.step()
            core.post_step(executed)
            new = [token for out in outputs[0].outputs for token in out.new_token_ids]
            tokens += new
            steps += bool(new)
        runner = core.model_executor.driver_worker.worker.model_runner
        draft = getattr(getattr(runner, "drafter", None), "model", None)
        if draft is None:
            return Drafted(tokens, steps, [], [])
        target = set(runner.get_model().modules())
        named = draft.named_modules(remove_duplicate=False)
        leaves = {name.rpartition(".")[2] for name, module in named if module in target}
        shared = sorted(leaves & {"embed_tokens", "lm_head"})
        return Drafted(tokens, steps, shared, list(_packed(draft)))


def _packed(model: torch.nn.Module) -> dict[str, int]:
    stored = STORED_FIELDS[0].stored
    return {
        name.removesuffix(stored).rstrip("._"): 2 * value.numel()
        for name, value in model.named_parameters()
        if name.endswith(stored)
    }


def _request(core: Any) -> Any:
    from vllm import PoolingParams, SamplingParams
    from vllm.v1.request import Request

    if core.is_pooling_model:
        [task] = {"embed", "classify"} & set(core.get_supported_tasks())
        pooling = PoolingParams(task=task)
        pooling.verify(core.vllm_config.model_config)
        return Request("one", PROMPT, None, pooling)
    sampling = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=VOCABULARY, detokenize=False
    )
    return Request("one", PROMPT, sampling, None)


@contextmanager
def many_engines() -> Iterator[None]:
    """Spare each engine what takes most of its time and needs to be done once in a process."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models.transformers.base import Base
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    current_platform.register_triton_kernel_overrides()  # a search through all modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(current_platform), "register_triton_kernel_overrides", staticmethod(lambda: None)
        )
        # it changes transformers' own class, which then cannot be built outside of vLLM; eager
        # engines compile nothing
        patch.setattr(Base, "_decorate_for_torch_compile", lambda self: None)
        yield
        cleanup_dist_env_and_memory()


@contextmanager
def _core(model: Path, **options: Any) -> Iterator[Any]:
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 64,
        "dtype": "float32",
        "max_logprobs": -1,
        "enable_prefix_caching": False,
        "num_gpu_blocks_override": 16,
        "gpu_memory_utilization": 0.3,  # of a machine that others use too; so few blocks need none
    }
    # vLLM would inspect the class in a process of its own
    for name in open_checkpoint(model).config["architectures"]:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    arguments = EngineArgs(str(model), **(defaults | options))
    gc.freeze()  # an engine collects garbage six times, which is most of its time
    try:
        core = EngineCore(arguments.create_engine_config(), UniProcExecutor, log_stats=False)
        try:
            yield core
        finally:
            core.model_executor.shutdown()
            core.scheduler.shutdown()
    finally:
        destroy_model_parallel()  # a mixture of experts needs one group more
        destroy_distributed_environment()
