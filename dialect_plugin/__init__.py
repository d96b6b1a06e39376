"""BlockDialect for vLLM: checkpoint conversion, command line and the vLLM plugin.

vLLM calls :func:`register` (entry point group ``vllm.general_plugins``) in each of its processes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint.reader import PackedCheckpoint

__all__ = ["open_packed", "register"]


def open_packed(path: str | Path) -> PackedCheckpoint:
    """Open the directory that ``blockdialect quantize`` has written.

    ``open_packed(path)["model.layers.0.mlp.down_proj"]`` is the packed weight of that layer, read
    from disk and checked.

    Args:
        path: the directory.

    Returns:
        A mapping of layer names to :class:`~dialect_kernels.PackedTensor`, with the attributes
        `layers` and `scheme`.

    Raises:
        CheckpointError: one sentence, if it is no packed checkpoint, or its files, layers and
            config.json do not fit together.
        SchemeError: if its quantization_config is not valid.
    """
    from .checkpoint.reader import open_packed as open_directory

    return open_directory(path)


def register() -> None:
    """Register the quantization methods with vLLM, and never raise.

    vLLM calls plugins without a guard, so that an exception here would stop every model in the
    environment. On a vLLM that this release does not know, one sentence is logged instead. The
    only effect on other models is :func:`.vllm.compat.permit_amx`, without which some of them die.
    """
    try:
        from .vllm import compat

        compat.permit_amx()

        from .vllm import config

        config.register_configs()
        compat.register_attention()
        if compat.has_open_cache_dtypes():
            from .vllm import gpu_attention

            gpu_attention.register_cache_dtype()
    except Exception as error:
        logging.getLogger("vllm.blockdialect").warning(
            "blockdialect is not available: this vLLM is outside the supported range 0.26 to 0.33 "
            "(%s: %s); other quantization methods are not affected",
            type(error).__name__,
            error,
        )
