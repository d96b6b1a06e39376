"""Embeddings and output projections: packed matrices with a row for each token.

vLLM builds them in 16 bit, in many models without asking the quantization config. Once a model is
complete, those that the scheme names get the parameters of packed ones (:func:`settle_vocabulary`).
An output projection that is tied to the embeddings is replaced by them: one module then looks up
tokens and multiplies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from dialect_kernels.formatbook import LOWEST_EXPONENT
from dialect_kernels.ops import dequantize, embedding
from dialect_kernels.packed import STORED_FIELDS
from dialect_kernels.packed_weight import PackedWeight

from .. import architectures
from . import compat
from .linear import BlockDialectLinearMethod, LinearSpec
from .parameters import held
from .probes import WEIGHT

__all__ = ["ChoosesVocabulary", "settle_vocabulary"]

_CODES = STORED_FIELDS[0].stored
_HIDDEN = "_blockdialect_hides_weight"
"""Attribute of a layer while its ``weight`` is a parameter or nothing."""


class ChoosesVocabulary(Protocol):
    """What is needed of :class:`.config.BlockDialectConfig`, which stands above."""

    def embedding_spec(self, layer: Any, name: str, tied: bool) -> LinearSpec | None: ...

    def projection_spec(self, layer: Any, name: str, tied: bool) -> LinearSpec | None: ...


def settle_vocabulary(
    config: ChoosesVocabulary, model: torch.nn.Module, places: Mapping[str, torch.nn.Module]
) -> None:
    """Give the embeddings and output projections of a complete `model` their packed parameters.

    Args:
        config: says which, and how.
        model: before its first tensor is loaded.
        places: its modules by their names.

    Raises:
        SchemeError: if the scheme names an output projection that is tied to 16-bit embeddings.
    """
    plain = {
        place: layer
        for place, layer in places.items()
        if isinstance(layer, VocabParallelEmbedding)
        and isinstance(layer.quant_method, UnquantizedEmbeddingMethod)
    }
    heads = {place: layer for place, layer in plain.items() if isinstance(layer, ParallelLMHead)}
    for place, layer in plain.items():
        if place in heads or not architectures.is_embedding(place):
            continue
        tied = [name for name, head in heads.items() if head.weight is layer.weight]
        spec = config.embedding_spec(layer, place, bool(tied) or not heads)
        if spec is None:
            continue
        _build(layer, spec, projects=bool(tied) or not heads)
        for name in tied:
            _replace(model, heads.pop(name), layer)
    shared = [layer.weight for place, layer in plain.items() if WEIGHT in layer._parameters]
    for place, head in heads.items():
        tied_to_16_bit = sum(weight is head.weight for weight in shared) > 1
        spec = config.projection_spec(head, place, tied_to_16_bit)
        if spec is not None:
            _build(head, spec, projects=True)


class _VocabularyMethod(BlockDialectLinearMethod):
    """The linear method, and looking up the rows of tokens.

    Args:
        spec: how the matrix is quantized.
        projects: whether the model multiplies with it.
    """

    def __init__(self, spec: LinearSpec, projects: bool) -> None:
        super().__init__(spec)
        self._projects = projects

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """As the linear method; rows that vLLM adds to the vocabulary are zero rows."""
        rows = layer.shard_indices.num_org_elements
        kwargs["weight_loader"] = _with_zero_rows(kwargs["weight_loader"], rows)
        super().create_weights(layer, *args, **kwargs)
        kind: Any = type(layer)
        layer.__class__ = _showing_weight(kind)

    def whole_rows(self, layer: Any, loader: Callable[..., Any]) -> dict[Hashable, int]:
        """The checkpoint's rows: without those that vLLM adds."""
        return {None: layer.org_vocab_size}

    @contextmanager
    def open(self, layer: Any, quantizes: bool) -> Iterator[None]:
        """As the linear method."""
        with _hidden(layer), super().open(layer, quantizes):
            yield

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """The rows of the tokens `input_` [...], in the model's dtype, [..., K]."""
        form = self.spec.format
        rows: torch.Tensor = embedding(
            input_,
            layer.weight_packed,
            layer.weight_meta,
            layer.weight_row_exponent,
            layer.weight_packed.shape[1] * 2,
            form.book,
            form.block_size,
            self.dtype,
        )
        return rows

    def decoded(self, layer: Any) -> torch.Tensor:
        """The matrix [V, K] in the model's dtype, for what reads ``weight`` itself."""
        return dequantize(self._packed(layer), self.dtype)

    def _warm_up(self, layer: Any) -> None:
        if self._projects:
            super()._warm_up(layer)
        self.embedding(layer, torch.zeros(1, dtype=torch.int64, device=layer.weight_packed.device))


