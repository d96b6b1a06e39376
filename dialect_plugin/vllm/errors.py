"""The error of a load that must not go on."""

from __future__ import annotations

__all__ = ["LoadError"]


class LoadError(ValueError):
    """Weights that cannot be loaded right; one sentence with tensor, reason and remedy."""
