"""The golden vectors as a gate: code that does not reproduce them is not measured."""

from __future__ import annotations

from dialect_kernels.verify import verify

__all__ = ["golden_faults", "golden_gate"]


def golden_faults(*backends: str) -> list[str]:
    """One line for each golden vector that a back end does not reproduce.

    Args:
        backends: ``"cpu"``, ``"cuda"`` or ``"reference"``.
    """
    return [f"{r.backend}, {r.case}: {r.detail}" for r in verify(backends) if not r.passed]


def golden_gate() -> list[str]:
    """The gate of a benchmark that checks nothing else: the golden vectors on the CPU."""
    return golden_faults("cpu")
