"""Saving and loading quantized text encoders through transformers itself.

transformers finds a quantizer by the ``quant_method`` in a model's config.json, as diffusers does;
ours is in its tables once :mod:`diffusers_hook` has been imported.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from ..config import QUANT_METHOD, SemanticDialectConfig
from ..layers.quantized import QuantizedLinear
from .attach import attach, attached, detach
from .layer_choice import LayerChoice, choose_layers, put
from .loading import STORED, bytes_in_16_bit, check_layers, missing, own_memory
from .saved_mark import mark, unmark
from .text_encoder import encoder_defaults, encoder_layout, encoder_options

__all__ = ["EncoderQuantizer", "register"]


class EncoderQuantizer(HfQuantizer):
    """Quantizes an encoder while loading, loads packed ones, and lets transformers save them."""

    requires_calibration = False

    def __init__(self, quantization_config: SemanticDialectConfig, **kwargs: Any) -> None:
        """A quantizer for one model; transformers passes ``pre_quantized``."""
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: SemanticDialectConfig = quantization_config
        self._choice: LayerChoice
        self._expected: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._fault: ValueError | None = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        name, layout = type(model).__name__, encoder_layout(model)
        assert layout is not None
        config = self.quantization_config
        if not self.pre_quantized:
            own = {option: getattr(config, option) for option in config.model_fields_set}
            config = encoder_defaults(model, encoder_options(name, SemanticDialectConfig(), own))
        self.quantization_config, self._choice = choose_layers(
            model, config, layout, name, empty=True
        )
        if self.pre_quantized:
            for path in self._choice.layers:
                put(model, path, self._choice.empty_layer(path, self.quantization_config))
        self._expected = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is a 16-bit weight that becomes a quantized layer."""
        path, _, kind = param_name.rpartition(".")
        return kind == "weight" and path in self._choice.layers

    def get_quantize_ops(self) -> ConversionOps:
        """What quantizes such a weight."""
        return _Quantization(self)

    def pack(self, model: nn.Module, path: str, weight: torch.Tensor) -> None:
        """Quantize a weight into its place; a fault is kept for later.

        transformers would make a table of it.
        """
        if self._fault is not None:
            return
        layer = self._choice.layers[path]
        layer.weight = nn.Parameter(weight, requires_grad=False)
        try:
            put(model, path, self._choice.quantized_layer(path, self.quantization_config, path))
        except ValueError as error:
            self._fault = error
        layer.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._fault is not None:
            raise self._fault
        self._check_loaded(model)
        own_memory(model)
        config, layout = self.quantization_config, encoder_layout(model)
        assert layout is not None
        for path in self._choice.layers:
            layer: Any = model.get_submodule(path)
            layer.train(model.training).original_name = path
        mark(model, config, self)
        attach(model, config, layout, bytes_in_16_bit(model))
        return model

    def _check_loaded(self, model: Any) -> None:
        """Raise ValueError, naming the tensor, if one of a quantized layer is not valid.

        Tensors that were renamed while loading get the dtype of the model.
        """
        plan = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(model.config.dtype)]
        for name, parameter in model.named_parameters():
            packed = name.rpartition(".")[2] in STORED
            shape, dtype = self._expected.get(name, (parameter.shape, parameter.dtype))
            if packed and self.pre_quantized:
                if not getattr(parameter, "_is_hf_initialized", False):
                    raise missing(name)
                if (parameter.shape, parameter.dtype) != (shape, dtype):
                    raise ValueError(
                        f"{name}: is stored as {parameter.dtype} {list(parameter.shape)}, but must "
                        f"be {dtype} {list(shape)}; the file is damaged, quantize the 16-bit model "
                        "again"
                    )
            elif not packed and not any(re.search(pattern, name) for pattern in plan):
                parameter.data = parameter.data.to(dtype)
        for path in self._choice.layers:
            if not isinstance(model.get_submodule(path), QuantizedLinear):
                raise missing(f"{path}.weight")
        check_layers(model)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        # transformers gives the name of one that a saved config.json has
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if attached(model) is not None:
            detach(model)
        for path, layer in list(model.named_modules()):
            if isinstance(layer, QuantizedLinear):
                put(model, path, layer.decoded().to(wanted))
        config = self.quantization_config
        unmark(model)
        # transformers deletes them when this returns
        model.hf_quantizer, model.quantization_method = self, QUANT_METHOD
        model.config.quantization_config = config
        return model

    def is_serializable(self) -> bool:
        """The model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained: gradients pass straight through the rounding."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Blocks can be compiled."""
        return True


class _Quantization(ConversionOps):
    """Quantizes a weight that transformers has read."""

    def __init__(self, quantizer: EncoderQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Put the packed layer into the model; nothing is left to load."""
        value = next(iter(input_dict.values()))
        weight = value[0] if isinstance(value, list) else value
        self._quantizer.pack(model, full_layer_name.rpartition(".")[0], weight)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def register() -> None:
    """Put the quantizer into transformers' tables; again is harmless."""
    auto.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD.value, EncoderQuantizer)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD.value, SemanticDialectConfig)
