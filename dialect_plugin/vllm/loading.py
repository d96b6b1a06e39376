"""A model's load_weights, with all that vLLM does not check for quantized models.

===============  =================================================================================
first load       probes go before packed tensors (:mod:`.probes`); every parameter of the model
                 must have been loaded; exact names of the config must name layers
reload           vLLM's ``reload_weights``: 16-bit weights that arrive for packed layers are
                 quantized, and all old weights come back if it fails
push             ``load_weights`` of a running engine, packed or online: packed tensors are copied,
                 16-bit weights quantized, both into the weights that are in use; all old weights
                 come back if a call fails
===============  =================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from vllm.logger import init_logger

from dialect_kernels.packed import STORED_FIELDS

from .. import architectures
from ..scheme import Scheme
from . import compat
from .cache_means import without_means
from .completeness import check_complete, track_arrivals
from .errors import LoadError
from .expert_loading import expert_layers, without_experts
from .linear import DTYPES, BlockDialectLinearMethod
from .parameters import check_tensor, forget_loaded
from .probes import WEIGHT, Recorder
from .renaming import following_weights
from .settling import Decides, settle
from .undo import keeping_pushed, keeping_reloaded

__all__ = ["load"]

logger = init_logger("vllm.blockdialect")

Weights = Iterable[tuple[str, torch.Tensor]]
_STORED = tuple(field.stored for field in STORED_FIELDS)
_CODES = _STORED[0]
_TARGETS = "_blockdialect_targets"
"""Attribute of a model: its checkpoint's packed layers -> vLLM's layers, known after a load."""
_Layers = list[tuple[Any, BlockDialectLinearMethod]]
_active: list[torch.nn.Module] = []
"""The model whose load_weights runs: those of its parts run inside of it."""


class _Method(Protocol):
    """What a reload needs of the methods of linear layers and of experts."""

    def set_loaded(self, layer: Any) -> None: ...

    def check_loaded(self, layer: Any) -> None: ...


class _Config(Decides, Protocol):
    """What a load needs of :class:`.config.BlockDialectConfig`, which stands above."""

    scheme: Scheme
    complete: bool

    def fused_name(self, layer: str) -> str | None: ...

    def engine_names(self, name: str) -> list[str]: ...

    def chosen_by_name(self, layers: Iterable[str]) -> str: ...

    def check_names(
        self, tensors: Iterable[str], skipped: Callable[[str], bool] | None
    ) -> None: ...


def load(
    config: _Config,
    model: torch.nn.Module,
    weights: Weights,
    own: Callable[[Weights], Any],
) -> Any:
    """Run the model's `own` load_weights on `weights`.

    Raises:
        LoadError: if the checkpoint, the config and the model do not go together.
    """
    own = following_weights(model, own)
    if _active:
        return own(weights)
    if compat.is_expert_runner(model):  # of transformers' modules, which the model is built around
        return own(_of_runner(config, model, weights))
    layers = _layers(model)
    _active.append(model)
    weights = without_means(model, weights, config.engine_names)
    if compat.has_targets_vocabulary(model):
        weights = _without_vocabulary(weights)
    try:
        if compat.is_reloading(model):
            weights = without_experts(model, weights, config.fused_name, first=False)
            return _reload(config, model, layers, weights, own)
        loaded = any(method.is_loaded(layer) for layer, method in layers)
        weights = without_experts(model, weights, config.fused_name, first=not loaded)
        if loaded:
            return _push(config, model, layers, weights, own)
        if hasattr(model, _TARGETS):  # a model without a packed layer
            return own(weights)
        return _first(config, model, weights, own)
    finally:
        _active.pop()


def _of_runner(config: _Config, runner: Any, weights: Weights) -> Weights:
    """The tensors of one layer's experts, named from there, that are not loaded by this plugin."""
    loaded = any(method.is_loaded(layer) for layer, method in expert_layers(runner))
    first = not loaded and not compat.is_reloading(runner)
    return without_experts(runner, weights, config.fused_name, first, f"{runner.layer_name}.")


def _layers(model: torch.nn.Module) -> _Layers:
    return [
        (module, method)
        for module in model.modules()
        if isinstance(method := getattr(module, "quant_method", None), BlockDialectLinearMethod)
    ]


