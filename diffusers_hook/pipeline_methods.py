"""The three methods that diffusers' pipelines get."""

from __future__ import annotations

from typing import Any

from .config import SemanticDialectConfig
from .enabling import disable, enable, summary
from .model.report import Summary

__all__ = ["add_methods"]


def enable_semantic_dialect(
    self: Any, config: SemanticDialectConfig | None = None, **options: Any
) -> Any:
    """Quantize this pipeline's transformers, or components; see :func:`diffusers_hook.enable`."""
    return enable(self, config, **options)


def disable_semantic_dialect(self: Any) -> Any:
    """Restore the 16-bit layers; see :func:`diffusers_hook.disable`."""
    return disable(self)


def semantic_dialect_summary(self: Any) -> Summary:
    """What SemanticDialect did; see :func:`diffusers_hook.summary`."""
    return summary(self)


def add_methods() -> None:
    """Add the methods to `DiffusionPipeline`; again is harmless.

    Raises:
        RuntimeError: if one of the names is taken.
    """
    from diffusers import DiffusionPipeline

    for method in (enable_semantic_dialect, disable_semantic_dialect, semantic_dialect_summary):
        present = getattr(DiffusionPipeline, method.__name__, None)
        if present is None:
            setattr(DiffusionPipeline, method.__name__, method)
        elif present.__module__ != __name__:
            raise RuntimeError(
                f"DiffusionPipeline has a method {method.__name__} from {present.__module__} "
                "already; use diffusers_hook.enable(pipe) instead"
            )
