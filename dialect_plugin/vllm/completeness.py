"""Whether a load has filled every parameter of a model.

vLLM checks this for 16-bit models only, and there not in linear layers. Without a check, a norm or
a bias that the checkpoint lacks is memory that nobody has written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from dialect_kernels.packed import STORED_FIELDS

from . import compat
from .errors import LoadError
from .experts import EXPERT_PARAMETERS, BlockDialectExpertsMethod
from .linear import BlockDialectLinearMethod
from .parameters import shards_of, wrapped_loaders
from .probes import WEIGHT, Recorder

__all__ = ["check_complete", "track_arrivals"]

_OURS = (WEIGHT, *(field.stored for field in STORED_FIELDS))
_COMMON = ("weight", "bias")
"""Names that many tensors of one decoder layer have."""
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")
_GATED = ("w1", "w3")
"""vLLM's shard ids of gate and up, which one tensor holds for all experts."""


@contextmanager
def track_arrivals(
    model: torch.nn.Module, recorder: Recorder
) -> Iterator[Mapping[int, set[Hashable]]]:
    """The shards that arrive for each parameter that is not ours, by the parameter's id.

    A probe among them means that the checkpoint holds a layer packed that the engine has in 16 bit.
    """
    arrived: dict[int, set[Hashable]] = {}
    wrappers = []
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, BlockDialectLinearMethod) and not method.spec.serialized:
            continue  # vLLM defers their loaders
        for name, parameter in module.named_parameters(recurse=False):
            if _is_ours(module, name) or id(parameter) in arrived:
                continue
            shards = arrived[id(parameter)] = set()
            wrappers.append((parameter, partial(_noting, shards, recorder)))
    with wrapped_loaders(wrappers):
        yield arrived


def _noting(
    shards: set[Hashable], recorder: Recorder, loader: Callable[..., Any]
) -> Callable[..., Any]:
    def load(*args: Any, **kwargs: Any) -> Any:
        tensor = args[1] if len(args) > 1 else kwargs.get("loaded_weight")
        layer = recorder.layer_of(tensor)
        if layer is not None:
            raise LoadError(
                f"{layer}: the checkpoint holds this layer packed, but vLLM builds it without "
                "quantization; convert the model again and --ignore the layer"
            )
        result = loader(*args, **kwargs)
        if result is not False:  # experts of other ranks
            shards.update(shards_of(loader, *args, **kwargs))
        return result

    return load


def check_complete(
    model: torch.nn.Module,
    loaded: Collection[str] | None,
    arrived: Mapping[int, set[Hashable]],
    offered: Collection[str],
    draft: bool,
) -> None:
    """Raise LoadError if a parameter of the model, or a part of a fused one, was not loaded.

    Not required are scales of the KV cache, which have defaults, and what a draft model shares with
    its target. Weights of the layers that this plugin quantizes have a check of their own.

    Args:
        model: the model after its load_weights.
        loaded: what load_weights returned, names of parameters.
        arrived: from :func:`track_arrivals`.
        offered: names of the checkpoint's tensors.
        draft: whether it is the draft model of speculative decoding.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(named[name]) for name in loaded or () if name in named}
    missing, halved = [], []
    for prefix, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod):
            continue
        if draft and isinstance(module, VocabParallelEmbedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if _is_ours(module, name) or not parameter.numel():
                continue
            shards = arrived.get(id(parameter))
            if not shards and id(parameter) not in filled:
                if shards is not None or loaded is not None:
                    missing.append(f"{prefix}.{name}" if prefix else name)
            elif shards and _is_halved(module, parameter, shards):
                halved.append(f"{prefix}.{name}")
    if missing or halved:
        raise _left_out(missing, set(offered) - named.keys()) or _incomplete(missing, halved)


def _is_ours(module: torch.nn.Module, name: str) -> bool:
    method = getattr(module, "quant_method", None)
    if isinstance(method, BlockDialectExpertsMethod):
        return name.startswith(EXPERT_PARAMETERS)
    return name in _OURS and isinstance(method, BlockDialectLinearMethod)


def _is_halved(
    module: torch.nn.Module, parameter: torch.nn.Parameter, shards: set[Hashable]
) -> bool:
    """Whether a fused linear layer, or a tensor of experts, has got some of its parts only."""
    if compat.is_expert_layer(module):
        return _lacks_experts(module, parameter, shards)
    parts = getattr(module, "output_partition_sizes", ())
    return None not in shards and len(shards) < len(parts)


def _lacks_experts(
    module: torch.nn.Module, parameter: torch.nn.Parameter, shards: set[Hashable]
) -> bool:
    experts: dict[Hashable, set[Hashable]] = {}
    for arrival in shards:
        shard, expert = arrival if isinstance(arrival, tuple) else (arrival, None)
        if expert is None:
            return False  # all experts in one tensor
        experts.setdefault(shard, set()).add(expert)
    if not experts.keys().isdisjoint(_GATED) and compat.has_gated_experts(module):
        experts = {shard: experts.get(shard, set()) for shard in _GATED}
    return any(len(found) < parameter.shape[0] for found in experts.values())


def _left_out(missing: list[str], offered: Collection[str]) -> LoadError | None:
    """The error for a tensor that vLLM's loader skipped; None if none was offered for `missing`.

    Args:
        missing: names of the model's parameters.
        offered: names of the checkpoint's tensors that no parameter of the model has.
    """
    for name in missing:
        leaf = name.rpartition(".")[2]
        if leaf in _COMMON:
            continue
        place = _NUMBERS.findall(name)
        for other in sorted(offered):
            if other.rpartition(".")[2] == leaf and _NUMBERS.findall(other) == place:
                return LoadError(
                    f"{name}: vLLM's loader of this model left it empty, although the checkpoint "
                    f"holds {other}; serve it with a version of vLLM that loads this tensor"
                )
    return None


def _incomplete(missing: list[str], halved: list[str]) -> LoadError:
    name, more = (missing or halved)[0], len(missing) + len(halved) - 1
    what = "it" if missing else "all of its parts"
    others = f", nor {more} more of the model's tensors" if more else ""
    return LoadError(
        f"{name}: the checkpoint does not hold {what}{others}; complete the checkpoint, or convert "
        "the model again from a complete one"
    )
