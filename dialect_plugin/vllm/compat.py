"""Differences between the supported vLLM versions, each with its reason and its end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

__all__ = [
    "attention_backend",
    "buffer_in_use",
    "built_for_reload",
    "current_architectures",
    "current_config",
    "exchanges_tokens",
    "has_adapters_for_experts",
    "has_gated_experts",
    "has_open_cache_dtypes",
    "has_targets_vocabulary",
    "hidden_weights",
    "is_draft",
    "is_expert_layer",
    "is_expert_runner",
    "is_multimodal",
    "is_partly_reloaded",
    "is_pooling",
    "is_reloading",
    "is_stage",
    "loads_sharded_state",
    "loads_through_loaders",
    "name_mapper",
    "no_warnings_of_probes",
    "number_of_experts",
    "packs_caches",
    "permit_amx",
    "register_attention",
    "restore_weights",
    "shares_cache_of",
    "stacked_names",
    "stages_stop",
    "tied_embeddings",
    "weights_put_aside",
]

_LOAD_FORMATS = frozenset(
    {"auto", "hf", "safetensors", "fastsafetensors", "runai_streamer", "instanttensor"}
)
_SHARDED_STATE = frozenset({"sharded_state", "runai_streamer_sharded"})


def is_expert_layer(layer: object) -> bool:
    """Whether `layer` holds a mixture's routed experts.

    Symptom: the class moved; `FusedMoE` is the layer in 0.25, a factory from 0.26 on, and is gone
    in 0.32, which has `FusedMoEFactory`. Cause: the experts became `RoutedExperts`, a name that
    0.26 and 0.32 share. Ends with the first version that renames it.
    """
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    return isinstance(layer, RoutedExperts)


def is_expert_runner(module: object) -> bool:
    """Whether `module` is what holds the experts of a layer, and has a load_weights for them alone.

    0.26 has none: there a model's own load_weights loads experts. Ends with its support.
    """
    return is_expert_layer(getattr(module, "routed_experts", None)) and hasattr(
        module, "layer_name"
    )


def has_gated_experts(layer: object) -> bool:
    """Whether the experts of an expert layer have a gate beside their up projection."""
    return bool(getattr(getattr(layer, "moe_config", None), "is_act_and_mul", False))


def has_adapters_for_experts(layer: object) -> bool:
    """Whether the engine may get LoRA adapters for the experts of an expert layer."""
    lora: Any = getattr(current_config(), "lora_config", None)
    if lora is None:
        return False
    targets = getattr(lora, "target_modules", None)
    return targets is None or "experts" in targets


def current_architectures() -> list[str]:
    """`architectures` of the model that is being built; empty outside of vLLM's model loading."""
    config = _hf_config()
    return list(getattr(config, "architectures", None) or [])


def tied_embeddings(config: Any = None) -> bool:
    """Whether a model ties its output projection to the embeddings.

    Args:
        config: transformers' config of the model; default: of the model that is being built.
    """
    return bool(getattr(_text_config(config or _hf_config()), "tie_word_embeddings", False))


def is_multimodal() -> bool:
    """Whether the text model is only a part of the model that is being built."""
    config = _hf_config()
    return _text_config(config) is not config


def loads_through_loaders() -> bool:
    """Whether the load format passes every tensor of the checkpoint to a parameter's loader.

    ``dummy`` and ``sharded_state`` write into the parameters instead, so that a missing tensor
    cannot be noticed.
    """
    config = current_config()
    return config is not None and str(config.load_config.load_format) in _LOAD_FORMATS


def loads_sharded_state() -> bool:
    """Whether the load format copies the parameters that another engine has saved."""
    config = current_config()
    return config is not None and str(config.load_config.load_format) in _SHARDED_STATE


def is_draft(model: torch.nn.Module) -> bool:
    """Whether `model` is the draft of speculative decoding.

    vLLM builds heads (EAGLE, multi-token prediction) with the config of their target; a draft that
    is a model of its own has a config of its own.
    """
    if getattr(_model_config(), "runner_type", None) == "draft":
        return True
    speculative: Any = getattr(current_config(), "speculative_config", None)
    config: Any = getattr(speculative, "draft_model_config", None)
    if getattr(config, "runner_type", None) != "draft" or speculative.method == "draft_model":
        return False
    from vllm.model_executor.model_loader.utils import get_model_cls

    return isinstance(model, get_model_cls(config))


def has_targets_vocabulary(model: torch.nn.Module) -> bool:
    """Whether `model` is a head for multi-token prediction, read from its target's checkpoint.

    vLLM gives it the embeddings and the output projection of its target once both are loaded,
    except to pipeline stages.
    """
    speculative: Any = getattr(current_config(), "speculative_config", None)
    return getattr(speculative, "method", None) == "mtp" and not is_stage() and is_draft(model)


