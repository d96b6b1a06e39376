"""BlockDialect for transformers: packed checkpoints in ``from_pretrained``.

Importing this package adds the method ``blockdialect`` to transformers' tables of quantizers; then
``AutoModelForCausalLM.from_pretrained`` reads packed checkpoints, and quantizes 16-bit ones while
loading if it is given a :class:`BlockDialectConfig`. Without the import transformers warns about an
unknown quantization type and fills the layers with random numbers.
"""

from __future__ import annotations

try:
    from .config import BlockDialectConfig
    from .embedding import DialectEmbedding
    from .experts import DialectExperts
    from .linear import DialectLinear
    from .quantizer import register
except ImportError as error:
    raise ImportError(
        f"dialect_plugin.transformers: needs transformers 5.19 or newer ({error}); install it with "
        "pip install 'transformers>=5.19'"
    ) from error

__all__ = ["BlockDialectConfig", "DialectEmbedding", "DialectExperts", "DialectLinear"]

register()
