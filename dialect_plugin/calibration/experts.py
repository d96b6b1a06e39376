"""The products of single experts, while transformers runs those of a decoder layer as one module.

transformers lets a model's config name the function that runs such modules. Ours runs one expert
after the other, and shows what each is given and gives: the tokens that the router sends to it, for
gate and up, and what comes in front of down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from dialect_kernels.second_moments import SecondMoments

from ..experts import DOWN, GATE, UP, expert_of
from ..scheme import LayerFormat
from .moments import SharedInput

__all__ = [
    "ExpertInput",
    "collected",
    "expert_inputs",
    "held_rows",
    "in_groups",
    "matrix_in",
    "observed",
    "run_one_by_one",
]

_NAME = "blockdialect_one_by_one"
_NOTE = "_blockdialect_note"
"""The attribute of a module that receives the products of its experts, a :data:`_Note`."""
_GATHERED = 8
"""Tokens wait until there is one for so many columns: adding a few takes as long as adding many."""

_Note = Callable[[int, bool, torch.Tensor, torch.Tensor], None]
"""(expert, whether the matrix is down, its input [T, K], its output [T, N])."""


@dataclass(frozen=True)
class ExpertInput:
    """Matrices of one expert and one format that have one input: gate and up, or down.

    Attributes:
        prefix: name of the experts' module.
        number: of the expert.
        down: whether it is the input of down.
        layers: the names of the matrices.
        form: how all of them are quantized.
        columns: K.
    """

    prefix: str
    number: int
    down: bool
    layers: tuple[str, ...]
    form: LayerFormat
    columns: int

    @property
    def nbytes(self) -> int:
        """What its moments take, with the tokens that wait."""
        return SecondMoments.nbytes_of(self.columns) + 4 * self.columns**2 // _GATHERED


def expert_inputs(
    forms: Mapping[str, LayerFormat], columns: Callable[[str], int]
) -> list[ExpertInput]:
    """The inputs of experts.

    Args:
        forms: matrix of an expert -> how it is quantized.
        columns: matrix -> K.
    """
    layers: dict[tuple[str, int, bool, LayerFormat], list[str]] = {}
    for layer, form in forms.items():
        expert = expert_of(layer)
        if expert is not None:
            key = expert.prefix, expert.number, expert.part == DOWN, form
            layers.setdefault(key, []).append(layer)
    return [
        ExpertInput(prefix, number, down, tuple(names), form, columns(names[0]))
        for (prefix, number, down, form), names in layers.items()
    ]


def in_groups(inputs: Iterable[ExpertInput], limit: int) -> list[list[ExpertInput]]:
    """Inputs whose moments are collected together: in `limit` bytes, or one alone."""
    groups: list[list[ExpertInput]] = []
    left = 0
    for entry in inputs:
        if not groups or entry.nbytes > left:
            groups.append([])
            left = limit
        groups[-1].append(entry)
        left -= entry.nbytes
    return groups


def run_one_by_one(module: torch.nn.Module) -> bool:
    """Have transformers run a module of experts by our function.

    Returns:
        False if the module is not run by the function that its config names.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not isinstance(
        getattr(module, "has_gate", None), bool
    ):  # set where the function is looked up
        return False
    ALL_EXPERTS_FUNCTIONS.register(_NAME, _run)
    config: Any = module.config
    config._experts_implementation = _NAME
    return True


