"""BlockDialect and SemanticDialect: 4-bit dialect formats, their reference and their kernels."""

from typing import TYPE_CHECKING, Any

from .formatbook import DIALECT_FP4, SEMANTIC_32

if TYPE_CHECKING:
    from .ops import (
        dialect_embedding,
        dialect_linear,
        expert_linear,
        quantize,
        semantic_linear,
    )
    from .packed import PackedTensor
    from .packed_experts import PackedExperts

__all__ = [
    "DIALECT_FP4",
    "SEMANTIC_32",
    "PackedExperts",
    "PackedTensor",
    "__version__",
    "dialect_embedding",
    "dialect_linear",
    "expert_linear",
    "quantize",
    "semantic_linear",
]

__version__ = "0.1.0"

if not TYPE_CHECKING:  # for mypy it would make every name of this package known

    def __getattr__(name: str) -> Any:
        """A name that needs torch: torch takes seconds, and tables and versions do without it."""
        if name == "PackedTensor":
            from . import packed as room
        elif name == "PackedExperts":
            from . import packed_experts as room
        elif name in {
            "dialect_embedding",
            "dialect_linear",
            "expert_linear",
            "quantize",
            "semantic_linear",
        }:
            from . import ops as room
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(room, name)