def is_pooling() -> bool:
    """Whether the model that is being built makes embeddings or scores instead of text."""
    return getattr(_model_config(), "runner_type", None) == "pooling"


def is_stage() -> bool:
    """Whether the model that is being built is one of several pipeline stages."""
    return _parallel("pipeline_parallel_size") > 1


def stages_stop() -> bool:
    """Whether pipeline stages would stop at the first request.

    Symptom: on a CPU the second stage raises AssertionError in an eager engine, whatever the
    model. Cause: vLLM makes what a stage takes in while it warms up, which eager engines on CPUs
    leave out. Ends with the first vLLM that does not (0.32 does).
    """
    from vllm.platforms import current_platform

    compilation = getattr(current_config(), "compilation_config", None)
    return current_platform.is_cpu() and is_stage() and not getattr(compilation, "mode", 1)


def exchanges_tokens() -> bool:
    """Whether data-parallel ranks of a mixture can exchange tokens.

    Symptom: on a CPU the start ends in NotImplementedError, whatever the model. Cause: vLLM's
    communicator for CPUs has no ``all_gatherv``. Ends with the first vLLM whose communicator has.
    """
    from vllm.distributed.device_communicators import base_device_communicator, cpu_communicator
    from vllm.platforms import current_platform

    lacks = (
        getattr(cpu_communicator.CpuCommunicator, "all_gatherv", None)
        is base_device_communicator.DeviceCommunicatorBase.all_gatherv
    )
    return not (current_platform.is_cpu() and lacks)


def is_reloading(model: torch.nn.Module) -> bool:
    """Whether vLLM has put the model's weights aside and loads new ones in their place."""
    return any(_layer_info(layer) is not None for layer in model.modules())


def is_partly_reloaded(layer: torch.nn.Module) -> bool:
    """Whether a reload has brought some of the layer's tensors and not all of them."""
    info = _layer_info(layer)
    return info is not None and info.load_numel > 0


def weights_put_aside(layer: torch.nn.Module) -> list[torch.Tensor]:
    """The layer's tensors that vLLM has put aside for a reload; new values are copied into them."""
    info = _layer_info(layer)
    return [] if info is None else [t for tensors in info.kernel_tensors for t in tensors.values()]


def buffer_in_use(layer: torch.nn.Module, name: str) -> torch.Tensor:
    """A buffer of a layer, whether or not vLLM has put it aside for a reload."""
    info = _layer_info(layer)
    found: torch.Tensor = getattr(layer, name) if info is None else info.kernel_tensors[1][name]
    return found


def shares_cache_of(layer: Any) -> Any:
    """The attention layer whose KV cache this one reads instead of one of its own; else None."""
    name = getattr(layer, "kv_sharing_target_layer_name", None)
    config = current_config()
    if name is None or config is None:
        return None
    return config.compilation_config.static_forward_context.get(name)


def restore_weights(model: torch.nn.Module) -> None:
    """Give back the weights that vLLM has put aside for a reload.

    Symptom: after a reload that raises, the model's weights are on the meta device and the engine
    is of no more use. Cause: vLLM's reload has no way back. Ends with the first vLLM that has one.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = _layer_info(layer)
        if info is not None:
            layerwise._place_kernel_tensors(layer, info)
            info.reset()


def number_of_experts(layer: Any) -> int:
    """How many experts the checkpoint has for an expert layer, on all ranks together.

    0.26 counts none apart from those that load balancing adds. Ends with its support.
    """
    moe = layer.moe_config
    return int(getattr(moe, "num_logical_experts", moe.num_experts))


def hidden_weights(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """16-bit linear layers whose weights are in no parameter, and the functions that hold them.

    Symptom: after a reload that raises, routers have the new weights. Cause: on CPUs vLLM packs a
    weight for oneDNN, keeps it in a function of the layer, and empties the parameter. Ends with the
    first vLLM that keeps it in a tensor of the layer.
    """
    return [
        (layer, product)
        for layer in model.modules()
        if (product := vars(layer).get("cpu_linear")) is not None
    ]


@contextmanager
def built_for_reload(layer: torch.nn.Module) -> Iterator[None]:
    """Parameters that are made inside the block, on the model's device, are those of a reload.

    vLLM notes the parameters of a model once it is built, and makes them again for a reload.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    info = layerwise.LAYERWISE_INFO.get(layer)
    device = torch.get_default_device() if info is None else info.restore_device
    with device:
        yield
        if info is not None:
            layerwise.record_metadata_for_reloading(layer)


