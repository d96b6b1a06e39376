"""The embeddings of a packed model in transformers."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dialect_kernels import PackedTensor
from dialect_kernels.formatbook import book_by_name
from dialect_kernels.ops import embedding

from ..scheme import LayerFormat
from .linear import PackedModule

__all__ = ["DialectEmbedding"]


class DialectEmbedding(PackedModule, nn.Embedding):  # type: ignore[override] # weight is a property
    """A packed matrix of embeddings: rows in the model's dtype, rounded once, then scaled.

    It is an ``nn.Embedding``, because transformers and PEFT look for that class. It cannot be
    trained.
    """

    def __init__(
        self, packed: PackedTensor, plain: nn.Embedding, form: LayerFormat, dtype: torch.dtype
    ) -> None:
        """Packed embeddings [V, K] in the place of `plain`; rows are numbers of `dtype`."""
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.padding_idx = plain.padding_idx
        kept = copy.copy(plain)
        kept._parameters, kept._buffers = {}, {}
        vars(self)["_plain"] = kept  # not a child: it has nothing that is saved or moved
        self.scale: float | None = getattr(plain, "scalar_embed_scale", None)
        self.hold(packed.stored, form, dtype)

    @classmethod
    def empty(cls, layer: nn.Embedding, form: LayerFormat) -> DialectEmbedding:
        """Embeddings of the same shape on the meta device, without contents."""
        shape = (layer.num_embeddings, layer.embedding_dim)
        packed = PackedTensor.empty(shape, book_by_name(form.book), form.block_size, "meta")
        return cls(packed, layer, form, layer.weight.dtype)

    @staticmethod
    def can_replace(layer: nn.Module) -> bool:
        """Whether it computes what `layer` computes: rows, scaled at most as Gemma's are."""
        scaled = hasattr(layer, "scalar_embed_scale")
        return isinstance(layer, nn.Embedding) and (
            type(layer).forward is nn.Embedding.forward or scaled
        )

    def decoded(self) -> nn.Embedding:
        """Plain embeddings with the decoded matrix."""
        plain: nn.Embedding = copy.copy(vars(self)["_plain"])
        plain._parameters = {"weight": nn.Parameter(self.decode(), requires_grad=False)}
        if self.scale is not None:
            plain._buffers = {"embed_scale": torch.tensor(self.scale, device=plain.weight.device)}
        return plain.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows of the tokens `input` [...], [..., K]."""
        rows: torch.Tensor = embedding(
            input,
            self.weight_packed,
            self.weight_meta,
            self.weight_row_exponent,
            self.embedding_dim,
            self.format.book,
            self.format.block_size,
            self._decoded_dtype,
        )
        if self.scale is None:
            return rows
        return rows * torch.tensor(self.scale).to(rows)

    def extra_repr(self) -> str:
        """Sizes and format."""
        form = f"book={self.format.book}, block_size={self.format.block_size}"
        return f"{self.num_embeddings}, {self.embedding_dim}, {form}"
