"""What lies between the two products of an expert, in plain torch.

vLLM's own ops exist on GPUs for all of these, on CPUs for some. They take stacks in which gate
and up alternate where the checkpoint's do (GPT-OSS); packed experts have them one above the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["Activation"]

_OAI_LIMIT, _OAI_ALPHA, _OAI_BETA = 7.0, 1.702, 1.0
"""Of GPT-OSS, whose config does not say them."""
_STEP_LIMIT = 7.0


class _Settings(NamedTuple):
    """Numbers of a model's config; None where it has none."""

    limit: float | None
    alpha: float | None
    beta: float | None
    situ_beta: float | None
    situ_linear_beta: float | None


def _silu(gate: torch.Tensor, up: torch.Tensor, of: _Settings) -> torch.Tensor:
    if of.limit is not None:
        gate, up = gate.clamp(max=of.limit), up.clamp(-of.limit, of.limit)
    return F.silu(gate) * up


def _gelu(gate: torch.Tensor, up: torch.Tensor, of: _Settings) -> torch.Tensor:
    return F.gelu(gate) * up


def _gelu_tanh(gate: torch.Tensor, up: torch.Tensor, of: _Settings) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _swiglu_oai(gate: torch.Tensor, up: torch.Tensor, of: _Settings) -> torch.Tensor:
    limit = _OAI_LIMIT if of.limit is None else of.limit
    alpha = _OAI_ALPHA if of.alpha is None else of.alpha
    beta = _OAI_BETA if of.beta is None else of.beta
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def _swiglu_clamped(gate: torch.Tensor, up: torch.Tensor, of: _Settings) -> torch.Tensor:
    plain = of._replace(
        alpha=1.0 if of.alpha is None else of.alpha, beta=0.0 if of.beta is None else of.beta
    )
    return _swiglu_oai(gate, up, plain)


def _swiglu_step(gate: torch.Tensor, up: torch.Tensor, of: _Settings) -> torch.Tensor:
    return F.silu(gate).clamp(max=_STEP_LIMIT) * up.clamp(-_STEP_LIMIT, _STEP_LIMIT)


def _situ(gate: torch.Tensor, up: torch.Tensor, of: _Settings) -> torch.Tensor:
    beta = 1.0 if of.situ_beta is None else of.situ_beta
    gate = beta * torch.tanh(gate / beta) * torch.sigmoid(gate)
    if of.situ_linear_beta is not None:
        up = of.situ_linear_beta * torch.tanh(up / of.situ_linear_beta)
    return gate * up


_GATED: dict[str, Callable[[torch.Tensor, torch.Tensor, _Settings], torch.Tensor]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "swigluoai": _swiglu_oai,
    "swigluoai_uninterleave": _swiglu_clamped,
    "swiglustep": _swiglu_step,
    "situ": _situ,
}
_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu_no_mul": F.silu,
    "gelu_no_mul": F.gelu,
    "gelu_tanh_no_mul": lambda x: F.gelu(x, approximate="tanh"),
    "relu2_no_mul": lambda x: F.relu(x).square(),
}
"""vLLM's names of activations, of experts with a gate and of those without."""


class Activation:
    """An activation of experts.

    Args:
        name: vLLM's name of it.
        moe_config: vLLM's config of the experts.

    Raises:
        KeyError: if there is none of this name.
    """

    def __init__(self, name: str, moe_config: Any) -> None:
        self._plain = _PLAIN.get(name)
        self._gated = _GATED[name] if self._plain is None else None
        self._settings = _Settings(
            getattr(moe_config, "swiglu_limit", None),
            getattr(moe_config, "swiglu_alpha", None),
            getattr(moe_config, "swiglu_beta", None),
            getattr(moe_config, "activation_situ_beta", None),
            getattr(moe_config, "activation_situ_linear_beta", None),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[R, 2 I], gates before ups, or without gates [R, I] -> [R, I] in x's dtype.

        Computed in float32 and rounded once.
        """
        wide = x.float()
        if self._gated is None:
            assert self._plain is not None
            return self._plain(wide).to(x.dtype)
        gate, up = wide.chunk(2, dim=-1)
        return self._gated(gate, up, self._settings).to(x.dtype)
