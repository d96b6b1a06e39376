"""Where checkpoints keep the routed experts of a mixture: one rule for the converter and engines.

Whatever the tensors of a checkpoint are called, the matrices of expert e are the layers
``<prefix>.experts.{e}.gate_proj``, ``.up_proj`` and ``.down_proj``, [N, K] with K the axis that is
summed over:

==========================  ====================  ================================================
tensor                      shape                 models
==========================  ====================  ================================================
``experts.{e}.gate_proj``   [I, H]                most (``w1``, ``w3``, ``w2`` for gate, up, down:
                                                  Mixtral, MiniMax, LFM2)
``experts.gate_up_proj``    [E, 2 I, H]           gate above up
..                          [E, H, 2 I]           Llama 4, Qwen3-VL: transposed
..                          [E, H, 2 I]           GPT-OSS: transposed, gate and up by turns
``input_linear``            [E, 2 I, H]           Granite, beside the router
==========================  ====================  ================================================
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

__all__ = [
    "BIAS",
    "DOWN",
    "GATE",
    "PARTS",
    "UP",
    "WEIGHT",
    "Expert",
    "ExpertMatrix",
    "ExpertTensor",
    "Layout",
    "aliases",
    "expert_of",
    "is_bias",
    "layout_of",
    "leaves_of",
    "name_for_all",
    "names_of",
    "prefixes",
    "stacks",
]

GATE, UP, DOWN = PARTS = ("gate_proj", "up_proj", "down_proj")
"""The matrices of an expert; one without a gate has the last two."""
WEIGHT, BIAS = "weight", "bias"

_NUMBERED = {GATE: GATE, UP: UP, DOWN: DOWN, "w1": GATE, "w3": UP, "w2": DOWN}
_HELD: Mapping[str, tuple[str, ...]] = {
    **{leaf: (part,) for leaf, part in _NUMBERED.items()},
    "gate_up_proj": (GATE, UP),
}
"""Last word of a tensor's name -> the parts it holds, in their order."""

_EXPERT = re.compile(
    rf"(?P<prefix>(?:.+\.)?experts)\.(?P<number>\d+)\.(?P<leaf>{'|'.join(_NUMBERED)})"
)
_OF_ONE = re.compile(
    rf"(?P<prefix>(?:.+\.)?experts)\.(?P<number>\d+)\.(?P<leaf>{'|'.join(_HELD)})"
    r"\.(?P<field>weight(?:_packed|_meta|_row_exponent)?|bias)"
)
_OF_ALL = re.compile(
    r"(?P<prefix>(?:.+\.)?experts)\.(?P<leaf>gate_up_proj|gate_proj|up_proj|down_proj)"
    r"(?:[._](?P<field>weight|bias))?"
)
_GRANITE = re.compile(r"(?P<prefix>.+\.block_sparse_moe)\.(?P<leaf>input|output)_linear\.weight")
_OF_GRANITE = {"input": (GATE, UP), "output": (DOWN,)}

