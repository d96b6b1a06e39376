"""Tables that a device computes with: made once for each device, and all of them known.

An engine may take the memory that a model was loaded into away and give it back with any contents
(vLLM's sleep mode does). What lies there has to be written again, and that needs to be found.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, cast
from weakref import WeakValueDictionary

import torch

__all__ = ["is_kept", "kept_tables", "tables_on"]

_MOST = 64
"""Tables of one kind that are kept."""

_P = ParamSpec("_P")
_kept: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()


def kept_tables(make: Callable[_P, torch.Tensor]) -> Callable[_P, torch.Tensor]:
    """`make`, which returns the same tensor for the same arguments, among them a device."""

    @lru_cache(maxsize=_MOST)
    def kept(*args: _P.args, **kwargs: _P.kwargs) -> torch.Tensor:
        with torch.inference_mode(False):  # whoever asks first, anyone may write it again
            table = make(*args, **kwargs)
        _kept[id(table)] = table
        return table

    return cast("Callable[_P, torch.Tensor]", kept)


def is_kept(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of the tables."""
    return _kept.get(id(tensor)) is tensor


def tables_on(device: torch.device) -> list[torch.Tensor]:
    """All tables on `device` that are still kept, in the order in which they were made."""
    return [table for table in list(_kept.values()) if table.device == device]