def _without_vocabulary(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` without packed embeddings and output projections."""
    for name, tensor in weights:
        layer, _, field = name.rpartition(".")
        if field not in _STORED or not architectures.is_vocabulary(layer):
            yield name, tensor


def _push(
    config: _Config,
    model: torch.nn.Module,
    layers: _Layers,
    weights: Weights,
    own: Callable[[Weights], Any],
) -> Any:
    targets = getattr(model, _TARGETS, {})
    by_name = {method.spec.name: method for _, method in layers}

    def columns(layer: str) -> int:
        method = by_name.get(targets.get(layer) or config.fused_name(layer) or "")
        if method is None:
            raise LoadError(
                f"{layer}: {_CODES} is missing beside the layer's other packed tensors; push all "
                "of them in one call"
            )
        return method.input_size

    recorder = Recorder()
    with ExitStack() as stack:
        for layer, method in layers:
            stack.enter_context(method.open(layer, quantizes=True))
        stack.enter_context(keeping_pushed(model))
        stack.enter_context(recorder)
        stack.enter_context(compat.no_warnings_of_probes())
        stack.enter_context(track_arrivals(model, recorder))
        loaded = own(_Stream(weights).with_probes(recorder, columns))
        recorder.check()
    for layer, method in layers:
        method.decode(layer)
    return loaded


def _first(
    config: _Config,
    model: torch.nn.Module,
    weights: Weights,
    own: Callable[[Weights], Any],
) -> Any:
    settle(config, model)
    layers = _layers(model)
    if patterns := config.chosen_by_name(method.spec.name for _, method in layers):
        logger.info(
            "blockdialect's table of architectures does not have this one, whose layers were "
            "chosen by their names: %s",
            patterns,
        )
    stream, recorder = _Stream(weights), Recorder()
    with ExitStack() as stack:
        for layer, method in layers:
            if method.spec.serialized:
                stack.enter_context(method.open(layer, quantizes=False))
            else:
                method.load = stack
                stack.callback(setattr, method, "load", None)
        stack.enter_context(recorder)
        stack.enter_context(compat.no_warnings_of_probes())
        arrived = stack.enter_context(track_arrivals(model, recorder))
        try:
            loaded = own(stream.with_probes(recorder) if config.scheme.serialized else stream)
        except LoadError:
            raise
        except Exception as error:
            layer, _, field = stream.last.rpartition(".")
            if field not in _STORED:
                raise
            raise LoadError(
                f"{layer}: vLLM's loader of this model does not take its packed tensors "
                f"({type(error).__name__}: {error}); convert the model again with this layer in "
                "16 bit (--ignore, --no-lm-head, --no-embeddings)"
            ) from error
    setattr(model, _TARGETS, recorder.check())
    if config.complete:
        check_complete(model, loaded, arrived, stream.names, draft=compat.is_draft(model))
    config.check_names(stream.names, getattr(model, "is_unused_checkpoint_weight", None))
    return loaded


def _reload(
    config: _Config,
    model: torch.nn.Module,
    layers: _Layers,
    weights: Weights,
    own: Callable[[Weights], Any],
) -> Any:
    every: list[tuple[Any, _Method]] = [*layers, *expert_layers(model)]
    for layer, _ in every:
        for parameter in layer.parameters():
            forget_loaded(parameter)  # of a reload that failed
    targets = getattr(model, _TARGETS, {})
    by_name = {method.spec.name: method for _, method in layers if method.spec.serialized}

    def quantized() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            layer, _, field = name.rpartition(".")
            method = by_name.get(targets.get(layer) or config.fused_name(layer) or "")
            if field != WEIGHT or method is None:
                yield name, tensor
                continue
            # packed, a width that a block rounds up to the right one would not be seen
            check_tensor(tensor, name, None, method.input_size, DTYPES)
            for stored, value in method.spec.quantize(tensor, name).stored.items():
                yield f"{layer}.{stored}", value

    try:
        with keeping_reloaded(model):
            loaded = own(quantized())
            for layer, method in every:
                if compat.is_partly_reloaded(layer):
                    method.check_loaded(layer)
    except BaseException:
        for layer, method in every:
            method.set_loaded(layer)
        raise
    return loaded


class _Stream:
    """A checkpoint's tensors, and the names of those that went by."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.names: set[str] = set()
        self.last = ""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            self.names.add(name)
            self.last = name
            yield name, tensor

    def with_probes(
        self, recorder: Recorder, columns_of: Callable[[str], int] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, each packed one behind its probe.

        The weight's probe needs the columns that the codes tell, so that what comes before the
        codes of a layer waits for them. Where they do not come, as in a part of a push,
        `columns_of` tells the columns of a layer.
        """
        waiting: dict[str, list[tuple[str, torch.Tensor]]] = {}
        known: set[str] = set()
        for name, tensor in self:
            layer, _, field = name.rpartition(".")
            if field not in _STORED:
                yield name, tensor
            elif field == _CODES and tensor.dim() == 2:
                known.add(layer)
                rows, columns = tensor.shape
                yield f"{layer}.{WEIGHT}", recorder.probe(layer, WEIGHT, (rows, columns * 2))
                yield from _probed(recorder, [*waiting.pop(layer, []), (name, tensor)])
            elif layer in known:
                yield from _probed(recorder, [(name, tensor)])
            else:  # a copy, because some iterators use their buffer again
                waiting.setdefault(layer, []).append((name, tensor.clone()))
        for layer, tensors in waiting.items():
            if columns_of is not None and tensors[0][1].dim():
                shape = tensors[0][1].shape[0], columns_of(layer)
                yield f"{layer}.{WEIGHT}", recorder.probe(layer, WEIGHT, shape)
            yield from _probed(recorder, tensors)


def _probed(
    recorder: Recorder, tensors: list[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        layer, _, field = name.rpartition(".")
        yield name, recorder.probe(layer, field, tuple(tensor.shape))
        recorder.check_layer(layer)
    yield from tensors
