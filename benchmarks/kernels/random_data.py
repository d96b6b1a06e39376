"""Random weights and tokens: neither speed nor the gates depend on where values come from."""

from __future__ import annotations

import torch

__all__ = ["random_tokens", "random_weight"]


def random_weight(features: int, columns: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Gaussian weights of standard deviation 0.02, float32 [features, columns]."""
    return _normal(features, columns, seed, device) * 0.02


def random_tokens(tokens: int, columns: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Gaussian activations of standard deviation 1, bfloat16 [tokens, columns]."""
    return _normal(tokens, columns, seed, device).to(torch.bfloat16)


def _normal(rows: int, columns: int, seed: int, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device=device)
