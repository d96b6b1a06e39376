"""Loaders of parameters: what they check, what they remember, and how they are wrapped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any
from weakref import WeakMethod

import torch
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from dialect_kernels.device_tables import tables_on

from . import probes
from .errors import LoadError

__all__ = [
    "MarksLoaded",
    "check_tensor",
    "checked",
    "counted_before",
    "forget_loaded",
    "held",
    "hold_tables",
    "loaded_shards",
    "mark_loaded",
    "shards_of",
    "wrapped_loaders",
]

_LOADED = "_blockdialect_loaded"
"""Attribute of a parameter: which of its shards have been loaded, a set of shard ids."""
_COUNTED = "_blockdialect_counted"
"""Attribute of a parameter on the meta device: which of its shards vLLM has counted."""

_TABLE = "_blockdialect_table_"
"""Of the names of buffers of a layer, a number behind it."""


def checked(
    loader: Callable[..., Any],
    layer: str,
    field: str,
    rows: Mapping[Hashable, int],
    width: int | None,
    dtypes: tuple[torch.dtype, ...],
    orders: probes.Orders,
) -> Callable[..., Any]:
    """`loader` with checks of the loaded tensor; it marks the parameter's shards as loaded.

    vLLM's loaders cut the part they need out of a tensor that is too high or too wide, and cast any
    dtype, so that a mislabelled checkpoint would give wrong weights silently.

    vLLM counts the elements that arrive for a layer on the meta device, and quantizes it when they
    are enough. A shard is counted once, even if blocks of the model share its layer and it arrives
    once for each of them.

    Args:
        loader: vLLM's loader; held weakly, because vLLM keeps loaders for a later reload and
            expects them not to keep the layer alive.
        layer: vLLM's name of the layer.
        field: name of the parameter in it.
        rows: rows of the checkpoint's tensor for each shard id that is known.
        width: columns of the checkpoint's tensor, or None.
        dtypes: allowed dtypes.
        orders: of the layer's packed tensors, where they need another one than they arrive in;
            probes write it.
    """
    original, name = held(loader), f"{layer}.{field}"

    def load(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shards = shards_of(original(), param, loaded_weight, *args, **kwargs)
        if probes.record(loaded_weight, field, layer, shards, orders):
            return None
        height = sum(rows[shard] for shard in shards) if rows.keys() >= set(shards) else None
        check_tensor(loaded_weight, name, height, width, dtypes)
        if param.is_meta and counted_before(param, shards):
            return None
        if (order := orders.get((field, shards))) is not None:
            loaded_weight = loaded_weight[order.to(loaded_weight.device)]
        result = original()(param, loaded_weight, *args, **kwargs)
        mark_loaded(param, shards)
        return result

    load.__signature__ = inspect.signature(loader)  # type: ignore[attr-defined]
    return load


def held(loader: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """A function that returns `loader` without keeping the layer alive whose method it is."""
    if inspect.ismethod(loader):
        method = WeakMethod(loader)

        def alive() -> Callable[..., Any]:
            found = method()
            assert found is not None, "the layer of a parameter's loader is gone"
            return found

        return alive
    return lambda: loader


@contextmanager
def wrapped_loaders(
    wrappers: Iterable[tuple[Any, Callable[[Callable[..., Any]], Callable[..., Any]]]],
) -> Iterator[None]:
    """Give parameters other loaders inside the ``with`` block.

    Args:
        wrappers: parameters, and for each the function that makes a loader of its own one. What
            vLLM has noted at a loader is noted at the new one too.
    """
    replaced = []
    try:
        for parameter, wrap in wrappers:
            own = getattr(parameter, "weight_loader", None)
            loader = own or default_weight_loader
            parameter.weight_loader = wraps(loader, assigned=())(wrap(loader))
            replaced.append((parameter, own))
        yield
    finally:
        for parameter, own in reversed(replaced):
            if own is None:
                del parameter.weight_loader
            else:
                parameter.weight_loader = own


def shards_of(loader: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Hashable, ...]:
    """The shard ids of a call of vLLM's `loader`; ``(None,)`` for a whole parameter.

    In a tensor of experts it is a pair: the shard id, and the expert's number or None for all.
    """
    bound = inspect.signature(loader).bind(*args, **kwargs)
    bound.apply_defaults()
    shard = next((v for k, v in bound.arguments.items() if k.endswith("shard_id")), None)
    expert = bound.arguments.get("expert_id")
    if expert is None:
        return shard if isinstance(shard, tuple) else (shard,)
    param, tensor = list(bound.arguments.values())[:2]
    return ((shard, None if tensor.dim() >= param.dim() else expert),)


class MarksLoaded:
    """A quantization method that notes at a layer whether its weights have been processed."""

    @staticmethod
    def is_loaded(layer: Any) -> bool:
        """Whether the layer holds weights that have been processed; vLLM has the same mark."""
        return bool(getattr(layer, "_already_called_process_weights_after_loading", False))

    @staticmethod
    def set_loaded(layer: Any) -> None:
        """Note that the layer holds processed weights: new ones, or old ones again."""
        layer._already_called_process_weights_after_loading = True


def hold_tables(layer: Any) -> None:
    """Make the tables that kernels read on the layer's device buffers of it, without copies.

    They were made while the model was loaded, so that vLLM's sleep mode of level 2 throws their
    contents away with the weights. It brings those of buffers back when it wakes up.
    """
    device = next(layer.parameters()).device
    for number, table in enumerate(tables_on(device)):
        layer.register_buffer(f"{_TABLE}{number}", table, persistent=False)


def mark_loaded(param: torch.Tensor, shards: Iterable[Hashable]) -> None:
    """Note that these shards have been loaded into `param`."""
    param.__dict__.setdefault(_LOADED, set()).update(shards)


def counted_before(param: torch.Tensor, shard: Hashable) -> bool:
    """Whether vLLM has counted a shard of a parameter on the meta device; it is from now on."""
    counted = param.__dict__.setdefault(_COUNTED, set())
    if shard in counted:
        return True
    counted.add(shard)
    return False


def loaded_shards(param: torch.Tensor) -> set[Hashable]:
    """The shards that have been loaded into `param`: ids of vLLM, or what its loader has noted."""
    shards: set[Hashable] = param.__dict__.get(_LOADED, set())
    return shards


def forget_loaded(param: torch.Tensor) -> None:
    """Forget them; a reload may mark the same sets again."""
    for mark in (_LOADED, _COUNTED):
        param.__dict__.get(mark, set()).clear()


def check_tensor(
    tensor: torch.Tensor,
    name: str,
    height: int | None,
    width: int | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raise LoadError unless a checkpoint's tensor has one of the `dtypes`, rows and columns.

    Args:
        tensor: what arrives.
        name: the parameter's, for messages.
        height, width: of the tensor, as far as they are known.
        dtypes: allowed dtypes.
    """
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise LoadError(
            f"{name}: the checkpoint holds {tensor.dtype}; it must be {allowed}: give "
            "the original 16-bit checkpoint, or convert it again"
        )
    if height is not None and tensor.dim() and tensor.shape[0] != height:
        raise LoadError(
            f"{name}: the checkpoint's tensor has {tensor.shape[0]} rows where the model needs "
            f"{height}; config.json belongs to another model: copy it and the weights again"
        )
    if width is not None and tensor.shape[-1] != width:
        raise LoadError(
            f"{name}: the checkpoint's tensor has {tensor.shape[-1]} columns where the "
            f"model and its quantization_config need {width}; correct the block size or "
            "convert the model again"
        )
