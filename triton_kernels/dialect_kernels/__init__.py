"""BlockDialect and SemanticDialect: 4-bit dialect formats, their reference and their kernels."""

from .formatbook import DIALECT_FP4, SEMANTIC_32
from .ops import dialect_linear, quantize, semantic_linear
from .packed import PackedTensor

__all__ = [
    "DIALECT_FP4",
    "SEMANTIC_32",
    "PackedTensor",
    "__version__",
    "dialect_linear",
    "quantize",
    "semantic_linear",
]

__version__ = "0.1.0"
