"""Which steps of a generation are protected, and which step a call belongs to (ours).

A step is a noise level: calls of one noise level, one after the other, are of one step (guidance
branches; schedulers of second order, which repeat a timestep). Steps count from 0, in the order of
the scheduler's timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ..config import ConfigError, SemanticDialectConfig

__all__ = ["NO_PROTECTION", "Protection", "check_scheduler"]

_DETAIL = 0.05
"""Share of noise below which nothing is left that later steps could repair."""


@dataclass(frozen=True)
class Protection:
    """The protected steps of one generation.

    Attributes:
        steps: their numbers.
        step_of: step of each of the scheduler's timesteps; empty where they are not known.
        reason: what chose them, or why there are none, in a few words for the summary.
    """

    steps: frozenset[int] = frozenset()
    step_of: tuple[int, ...] = ()
    reason: str = ""

    @classmethod
    def of(cls, config: SemanticDialectConfig, scheduler: object) -> Protection:
        """The protected steps of a generation that begins.

        Reads the scheduler's timesteps: on a GPU it waits for them, once a generation.

        Args:
            config: the configuration in force.
            scheduler: of the generation's pipeline, its timesteps set; None where it is not known.

        Raises:
            ConfigError: if a step of the configuration is not one of the generation's, or if steps
                are to be chosen and the scheduler has no noise levels or is not known.
        """
        chosen = config.protected_steps
        if chosen == "none" or not config.protects:
            return NO_PROTECTION
        timesteps = getattr(scheduler, "timesteps", None)
        if chosen is None:
            return cls._by_default(scheduler, timesteps, config.protected_fraction)
        values = timesteps.tolist() if isinstance(timesteps, torch.Tensor) else []
        step_of = _numbered(values)
        if chosen == "auto":
            check_scheduler(scheduler)
            levels = _levels(scheduler, values, step_of)
            return cls(_decisive(levels, config.protected_fraction), step_of, "auto")
        count = max(step_of, default=-1) + 1
        if values and chosen and max(chosen) >= count:
            raise ConfigError(
                f"protected_steps: {max(chosen)} is not a step of this generation, whose {count} "
                f"steps are 0 to {count - 1}; give smaller numbers or 'auto'"
            )
        return cls(frozenset(chosen), step_of, "as given")

    @classmethod
    def _by_default(cls, scheduler: object, timesteps: object, fraction: float) -> Protection:
        """As ``"auto"``, or none, with the reason: that no step can be chosen, or one is too much.

        Waits for no timesteps of a generation that is too short.
        """
        if not isinstance(timesteps, torch.Tensor):
            return cls(reason="no scheduler with timesteps is known")
        enough = math.ceil(1 / fraction)
        values = timesteps.tolist() if len(timesteps) >= enough else []
        step_of = _numbered(values)
        if max(step_of, default=-1) + 1 < enough:
            return cls(reason=f"fewer than {enough} steps")
        try:
            check_scheduler(scheduler)
            levels = _levels(scheduler, values, step_of)
        except (AttributeError, TypeError, ValueError):  # whatever somebody's own scheduler holds
            return cls(reason=f"{type(scheduler).__name__} tells no noise levels")
        return cls(_decisive(levels, fraction), step_of, "by default")

    def step(self, index: int) -> int:
        """The step of a timestep, by its index among those of the scheduler."""
        return self.step_of[index] if 0 <= index < len(self.step_of) else index


NO_PROTECTION = Protection(reason="switched off")


def check_scheduler(scheduler: object) -> None:
    """Raise ConfigError unless steps can be chosen by the noise levels of a scheduler."""
    if scheduler is None:
        raise ConfigError(
            "protected_steps: 'auto' needs the scheduler of a pipeline, which is not known here; "
            "call pipe.enable_semantic_dialect(), or give the numbers of the steps"
        )
    if not any(hasattr(scheduler, name) for name in ("sigmas", "alphas_cumprod")):
        raise ConfigError(
            f"protected_steps: 'auto' needs a scheduler with sigmas or alphas_cumprod, which "
            f"{type(scheduler).__name__} does not have; give the numbers of the steps"
        )


def _numbered(values: Sequence[float]) -> tuple[int, ...]:
    """The step of each timestep: it rises where the value changes."""
    found = [0] if values else []
    for before, now in pairwise(values):
        found.append(found[-1] + (now != before))
    return tuple(found)


def _levels(scheduler: Any, values: Sequence[float], step_of: Sequence[int]) -> list[float]:
    """The share of noise in the sample, 0..1, at each step and after the last one.

    Flow matching: sigma, because ``x = (1 - sigma) * video + sigma * noise``. Others: sigma / (1 +
    sigma), the same share of the scaled sample ``video + sigma * noise``.

    Raises:
        ConfigError: if the scheduler has not as many sigmas as timesteps.
    """
    first = [step_of.index(step) for step in range(max(step_of, default=-1) + 1)]
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        kept = scheduler.alphas_cumprod.tolist()
        last = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        remaining = [kept[min(round(values[index]), len(kept) - 1)] for index in first]
        return [_share(math.sqrt(1 - a), math.sqrt(a)) for a in (*remaining, last)]
    found = torch.as_tensor(sigmas).tolist()
    if len(found) < len(values) or len(found) > 2 * len(values) + 1:
        raise ConfigError(
            f"protected_steps: 'auto' needs a sigma for each timestep, and "
            f"{type(scheduler).__name__} has {len(found)} for {len(values)}; give the numbers of "
            "the steps"
        )
    found = [found[index] for index in first] + [found[-1] if len(found) > len(values) else 0.0]
    if not _is_flow(scheduler, found):
        return [_share(sigma, 1.0) for sigma in found]
    rises = found[0] < found[-1]  # some families write the share of the video
    return [1 - sigma for sigma in found] if rises else found


def _share(noise: float, video: float) -> float:
    return noise / (noise + video)


def _is_flow(scheduler: Any, sigmas: Sequence[float]) -> bool:
    """Whether sigmas are shares of noise already."""
    if hasattr(scheduler, "alphas_cumprod"):
        return bool(scheduler.config.get("use_flow_sigmas"))
    return max(sigmas) <= 1


def _decisive(levels: Sequence[float], fraction: float) -> frozenset[int]:
    """The steps with the largest ``(noise before - noise after) / (noise after + 0.05)``.

    The change is what an error of the step's output is multiplied by; the noise that is left is
    what later steps take away, and with it a part of that error.

    Args:
        levels: the share of noise at each step and after the last one.
        fraction: share of the steps, rounded down; at least one step.
    """
    weights = [(before - after) / (after + _DETAIL) for before, after in pairwise(levels)]
    count = max(1, math.floor(fraction * len(weights)))
    return frozenset(sorted(range(len(weights)), key=weights.__getitem__)[-count:])
