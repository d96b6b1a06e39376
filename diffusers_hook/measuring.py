"""What can be learned from the 16-bit model before it is quantized; nothing in it is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from dialect_kernels import PackedTensor
from dialect_kernels.formatbook import ActivationFormat

from .calibration.losses import FORMATS, Losses, measure
from .calibration.rounding import calibrated_weights, inputs_of
from .calibration.source import Calibration, calibration_of, generations
from .calibration.stored import write
from .config import ConfigError, SemanticDialectConfig
from .layouts import Layout
from .model.attach import attached
from .model.components import Components, chosen_components
from .model.jobs import Job, config_of, layout_of, prepare

__all__ = ["record", "report"]

_Prompts = Calibration | Sequence[str] | Callable[[], object]


def record(
    target: Any,
    folder: str | Path,
    prompts: _Prompts,
    *,
    layout: Layout | str | None = None,
    **options: Any,
) -> None:
    """Record what :func:`diffusers_hook.enable` needs to calibrate weights, once for all formats.

    Args:
        target: the 16-bit pipeline or transformer.
        folder: a new folder; it takes 2 bytes for each column of an input squared, for q, k and v
            of an attention together.
        prompts: as `calibrate` of :func:`diffusers_hook.enable`.
        layout: as there.
        **options: `ignore`, where layers are left out.

    Raises:
        ConfigError, LayoutError, RuntimeError, ValueError: as there.
    """
    calibration = calibration_of(prompts)
    generations(target, calibration)  # refuses what does not run
    jobs = _jobs(target, None, layout, None, options)
    write(Path(folder), inputs_of(target, jobs, calibration))


def report(
    target: Any,
    prompts: _Prompts,
    config: SemanticDialectConfig | None = None,
    *,
    formats: Sequence[ActivationFormat] = FORMATS,
    calibrate: _Prompts | str | Path | None = None,
    tokens: int = 256,
    layout: Layout | str | None = None,
    components: Components | None = None,
    **options: Any,
) -> Losses:
    """Measure what rounding would do to the output of each linear layer.

    The 16-bit model generates; each layer that would become 4 bit is computed in 4 bit beside it,
    on the inputs that it really has. Salient tokens, groups and protected steps are not part of it.

    Args:
        target: the 16-bit pipeline or transformer.
        prompts: what is generated, as `calibrate` of :func:`diffusers_hook.enable`.
        config: as there.
        formats: of activations: ``"dialect"`` (W4A4), ``"fp8"`` (W4A8), ``"none"`` (W4A16).
        calibrate: as there; the weights that are measured are calibrated then.
        tokens: most tokens of a call that are measured, evenly spread.
        layout, components: as there.
        **options: single options of the configuration.

    Returns:
        The losses, which print as a table; ``save(path)`` writes JSON.

    Raises:
        ConfigError, LayoutError, RuntimeError, ValueError: as there.
    """
    unknown = [form for form in formats if form not in get_args(ActivationFormat)]
    if unknown or not formats:
        raise ConfigError(f"formats: {list(formats)!r} cannot be used; allowed are {FORMATS}")
    if tokens < 1:
        raise ConfigError(f"tokens: {tokens}; it must be a number from 1 on")
    run = generations(target, calibration_of(prompts))
    jobs = _jobs(target, config, layout, components, options)
    calibrated: Mapping[str, PackedTensor] = {}
    if calibrate is not None:
        calibrated = calibrated_weights(target, jobs, calibration_of(calibrate), lambda: None)
    return measure(jobs, run, formats, tokens, calibrated)


def _jobs(
    target: Any,
    config: SemanticDialectConfig | None,
    layout: Layout | str | None,
    components: Components | None,
    options: Mapping[str, Any],
) -> list[Job]:
    """What would be quantized.

    Raises:
        RuntimeError: if a part is in 4 bit already.
    """
    known = layout_of(layout)
    parts = chosen_components(target, config_of(config, options), components, known)
    for name, (module, _) in parts.items():
        if attached(module) is not None:
            raise RuntimeError(f"{name}: is in 4 bit already; measure it before it is enabled")
    return [prepare(name, module, own, known) for name, (module, own) in parts.items()]
