"""The weight of a quantized layer as a tensor that is decoded only where it is computed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["PackedWeight"]


class PackedWeight(torch.Tensor):
    """A read-only weight [N, K]: shape, dtype and device cost nothing, all else decodes it.

    PEFT reads these three of every weight some twenty times while it loads an adapter. What it
    would write into a decoded copy (to merge an adapter) would be lost with the copy, so writing
    is refused.
    """

    _decode: Callable[[], torch.Tensor]
    _remedy: str
    _is_hf_initialized = True  # or transformers would write random numbers
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        decode: Callable[[], torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        remedy: str,
    ) -> PackedWeight:
        """A weight of that shape, dtype and device that `decode` makes.

        `remedy` ends the sentence that refuses to write into it.
        """
        new = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        new._decode, new._remedy = decode, remedy
        return new

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation on the decoded weight.

        Raises:
            RuntimeError: if it would write into the weight.
        """
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            weight = args[0]
            shape = tuple(weight.shape)
            return cls(weight._decode, shape, weight.dtype, weight.device, weight._remedy)
        for number, argument in enumerate(func._schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            if argument.is_write:
                for leaf in tree_leaves(value):
                    if isinstance(leaf, cls):
                        leaf._refuse()
        args, kwargs = tree_map_only(cls, lambda weight: weight._decode(), (args, kwargs))
        return func(*args, **kwargs)

    @property
    def data(self) -> torch.Tensor:
        """The same weight."""
        return self.detach()

    @data.setter
    def data(self, value: object) -> None:
        self._refuse()

    def __setitem__(self, key: object, value: object) -> None:
        """Refuse: torch would write into a decoded copy."""
        self._refuse()

    def __repr__(self) -> str:  # type: ignore[override]
        """Shape, dtype and device; nothing is decoded."""
        shape = list(self.shape)
        return f"PackedWeight(shape={shape}, dtype={self.dtype}, device={self.device})"

    def _refuse(self) -> NoReturn:
        raise RuntimeError(f"the weight of a quantized layer cannot be written to; {self._remedy}")