_TRANSPOSED = frozenset(
    {
        "GptOssForCausalLM",
        "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    }
)
"""Architectures whose tensors of all experts are [E, K, N]."""
_ONE_BY_ONE = frozenset(
    {
        "AXK1ForCausalLM",
        "AfmoeForCausalLM",
        "Cohere2MoeForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "ExaoneMoeForCausalLM",
        "FlexOlmoForCausalLM",
        "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "HYV3ForCausalLM",
        "HunYuanMoEV1ForCausalLM",
        "MellumForCausalLM",
        "MiMoV2FlashForCausalLM",
        "OlmoeForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)
_AS_W = frozenset({"Lfm2MoeForCausalLM", "MiniMaxM2ForCausalLM", "MixtralForCausalLM"})
"""Architectures whose tensors are of one expert each, called as ours or ``w1``, ``w3``, ``w2``."""
_INTERLEAVED = frozenset({"GptOssForCausalLM"})
"""Architectures whose gates and ups alternate in a tensor of all experts."""


class Expert(NamedTuple):
    """One matrix of one expert."""

    prefix: str
    """Name of the experts' module, such as ``model.layers.0.mlp.experts``."""
    number: int
    part: str
    """One of :data:`PARTS`."""


class Layout(NamedTuple):
    """How an architecture stores tensors of all experts."""

    transposed: bool
    interleaved: bool


def layout_of(architectures: Collection[str]) -> Layout:
    """The layout of the checkpoints of a model.

    Args:
        architectures: of its config.json.
    """
    names = set(architectures)
    return Layout(not names.isdisjoint(_TRANSPOSED), not names.isdisjoint(_INTERLEAVED))


def leaves_of(architecture: str) -> Mapping[str, str] | None:
    """Part of an expert -> what a 16-bit checkpoint calls it; None if not known to be one by one.

    Args:
        architecture: of a config.json.
    """
    if architecture in _AS_W:
        return dict(zip(PARTS, ("w1", "w3", "w2"), strict=True))
    return dict(zip(PARTS, PARTS, strict=True)) if architecture in _ONE_BY_ONE else None


def expert_of(layer: str) -> Expert | None:
    """The expert that a layer's name means; None if the layer is no routed expert's."""
    found = _EXPERT.fullmatch(layer)
    if found is None:
        return None
    return Expert(found["prefix"], int(found["number"]), _NUMBERED[found["leaf"]])


def names_of(layer: str) -> tuple[str, ...]:
    """The names by which options name a layer, its own one first.

    ``mlp.experts.3.up_proj`` is also meant by ``mlp.experts.up_proj`` and by ``mlp.experts``.
    """
    found = _EXPERT.fullmatch(layer)
    if found is None:
        return (layer,)
    return layer, f"{found['prefix']}.{found['leaf']}", found["prefix"]


def name_for_all(layer: str) -> str:
    """A layer's name; of an expert's matrix the name for those of all experts of the layer."""
    own, *others = names_of(layer)
    return others[0] if others else own


def is_bias(name: str) -> bool:
    """Whether a tensor holds biases of routed experts."""
    held = ExpertTensor.of(name)
    return held is not None and held.field == BIAS


def aliases(part: str) -> tuple[str, ...]:
    """What models call a part of an expert."""
    return tuple(leaf for leaf, own in _NUMBERED.items() if own == part)


@dataclass(frozen=True)
class ExpertMatrix:
    """Where the matrix of an expert, or its bias, lies in a tensor.

    Attributes:
        expert: whose it is.
        number: its place in the first dimension of a tensor of all experts; None if the tensor is
            one expert's.
        first, step: its first row, and the step to the next one.
        rows, columns: its shape [N, K]; a bias has one column.
        own: shape of the part of the tensor that is this expert's.
        transposed: whether that is [K, N].
    """

    expert: Expert
    number: int | None
    first: int
    step: int
    rows: int
    columns: int
    own: tuple[int, ...]
    transposed: bool

    @property
    def layer(self) -> str:
        """The name of the layer."""
        return f"{self.expert.prefix}.{self.expert.number}.{self.expert.part}"

    @property
    def scattered(self) -> bool:
        """Whether its rows do not follow each other in the file."""
        return self.transposed or self.step > 1

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of the matrix, [N, K] or [N], in its tensor."""
        return self.cut_own(tensor if self.number is None else tensor[self.number])

    def cut_own(self, tensor: torch.Tensor) -> torch.Tensor:
        """As :meth:`cut`, from the part of the tensor that is this expert's."""
        own = tensor.T if self.transposed else tensor
        return own[self.first : self.first + self.rows * self.step : self.step]


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor of a checkpoint that holds matrices, or biases, of experts.

    Attributes:
        prefix: name of the experts' module.
        number: of the expert; None if the tensor holds all of them.
        parts: what it holds of each.
        field: what it is to the layer: ``"weight"``, ``"bias"``, or a tensor of a packed weight.
    """

    prefix: str
    number: int | None
    parts: tuple[str, ...]
    field: str

    @classmethod
    def of(cls, name: str) -> ExpertTensor | None:
        """What a tensor's name says; None if it is no tensor of routed experts."""
        if (found := _OF_ONE.fullmatch(name)) is not None:
            parts = _HELD[found["leaf"]]
            return cls(found["prefix"], int(found["number"]), parts, found["field"])
        if (found := _OF_ALL.fullmatch(name)) is not None:
            return cls(found["prefix"], None, _HELD[found["leaf"]], found["field"] or WEIGHT)
        if (found := _GRANITE.fullmatch(name)) is not None:
            return cls(f"{found['prefix']}.experts", None, _OF_GRANITE[found["leaf"]], WEIGHT)
        return None

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape can be it."""
        dimensions = (1 if self.field == BIAS else 2) + (self.number is None)
        return len(shape) == dimensions

    def matrices(self, shape: Sequence[int], layout: Layout) -> Iterator[ExpertMatrix]:
        """The matrices in a tensor of this shape, which :meth:`fits`."""
        own = tuple(shape if self.number is not None else shape[1:])
        of_all = self.number is None
        transposed = layout.transposed and of_all and len(own) == 2
        rows, columns = (*own, 1)[:2] if not transposed else own[::-1]
        each = rows // len(self.parts)
        by_turns = layout.interleaved and of_all
        for number in range(shape[0]) if self.number is None else (self.number,):
            for place, part in enumerate(self.parts):
                yield ExpertMatrix(
                    Expert(self.prefix, number, part),
                    number if of_all else None,
                    place if by_turns else place * each,
                    len(self.parts) if by_turns else 1,
                    each,
                    columns,
                    own,
                    transposed,
                )


def prefixes(layers: Iterable[str]) -> dict[str, list[str]]:
    """Experts' modules -> those of `layers` that are theirs, both in their order."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        expert = expert_of(layer)
        if expert is not None:
            found.setdefault(expert.prefix, []).append(layer)
    return found


def stacks(layers: Iterable[str]) -> dict[str, list[str]]:
    """Name for all -> the matrices of all experts that it means; a layer that is none by itself."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(name_for_all(layer), []).append(layer)
    return found
