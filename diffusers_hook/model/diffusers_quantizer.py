"""Saving and loading quantized transformers through diffusers itself.

diffusers finds a quantizer by the ``quant_method`` in a model's config.json. Ours is in its tables
once :mod:`diffusers_hook` has been imported; without the import, diffusers refuses the model
because it does not know the type.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from ..config import QUANT_METHOD, SemanticDialectConfig
from ..layers.quantized import QuantizedLinear
from ..layouts import Layout, LayoutError, generic_layout, layout_for
from .attach import attach, attached, detach
from .layer_choice import LayerChoice, choose_layers, put
from .loading import STORED, bytes_in_16_bit, check_layers, missing, own_memory
from .saved_mark import mark, unmark

__all__ = ["SemanticDialectQuantizer", "register"]

_log = logging.getLogger(__name__)


class SemanticDialectQuantizer(DiffusersQuantizer):
    """Quantizes while loading, loads what is quantized already, and lets diffusers save it."""

    requires_calibration = False
    # what the model's class keeps in float32 is float32 in an enabled model too
    use_keep_in_fp32_modules = True
    # several threads would build the same module from its weight and its bias
    supports_parallel_loading = False

    def __init__(self, quantization_config: SemanticDialectConfig, **kwargs: Any) -> None:
        """A quantizer for one model; diffusers passes ``pre_quantized``."""
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: SemanticDialectConfig = quantization_config
        self._choice: LayerChoice | None = None
        self.model: weakref.ref[nn.Module] | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a `device_map` that offloads layers.

        Raises:
            ValueError: if it does.
        """
        places = (
            {str(place) for place in device_map.values()} if isinstance(device_map, dict) else {}
        )
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"device_map: offloads layers ({', '.join(sorted(places))}), which cannot be done "
                "while loading; load without it and call pipe.enable_model_cpu_offload()"
            )

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check a file's packed tensors before a loader casts them.

        Raises:
            ValueError: naming the tensor, if one has another dtype than was saved.
        """
        for name, tensor in state_dict.items():
            dtype = STORED.get(name.rpartition(".")[2], tensor.dtype)
            if tensor.dtype != dtype:
                raise ValueError(
                    f"{name}: is stored as {tensor.dtype}, but must be {dtype}; the file is "
                    "damaged, quantize the 16-bit model again"
                )
        return state_dict

    def _process_model_before_weight_loading(
        self, model: nn.Module, state_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state_dict is not None:  # from_single_file does not say what the file holds
            self.pre_quantized = False
            if any(name.rpartition(".")[2] in STORED for name in state_dict):
                raise ValueError(
                    f"{type(model).__name__}: the file holds a quantized model, whose tensors "
                    "from_single_file renames; save it with save_pretrained and load it with "
                    "from_pretrained"
                )
        layout = _layout(model)
        name = type(model).__name__
        self.quantization_config, self._choice = choose_layers(
            model, self.quantization_config, layout, name, empty=True
        )
        if self.pre_quantized:
            for path in self._choice.layers:
                put(model, path, self._choice.empty_layer(path, self.quantization_config))

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """Whether a tensor of the checkpoint is a 16-bit weight that becomes a quantized layer."""
        path, _, kind = param_name.rpartition(".")
        assert self._choice is not None
        return not self.pre_quantized and kind == "weight" and path in self._choice.layers

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Quantize one weight of the checkpoint into its place; its bias may be there or not."""
        assert self._choice is not None
        path = param_name.rpartition(".")[0]
        layer = self._choice.layers[path]
        layer.weight = nn.Parameter(param_value.to(target_device), requires_grad=False)
        new = self._choice.quantized_layer(path, self.quantization_config, path)
        put(model, path, new)
        layer.weight = nn.Parameter(torch.empty_like(layer.weight, device="meta"))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        assert self._choice is not None
        _check_loaded(model)
        own_memory(model)
        mark(model, self.quantization_config, self)
        attach(model, self.quantization_config, _layout(model), bytes_in_16_bit(model))
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        if attached(model) is not None:
            detach(model)
        for path, layer in list(model.named_modules()):
            if isinstance(layer, QuantizedLinear):
                put(model, path, layer.decoded())
        quantizer = model.hf_quantizer
        unmark(model)
        model.hf_quantizer = quantizer  # diffusers deletes it when this returns
        return model

    @property
    def is_serializable(self) -> bool:
        """The model can be saved, whatever adapters it carries."""
        return True

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tensors that are saved, and no metadata.

        Those of adapters are left out, after a warning, and the layers inside them get their own
        names back: a loader would find neither again.
        """
        model = None if self.model is None else self.model()
        wrapped = [] if model is None else list(_inside_adapters(model))
        if not wrapped:
            return state_dict, {}
        _log.warning(
            "%s: is saved without its adapters; save them with save_lora_weights",
            type(model).__name__,
        )
        saved = {}
        for name, tensor in state_dict.items():
            for path, inner in wrapped:
                if name.startswith(f"{path}.{inner}."):
                    saved[f"{path}.{name.removeprefix(f'{path}.{inner}.')}"] = tensor
                    break
                if name.startswith(f"{path}."):
                    break
            else:
                saved[name] = tensor
        return saved, {}

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained: gradients pass straight through the rounding."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Blocks can be compiled."""
        return True


def register() -> None:
    """Put the quantizer into diffusers' tables; again is harmless."""
    auto.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD.value, SemanticDialectQuantizer)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD.value, SemanticDialectConfig)


def _inside_adapters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(Name of each adapter's module, what it calls the layer inside)."""
    for path, module in model.named_modules():
        for inner in ("base_layer", "original_module"):  # PEFT's own names
            if isinstance(getattr(module, inner, None), nn.Module):
                yield path, inner


def _layout(model: nn.Module) -> Layout:
    layout = layout_for(model) or generic_layout(model)
    if layout is None:
        raise LayoutError(
            f"{type(model).__name__}: has no known layout; load it in 16 bit and give it to "
            "diffusers_hook.enable() with one"
        )
    return layout


def _check_loaded(model: nn.Module) -> None:
    """Raise ValueError, naming the tensor, if one is missing or not valid."""
    for name, tensor in model.named_parameters():
        if tensor.device.type == "meta":
            raise missing(name)
    check_layers(model)