def name_mapper(module: torch.nn.Module) -> Any:
    """A model's map from the checkpoint's names to its own, without what is fused; None if none.

    Symptom: 0.26 has maps without `get_rename_mapper`. Cause: it has what is fused elsewhere. Ends
    with the support of 0.26.
    """
    mapper: Any = getattr(module, "hf_to_vllm_mapper", None)
    rename = getattr(mapper, "get_rename_mapper", None)
    return mapper if rename is None else rename()


def stacked_names(module: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """(part, fused layer) of a model's map, by the last words of their names.

    Symptom and end as :func:`name_mapper`.
    """
    mapper = getattr(module, "hf_to_vllm_mapper", None)
    for part, (fused, _) in (getattr(mapper, "orig_to_new_stacked", None) or {}).items():
        yield part.strip(".").rpartition(".")[2], fused.strip(".").rpartition(".")[2]


@contextmanager
def no_warnings_of_probes() -> Iterator[None]:
    """Keep vLLM from warning that probes have another dtype than the parameters they arrive at.

    Symptom: four warnings for every packed layer. Cause: vLLM compares dtypes before it calls a
    parameter's loader. Ends with the first vLLM that leaves this to the loader.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not (isinstance(record.args, tuple) and torch.float64 in record.args)

    logger = logging.getLogger("vllm.model_executor.models.utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _layer_info(layer: torch.nn.Module) -> Any:
    """vLLM's notes on the reload of a layer that waits for its tensors, or None."""
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    info = LAYERWISE_INFO.get(layer)
    return info if info is not None and info.kernel_tensors is not None else None


def packs_caches() -> bool:
    """Whether there is a back end for 4-bit KV caches here: on CPUs from 0.28, on GPUs from 0.29.

    Symptom: no `customize_spec` in 0.26 and 0.27, caches of other shapes on GPUs in 0.28. Cause: a
    cache's size followed from dtype and head size alone, and each back end gave its own shape. Ends
    with the support of 0.28.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import AttentionBackend

    needed = "customize_spec" if current_platform.is_cpu() else "supported_kv_cache_layouts"
    has_kernels = current_platform.is_cpu() or current_platform.is_cuda()
    return has_kernels and hasattr(AttentionBackend, needed)


def register_attention() -> None:
    """Register the back end that knows 4-bit KV caches.

    On CPUs in the place of vLLM's own, because vLLM's platform takes that one, whatever it is told;
    on GPUs as ``CUSTOM``. Another plugin's back end stays.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    place, name = AttentionBackendEnum.CUSTOM, "gpu_attention.DialectGPUBackend"
    if current_platform.is_cpu():
        place, name = AttentionBackendEnum.CPU_ATTN, "cpu_attention.DialectCPUBackend"
    if packs_caches() and not place.is_overridden():
        register_backend(place, f"{__package__}.{name}")


def has_open_cache_dtypes() -> bool:
    """Whether ``--kv-cache-dtype`` can be given new values: on GPUs from 0.33 on.

    Before, its values were a fixed list. Ends with the support of 0.32.
    """
    from vllm.config import cache
    from vllm.platforms import current_platform

    return current_platform.is_cuda() and hasattr(cache, "register_kv_cache_dtype")


def attention_backend(layer: object) -> str | None:
    """The name of the back end of a layer that keeps keys and values on a GPU; else None.

    It is chosen by the engine's options there; on CPUs there is one.
    """
    from vllm.platforms import current_platform

    backend: Any = getattr(layer, "attn_backend", None)
    keeps_both = backend is not None and getattr(layer, "attn_type", None) == "decoder"
    if not keeps_both or current_platform.is_cpu() or backend.is_mla():
        return None
    return str(backend.get_name())


@cache
def permit_amx() -> None:
    """Request Linux's permission to use the CPU's AMX tiles, for the whole process.

    Symptom: the worker dies of SIGILL in its first attention with bfloat16 on a CPU with AMX.
    Cause: vLLM's attention uses tiles without requesting the permission. Most 16-bit models do not
    show it, because oneDNN requests it for linear layers that are large enough for tiles; those of
    a small model are not, and a quantized model runs none of them before its attention.
    Ends with the first vLLM that requests the permission itself (0.32 does not).
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def _text_config(config: Any) -> Any:
    """The config of the text model, whatever its name; `config` itself if it is that."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _hf_config() -> Any:
    return getattr(_model_config(), "hf_config", None)


def _parallel(field: str) -> int:
    return int(getattr(getattr(current_config(), "parallel_config", None), field, 1))


def _model_config() -> Any:
    return getattr(current_config(), "model_config", None)


def current_config() -> Any:
    """vLLM's config of the model that is being built; None outside of that."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()
