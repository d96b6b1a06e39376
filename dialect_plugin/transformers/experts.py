"""The routed experts of a packed model in transformers.

transformers has all experts of a decoder layer in one module, which holds two tensors for all of
them. Modules of the common interface (``use_experts_implementation``) say by flags how their rows
lie; Llama 4's has none, and is called otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dialect_kernels import PackedExperts, PackedTensor
from dialect_kernels.ops import grouped_linear
from dialect_kernels.packed import STORED_FIELDS
from dialect_kernels.straight_through import grouped_straight_through

from ..experts import DOWN, GATE, UP
from ..routing import Product, chosen_experts
from ..scheme import LayerFormat
from .linear import PackedModule, decoded

__all__ = ["DialectExperts", "ExpertsLayout", "ExpertsPlace", "joined", "parts_of", "stacked"]

_GATE_UP = "gate_up_proj"
_SORTED = "Llama4TextExperts"
"""Its input is every token for every expert, expert by expert, already weighted."""
_FLAGS = ("has_gate", "is_transposed", "is_concatenated", "has_bias")


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module of transformers holds the matrices of its experts.

    Attributes:
        gated: whether experts have gates, whose rows lie in one tensor with those of the ups.
        transposed: whether its tensors are [E, K, N].
        interleaved: whether the rows of gates and ups alternate.
        biased: whether there are biases.
    """

    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool

    @classmethod
    def of(cls, module: nn.Module) -> ExpertsLayout | None:
        """The layout of a module; None if it holds its experts in another way."""
        if type(module).__name__ == _SORTED:
            found = cls(gated=True, transposed=True, interleaved=False, biased=False)
        elif all(hasattr(module, flag) for flag in _FLAGS):
            gated, transposed, concatenated, biased = (getattr(module, flag) for flag in _FLAGS)
            found = cls(gated, transposed, gated and not concatenated, biased)
        else:
            return None
        held = {name for name, _ in module.named_parameters()}
        known = {*found.stacks, *found.biases}
        return found if held == known else None

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """Name of a tensor of all experts -> the parts it holds of each."""
        return {_GATE_UP: (GATE, UP), DOWN: (DOWN,)} if self.gated else {UP: (UP,), DOWN: (DOWN,)}

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of the biases [E, N]."""
        return tuple(f"{stack}_bias" for stack in self.stacks) if self.biased else ()

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view [E, N, K] of a tensor of all experts."""
        return tensor.transpose(1, 2) if self.transposed else tensor

    def parts(self, stack: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Part of an expert -> the view [E, I, ...] of its rows in those of a stack [E, N, ...]."""
        names = self.stacks[stack]
        alternate = self.interleaved and len(names) > 1
        return dict(zip(names, parts_of(rows, len(names), alternate), strict=True))

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The rows of a stack from those of its parts; see :func:`joined`."""
        return joined(parts, self.interleaved and len(parts) > 1)

    def matrices(self, module: nn.Module) -> Iterator[tuple[int, str, torch.Tensor]]:
        """(number of an expert, its part, the view [N, K] of its weight) for all of a module."""
        for stack in self.stacks:
            for part, rows in self.parts(stack, self.rows(getattr(module, stack).detach())).items():
                for number, weight in enumerate(rows):
                    yield number, part, weight


def parts_of(rows: torch.Tensor, count: int, interleaved: bool) -> Sequence[torch.Tensor]:
    """Views [E, I, ...] of the `count` parts in the rows of a stack [E, N, ...]."""
    if interleaved:
        return [rows[:, place::count] for place in range(count)]
    return rows.chunk(count, dim=1)


def joined(parts: Sequence[torch.Tensor], interleaved: bool) -> torch.Tensor:
    """The rows of a stack [E, N, ...] from those of its parts [E, I, ...]; a copy.

    Also the outputs [R, N] of a stack from those of its parts [R, I].
    """
    if interleaved:
        return torch.stack(tuple(parts), dim=2).flatten(1, 2)
    return torch.cat(tuple(parts), dim=1)


def stacked(layout: ExpertsLayout, parts: Sequence[Sequence[PackedTensor]]) -> PackedExperts:
    """The matrices of all experts as a module of that layout has them.

    Args:
        layout: of the module.
        parts: for each part of the stack, the packed weights [I, K] of all experts.
    """
    first = parts[0][0]
    stored = {
        field.stored: layout.join(
            [torch.stack([packed.stored[field.stored] for packed in part]) for part in parts]
        ).flatten(0, 1)
        for field in STORED_FIELDS
    }
    together = PackedTensor.from_stored(
        stored, first.shape[1], first.book, first.block_size, first.rotation
    )
    return PackedExperts(together, len(parts[0]))


@dataclass(frozen=True)
class ExpertsPlace:
    """Where transformers has the experts of a decoder layer.

    Attributes:
        path: of the module in the model.
        module: transformers' own.
        layout: of the module.
        count: how many experts it has.
    """

    path: str
    module: nn.Module
    layout: ExpertsLayout
    count: int

    @classmethod
    def of(cls, path: str, module: nn.Module) -> ExpertsPlace | None:
        """The place at a path; None if its module has another interface."""
        layout = ExpertsLayout.of(module)
        if layout is None:
            return None
        return cls(path, module, layout, len(module.get_parameter(DOWN)))

    def shape(self, stack: str) -> tuple[int, int, int]:
        """(E, N, K) of a tensor of all experts."""
        count, rows, columns = self.layout.rows(self.module.get_parameter(stack)).shape
        return count, rows, columns

    def run(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None,
        top_k_weights: torch.Tensor | None,
        before: Product,
        after: Product,
    ) -> torch.Tensor:
        """What the module computes, with other products than its own.

        Args:
            hidden_states: [T, H]; without numbers of experts, the tokens of one expert after those
                of another, as many for each, whose outputs are not added up.
            top_k_index, top_k_weights: [T, k].
            before, after: the products in front of the activation and behind it.
        """
        if top_k_index is None or top_k_weights is None:
            each = len(hidden_states) // self.count
            offsets = each * torch.arange(self.count + 1, device=hidden_states.device)
            return after(self._activation(before(hidden_states, None, offsets)), None, offsets)
        return chosen_experts(
            hidden_states,
            top_k_weights,
            top_k_index.long(),
            self.count,
            before,
            self._activation,
            after,
        )

    def _activation(self, x: torch.Tensor) -> torch.Tensor:
        """What lies between the products, [R, N] -> [R, I], in float32 and rounded once."""
        module: Any = self.module
        wide = x.float()
        if not self.layout.gated:
            y = module.act_fn(wide)
        elif hasattr(module, "_apply_gate"):
            y = module._apply_gate(wide)
        else:
            gate, up = wide.chunk(2, dim=-1)
            y = up * module.act_fn(gate)
        return y.to(x.dtype)


class _Stack(PackedModule):
    """The packed matrices [E, N, K] of all experts in front of the activation, or behind it."""

    def __init__(
        self, experts: PackedExperts, form: LayerFormat, accumulation: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.accumulation = accumulation
        names = (field.stored for field in STORED_FIELDS)
        self.hold(dict(zip(names, experts.tensors, strict=True)), form, dtype)

    @property
    def experts(self) -> PackedExperts:
        """The matrices; raises ValueError if their parts do not fit together."""
        return PackedExperts(self.packed, self.weight_packed.shape[0])

    def check(self, name: str) -> None:
        """As for one matrix; the sentence names the expert."""
        experts = self.experts
        try:
            experts.together.validate()
        except ValueError:
            for number, packed in enumerate(experts):
                packed.validate(f"{name} of expert {number}", prefix="weight_")
            raise

    def decode_expert(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """The decoded weight [N, K] of one expert, rotated back."""
        return decoded(self.experts[expert], dtype)

    def forward(
        self,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        rows: torch.Tensor | None,
        offsets: torch.Tensor,
    ) -> torch.Tensor:
        """Products of tokens with the experts they chose, as ``expert_linear`` defines them."""
        return grouped_straight_through(x, rows, offsets, bias, self)

    def product(
        self,
        x: torch.Tensor,
        rows: torch.Tensor | None,
        offsets: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """What :meth:`forward` computes, without its gradient."""
        form = self.format
        return grouped_linear(
            x,
            rows,
            offsets,
            self.weight_packed,
            self.weight_meta,
            self.weight_row_exponent,
            bias,
            self.weight_packed.shape[-1] * 2,
            form.book,
            form.block_size,
            form.activation_format,
            self.accumulation,
            form.rotation,
        )

    def extra_repr(self) -> str:
        """Sizes and format."""
        count, rows, half = self.weight_packed.shape
        form = ", ".join(f"{key}={value}" for key, value in self.format._asdict().items())
        return f"experts={count}, in_features={2 * half}, out_features={rows}, {form}"


class DialectExperts(nn.Module):
    """All routed experts of a decoder layer with packed weights, computed by vLLM's op.

    The activation between the two products is that of transformers' module, in float32, and what
    the experts add up to is summed in float32 and rounded once, as in vLLM. Gradients pass straight
    through the rounding of the activations, as in :class:`~.linear.DialectLinear`.

    Attributes:
        gate_up_proj (or up_proj), down_proj: the packed matrices [E, N, K], their rows in the order
            of transformers' module.
        gate_up_proj_bias (or up_proj_bias), down_proj_bias: where it has them, [E, N].
        num_experts: E.
    """

    _is_hf_initialized = True  # or transformers would write random numbers

    def __init__(
        self,
        place: ExpertsPlace,
        experts: Mapping[str, tuple[PackedExperts, LayerFormat]],
        accumulation: str,
        dtype: torch.dtype,
    ) -> None:
        """Packed experts in the place of transformers' own, whose biases they share.

        Args:
            place: of the experts in 16 bit.
            experts: name of a stack -> matrices and format.
            accumulation: ``"default"`` or ``"exact"``.
            dtype: what weights are decoded to.
        """
        super().__init__()
        self.num_experts = place.count
        self._accumulation, self._dtype = accumulation, dtype
        for name, (matrices, form) in experts.items():
            self.put(name, matrices, form)
        for name in place.layout.biases:
            self.register_parameter(name, place.module.get_parameter(name))
        kept = copy.copy(place.module)
        kept._parameters = {}
        self._place = replace(place, module=kept)

    @classmethod
    def empty(
        cls,
        place: ExpertsPlace,
        forms: Mapping[str, LayerFormat],
        accumulation: str,
        dtype: torch.dtype,
    ) -> DialectExperts:
        """Experts of the same shapes on the meta device, without contents.

        Args:
            place, accumulation, dtype: as for the class.
            forms: name of a stack -> format.
        """
        experts = {}
        for name, form in forms.items():
            count, rows, columns = place.shape(name)
            together = PackedTensor.empty(
                (count * rows, columns), form.formatbook, form.block_size, "meta", form.rotation
            )
            experts[name] = (PackedExperts(together, count), form)
        return cls(place, experts, accumulation, dtype)

    def put(self, stack: str, matrices: PackedExperts, form: LayerFormat) -> None:
        """Exchange the matrices of a stack."""
        new = _Stack(matrices, form, self._accumulation, self._dtype)
        self.add_module(stack, new.train(self.training))

    def is_empty(self, stack: str) -> bool:
        """Whether a stack has no contents."""
        return self.get_parameter(f"{stack}.{STORED_FIELDS[0].stored}").is_meta

    def decoded(self) -> nn.Module:
        """transformers' module with the decoded weights; it shares the biases."""
        plain, layout = copy.copy(self._place.module), self._place.layout
        plain._parameters = {
            name: nn.Parameter(layout.rows(stack.decode()).contiguous(), requires_grad=False)
            for name, stack in self.named_children()
            if isinstance(stack, _Stack)
        }
        plain._parameters |= self._parameters
        return plain.train(self.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum of the outputs of each token's experts; see :meth:`ExpertsPlace.run`."""
        before, after = (
            partial(self.get_submodule(stack), getattr(self, f"{stack}_bias", None))
            for stack in self._place.layout.stacks
        )
        return self._place.run(hidden_states, top_k_index, top_k_weights, before, after)