@contextmanager
def collected(
    modules: Mapping[str, torch.nn.Module], inputs: Sequence[ExpertInput]
) -> Iterator[list[SharedInput]]:
    """Collect the moments of `inputs` while their decoder layer runs.

    Args:
        modules: name of the experts' module -> the module, which is loaded.
        inputs: what to collect.

    Yields:
        A list that holds one entry for each of `inputs` when the ``with`` block has ended.
    """
    waiting: dict[tuple[str, int, bool], list[_Gathered]] = {}
    found: list[SharedInput] = []
    for entry in inputs:
        device = next(modules[entry.prefix].parameters()).device
        moments = SecondMoments(entry.columns, device)
        found.append(SharedInput(list(entry.layers), entry.form, moments))
        key = entry.prefix, entry.number, entry.down
        waiting.setdefault(key, []).append(_Gathered(found[-1]))

    def note(prefix: str, expert: int, down: bool, x: torch.Tensor, y: torch.Tensor) -> None:
        for gathered in waiting.get((prefix, expert, down), ()):
            gathered.add(x)

    prefixes = {entry.prefix for entry in inputs}
    with observed({prefix: modules[prefix] for prefix in prefixes}, note):
        yield found
        for gathered in (entry for places in waiting.values() for entry in places):
            gathered.flush()


@contextmanager
def observed(
    modules: Mapping[str, torch.nn.Module],
    note: Callable[[str, int, bool, torch.Tensor, torch.Tensor], None],
) -> Iterator[None]:
    """Have `note` called with every product of the experts of these modules.

    Args:
        modules: name of the experts' module -> the module.
        note: receives the name, and what a :data:`_Note` does.
    """
    for prefix, module in modules.items():
        setattr(module, _NOTE, partial(note, prefix))
    try:
        yield
    finally:
        for module in modules.values():
            delattr(module, _NOTE)


def held_rows(module: Any, number: int, down: bool) -> dict[str, slice]:
    """Part of an expert -> its rows in the matrix of a module that holds it.

    Args:
        module: of the experts, loaded.
        number: of the expert.
        down: whether the matrix is down; else it is that of gate and up, or of up alone.
    """
    if down or not module.has_gate:
        return {DOWN if down else UP: slice(None)}
    if not module.is_concatenated:  # gates and ups alternate
        return {GATE: slice(0, None, 2), UP: slice(1, None, 2)}
    rows = len(matrix_in(module, number, down)) // 2
    return {GATE: slice(0, rows), UP: slice(rows, None)}


def matrix_in(module: Any, number: int, down: bool) -> torch.Tensor:
    """The matrix of an expert in a module, [N, K]: down, or gate and up as they are held."""
    name = "down_proj" if down else _first(module)
    weight: torch.Tensor = getattr(module, name)[number]
    return weight.T if module.is_transposed else weight


class _Gathered:
    """Tokens on their way into moments."""

    def __init__(self, shared: SharedInput) -> None:
        self._shared, self._limit = shared, len(shared.moments) // _GATHERED
        self._tokens: list[torch.Tensor] = []
        self._count = 0

    def add(self, x: torch.Tensor) -> None:
        self._tokens.append(x.detach())
        self._count += len(x)
        if self._count >= self._limit:
            self.flush()

    def flush(self) -> None:
        if self._tokens:
            self._shared.add(torch.cat(self._tokens))
        self._tokens, self._count = [], 0


def _run(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts of a module of transformers, one after the other.

    Args:
        module: with the weights of all experts, and what lies between them.
        hidden_states: [tokens, H].
        top_k_index: the experts of each token, [tokens, k].
        top_k_weights: their weights, [tokens, k].

    Returns:
        [tokens, H].
    """
    note: _Note = getattr(module, _NOTE, lambda expert, down, x, y: None)
    output = torch.zeros_like(hidden_states)
    for expert in sorted(set(top_k_index.flatten().tolist())):
        if expert >= module.num_experts:  # transformers' mark of a token that no expert gets
            continue
        token, place = torch.where(top_k_index == expert)
        x = hidden_states[token]
        y = _product(module, expert, False, x)
        note(expert, False, x, y)
        x = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = _product(module, expert, True, x)
        note(expert, True, x, y)
        output.index_add_(0, token, y * top_k_weights[token, place, None])
    return output


def _first(module: Any) -> str:
    """What a module calls the matrices in front of the activation."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _product(module: Any, expert: int, down: bool, x: torch.Tensor) -> torch.Tensor:
    name = "down_proj" if down else _first(module)
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return linear(x, matrix_in(module, expert, down), bias)