def _build(layer: Any, spec: LinearSpec, projects: bool) -> None:
    """Give a 16-bit layer, nothing of which is loaded yet, the parameters of a packed one."""
    dtype = layer.weight.dtype
    del layer.weight
    layer.use_fused_embedding = False  # vLLM's kernel reads 16-bit rows
    layer.quant_method = _VocabularyMethod(spec, projects)
    rows, columns = layer.num_embeddings_per_partition, layer.embedding_dim
    with compat.built_for_reload(layer):
        layer.quant_method.create_weights(
            layer,
            input_size_per_partition=columns,
            output_partition_sizes=[rows],
            input_size=columns,
            output_size=layer.num_embeddings_padded,
            params_dtype=dtype,
            weight_loader=layer.weight_loader,
        )
        if hasattr(layer, "update_param_tp_status"):
            layer.update_param_tp_status()
        layer.quant_method.other_loader(layer)


def _replace(model: torch.nn.Module, head: Any, embeddings: Any) -> None:
    """Let the embeddings be the output projection wherever the model holds `head`."""
    if not hasattr(embeddings, "bias"):
        embeddings.register_parameter("bias", head.bias)
    for module in model.modules():
        for name, child in module._modules.items():
            if child is head:
                module._modules[name] = embeddings


def _with_zero_rows(loader: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """`loader`, which fills rows from `rows` on with 0; zero rows have another row exponent."""
    original = held(loader)

    def load(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original()(param, loaded_weight, *args, **kwargs)
        if param.dtype == torch.int8:
            param.data[rows:] = LOWEST_EXPONENT
        return result

    load.__signature__ = inspect.signature(loader)  # type: ignore[attr-defined]
    return load


@cache
def _showing_weight(kind: Any) -> Any:
    """`kind`, whose ``weight`` is decoded where no parameter of that name is.

    LoRA asks it for dtype and device, and some models of vLLM for its numbers.
    """

    def get(layer: Any) -> torch.Tensor:
        for held_by in (layer._parameters, vars(layer)):
            if WEIGHT in held_by:
                found: torch.Tensor = held_by[WEIGHT]
                return found
        codes = layer._parameters.get(_CODES)
        if codes is None or codes.is_meta or getattr(layer, _HIDDEN, False):
            raise AttributeError(WEIGHT)
        method: _VocabularyMethod = layer.quant_method
        shape = (codes.shape[0], codes.shape[1] * 2)
        remedy = "push new weights with the model's load_weights"
        return PackedWeight(
            lambda: method.decoded(layer), shape, method.dtype, codes.device, remedy
        )

    def delete(layer: Any) -> None:
        """vLLM's reload deletes what it finds, and then makes the parameters again."""
        vars(layer).pop(WEIGHT, None)

    return type(kind.__name__, (kind,), {WEIGHT: property(get, fdel=delete)})


@contextmanager
def _hidden(layer: Any) -> Iterator[None]:
    """``weight`` is nothing but a parameter inside the block."""
    vars(layer)[_HIDDEN] = True
    try:
        yield
    finally:
        del vars(layer)[_HIDDEN]
