"""Where an engine's model has what the checkpoint calls otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .. import architectures

__all__ = ["Places"]


class Places:
    """Layers of one kind, of which a decoder layer usually has one.

    Args:
        layers: (place in the model, name to find it by, layer).
        engine_names: what the engine may call the checkpoint's module of a name.
    """

    def __init__(
        self,
        layers: Iterable[tuple[str, str, Any]],
        engine_names: Callable[[str], Iterable[str]],
    ) -> None:
        self._engine_names = engine_names
        self._layers: dict[str, Any] = {}
        self._by_block: dict[int, list[Any]] = {}
        self._known: dict[str, Any] = {}
        for place, name, layer in layers:
            self._layers.setdefault(name, layer)
            same = self._by_block.setdefault(architectures.block_of(place), [])
            if not any(layer is known for known in same):
                same.append(layer)

    def find(self, name: str) -> Any:
        """The layer that the checkpoint calls `name`; None if there is none.

        If the name is not known, the only layer of that decoder layer is meant.
        """
        if name not in self._known:
            names = self._engine_names(name)
            found = next((self._layers[n] for n in names if n in self._layers), None)
            if found is None:
                same = self._by_block.get(architectures.block_of(name), [])
                found = same[0] if len(same) == 1 else None
            self._known[name] = found
        return self._known[name]
