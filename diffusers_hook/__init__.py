"""SemanticDialect for diffusers: ``pipe.enable_semantic_dialect()``.

Importing this package adds three methods to diffusers' pipelines and makes its quantizer known to
diffusers and transformers, so that saved models load; it replaces nothing.
"""

from __future__ import annotations

from diffusers.utils import is_transformers_available

from .calibration.losses import LayerLoss, Losses
from .calibration.source import Calibration
from .config import ConfigError, SemanticDialectConfig
from .enabling import disable, enable, summary
from .layouts import Blocks, Grid, Layout, LayoutError, Stream, register_layout
from .layouts.families import register_families
from .measuring import record, report
from .model.diffusers_quantizer import register
from .pipeline_methods import add_methods

__all__ = [
    "Blocks",
    "Calibration",
    "ConfigError",
    "Grid",
    "LayerLoss",
    "Layout",
    "LayoutError",
    "Losses",
    "SemanticDialectConfig",
    "Stream",
    "disable",
    "enable",
    "record",
    "register_layout",
    "report",
    "summary",
]

register_families()
add_methods()
register()
if is_transformers_available():  # else there are no text encoders
    from .model.transformers_quantizer import register as register_encoders

    register_encoders()
