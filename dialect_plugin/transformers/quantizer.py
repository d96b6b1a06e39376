"""The quantizer that transformers finds by the ``quant_method`` of a config.json.

===============  =================================================================================
packed           before loading, the linear layers, embeddings and experts that the checkpoint
                 stores packed become empty :class:`DialectLinear`, :class:`DialectEmbedding` and
                 :class:`DialectExperts`; transformers loads into them as into any other module
16 bit           the layers that the converter would choose are quantized one by one, each as soon
                 as its weight is read, and the experts of a decoder layer together
===============  =================================================================================

After loading, every tensor is checked: transformers fills what a checkpoint lacks at random, and
checks no shapes where there is a quantizer.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from dialect_kernels import quantize
from dialect_kernels.packed import STORED_FIELDS

from ..architectures import is_embedding
from ..cache_means import KEY_MEAN, VALUE_MEAN
from ..checkpoint.layer_choice import choose_layers
from ..checkpoint.options import ConvertOptions
from ..checkpoint.reader import (
    PACKED_SUFFIXES,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    open_packed,
)
from ..experts import DOWN, expert_of
from ..scheme import QUANT_METHOD, LayerFormat, SchemeError
from .config import BlockDialectConfig
from .embedding import DialectEmbedding
from .errors import AGAIN, ELSEWHERE, missing, wrong_shape
from .expert_stacks import ExpertsModule, conversions, find_experts
from .experts import DialectExperts
from .linear import DialectLinear, PackedModule
from .names import parameter_names

__all__ = ["BlockDialectQuantizer", "register"]

logger = logging.getLogger(__name__)

_MEANS = rf"\.({KEY_MEAN}|{VALUE_MEAN})$"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_SAME_PRODUCT = ("Linear", "FalconLinear")
"""Classes of linear layers whose output is ``input @ weight.T + bias``, and nothing else."""


class _Target(NamedTuple):
    """A layer that is quantized while loading."""

    stored: str
    """The checkpoint's name of the layer."""
    form: LayerFormat


class BlockDialectQuantizer(HfQuantizer):
    """Loads packed checkpoints, quantizes 16-bit ones while loading, lets transformers save both.

    Raises:
        SchemeError, CheckpointError: one sentence, if checkpoint, scheme and model do not go
            together.
    """

    requires_calibration = False
    pre_quantized: bool

    def __init__(self, quantization_config: BlockDialectConfig, **kwargs: Any) -> None:
        """A quantizer for one model; transformers passes ``pre_quantized``."""
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: BlockDialectConfig = quantization_config
        if quantization_config.scheme.serialized and not self.pre_quantized:
            raise SchemeError(
                "quantization_config: serialized is true, but the checkpoint's config.json has no "
                "quantization_config, so that its weights are not packed; leave serialized out"
            )
        self.pre_quantized = quantization_config.scheme.serialized
        self.fault: Exception | None = None
        self._targets: dict[str, _Target] = {}
        self._experts: dict[str, ExpertsModule] = {}
        self._conversions: list[Any] = []  # of packed experts
        self._plain_conversions: list[Any] = []  # of the model
        self._expected: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._stored_by: str | None = None
        self._model: weakref.ref[nn.Module] | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot be done while loading.

        Raises:
            SchemeError: if a `device_map` has weights quantized onto a disk.
        """
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in places and not self.pre_quantized:
            raise SchemeError(
                "device_map: it places layers on disk, which is not possible while they are "
                "quantized; load a packed checkpoint, or use another device_map"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if getattr(model.config, "distributed_config", None) is not None:
            raise SchemeError(
                "distributed_config: transformers cannot split packed layers over devices; leave "
                "it out, or serve the checkpoint with vLLM"
            )
        if not checkpoint_files:
            raise CheckpointError(
                "state_dict: packed weights are read from files only; give the directory of a "
                "checkpoint"
            )
        directory = Path(checkpoint_files[0]).parent
        checkpoint, formats = self._layers(directory)
        self._stored_by = checkpoint.architecture
        self._model = weakref.ref(model)
        # means for an engine's KV cache
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, _MEANS}
        accumulation = self.quantization_config.accumulation
        self._put_experts(model, checkpoint, formats)
        single = {stored: form for stored, form in formats.items() if expert_of(stored) is None}
        for stored, (name, layer) in _layers_of(model, checkpoint, single).items():
            form = formats[stored]
            if isinstance(layer, nn.Embedding):
                _pack_tied_projections(model, name, form, accumulation)
            if self.pre_quantized:
                model.set_submodule(name, _empty(layer, form, accumulation))
                continue
            self._targets[name] = _Target(stored, form)
            # transformers reads it in this dtype: the bytes depend on the checkpoint alone
            dtype = _DTYPES[checkpoint.tensors[f"{stored}.weight"].dtype]
            layer.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
        self._expected = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
        return model

    def _put_experts(
        self, model: Any, checkpoint: Checkpoint, formats: Mapping[str, LayerFormat]
    ) -> None:
        """Put empty packed experts into the model, or have the 16-bit ones quantized."""
        for module in find_experts(model, checkpoint, formats):
            self._experts[module.place.path] = module
            if self.pre_quantized:
                dtype = module.place.module.get_parameter(DOWN).dtype
                empty = module.empty(self.quantization_config.accumulation, dtype)
                model.set_submodule(module.place.path, empty)
            else:
                info = checkpoint.weights[f"{module.stored}.0.{DOWN}"]
                module.read_in(_DTYPES[info.dtype])

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """transformers' rules for this model, after those of packed experts."""
        self._conversions = conversions(self._experts.values())
        self._plain_conversions = weight_conversions
        return [*self._conversions, *weight_conversions]

    def _layers(self, directory: Path) -> tuple[Checkpoint, dict[str, LayerFormat]]:
        """The checkpoint, and how its layers are packed or have to be."""
        config = self.quantization_config
        if self.pre_quantized:
            packed = open_packed(directory)
            return packed.checkpoint, {name: config.scheme.layer(name) for name in packed.layers}
        checkpoint = _without_method(open_checkpoint(directory))
        options = ConvertOptions(scheme=config.scheme)
        choice = choose_layers(checkpoint, options)
        if choice.by_name:
            logger.info(
                "blockdialect's table of architectures does not have %s, whose layers were chosen "
                "by their names: %s",
                checkpoint.architecture,
                choice.by_name,
            )
        config.scheme = choice.scheme
        return checkpoint, choice.formats

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is a weight to quantize while loading."""
        layer, _, leaf = param_name.rpartition(".")
        if layer in self._experts:
            return leaf in self._experts[layer].place.layout.stacks
        return leaf == "weight" and layer in self._targets

    def get_quantize_ops(self) -> ConversionOps:
        """What quantizes such a weight."""
        return _Quantization(self)

    def pack(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        """Quantize the weight that a parameter `name` would be, and put it into the model.

        A fault is kept for later: transformers would make a table of it.
        """
        if self.fault is not None:
            return
        layer, _, leaf = name.rpartition(".")
        dtype = getattr(model, "dtype", weight.dtype)
        try:
            if layer in self._experts:
                self._pack_experts(model, layer, leaf, weight, dtype)
            else:
                self._pack_layer(model, layer, weight, dtype)
        except CheckpointError as error:
            self.fault = error
        except ValueError as error:
            self.fault = CheckpointError(str(error))

    def _pack_layer(
        self, model: nn.Module, name: str, weight: torch.Tensor, dtype: torch.dtype
    ) -> None:
        """Quantize `weight` [N, K] and put a packed layer in the place of the module `name`."""
        stored, form = self._targets[name]
        old: Any = model.get_submodule(name)
        if weight.shape != old.weight.shape:
            raise wrong_shape(f"{stored}.weight", weight.shape, old.weight.shape)
        packed = quantize(
            weight,
            form.formatbook,
            form.block_size,
            name=f"{stored}.weight",
            rotation=form.rotation,
        )
        accumulation = self.quantization_config.accumulation
        new: PackedModule = (
            DialectEmbedding(packed, old, form, dtype)
            if isinstance(old, nn.Embedding)
            else DialectLinear(packed, old.bias, form, accumulation, dtype)
        )
        model.set_submodule(name, new.train(old.training))

    def _pack_experts(
        self, model: nn.Module, path: str, stack: str, weight: torch.Tensor, dtype: torch.dtype
    ) -> None:
        """Quantize a tensor of all experts; the first of a layer puts packed ones in their place.

        transformers reads the other tensors of the layer after it, before it, or in between.
        """
        module, experts = self._experts[path], model.get_submodule(path)
        if not isinstance(experts, DialectExperts):
            new = module.empty(self.quantization_config.accumulation, dtype)
            model.set_submodule(path, new.train(experts.training))
            experts = new
        module.pack(stack, weight, experts)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.fault is not None:
            raise self.fault
        planned = _planned(model)
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:  # a disk holds it
                self._check(model, name, parameter)
                self._settle(name, parameter, planned)
        for name, layer in model.named_modules():
            if isinstance(layer, PackedModule) and not layer.weight_packed.is_meta:
                _check_packed(name, layer)
        for name, (stored, _) in self._targets.items():
            if not isinstance(model.get_submodule(name), PackedModule):
                raise missing(f"{stored}.weight")
        if not self.pre_quantized:
            self._check_experts(model)
        if self._conversions:
            # saving tries them from the last to the first
            others = [rule for rule in model._weight_conversions if rule not in self._conversions]
            model._weight_conversions = [*others, *self._conversions]
        self._targets, self._experts, self._expected = {}, {}, {}
        return model

    def _check_experts(self, model: Any) -> None:
        """Raise CheckpointError if experts to quantize were not in the checkpoint."""
        for path, module in self._experts.items():
            experts = model.get_submodule(path)
            for stack in module.place.layout.stacks:
                if not isinstance(experts, DialectExperts) or experts.is_empty(stack):
                    raise missing(f"{module.stored}.{stack}")

    def _check(self, model: Any, name: str, parameter: nn.Parameter) -> None:
        """Raise CheckpointError if a parameter was not in the checkpoint, or has another shape."""
        if name not in self._expected:
            return
        shape, _ = self._expected[name]
        if parameter.shape != shape:
            raise wrong_shape(name, parameter.shape, shape)
        if getattr(parameter, "_is_hf_initialized", False):
            return
        ignored = model._keys_to_ignore_on_load_missing or ()
        whole = type(model).__name__ == self._stored_by  # else it may have a new head
        if name.endswith(PACKED_SUFFIXES) or (
            whole and not any(re.search(pattern, name) for pattern in ignored)
        ):
            raise missing(name)

    def _settle(self, name: str, parameter: nn.Parameter, planned: re.Pattern[str] | None) -> None:
        """Give a parameter its dtype, and aligned memory.

        transformers leaves renamed tensors of a packed checkpoint in the dtype they are stored in,
        and all of them in the file's mapping; kernels round the same on aligned memory only.
        """
        packed = name.endswith(PACKED_SUFFIXES)
        if not packed and parameter.is_floating_point() and name in self._expected:
            in_full = planned is not None and planned.search(name)
            dtype = torch.float32 if in_full else self._expected[name][1]
            parameter.data = parameter.data.to(dtype)
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, DialectLinear | DialectEmbedding | DialectExperts):
                model.set_submodule(name, layer.decoded().to(dtype))
        if self._conversions:  # a checkpoint of packed experts had no use for the model's own
            model._weight_conversions = [
                rule
                for rule in self._plain_conversions
                if rule.was_used() or isinstance(rule, WeightConverter)
            ]
        if isinstance(model, PreTrainedModel):
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys()
            model.tie_weights()
        return model

    def is_serializable(self) -> bool:
        """Whether the model can be saved; transformers asks before it writes anything.

        Raises:
            CheckpointError: if no loader would find the tensors again.
        """
        model = None if self._model is None else self._model()
        if model is None:
            return True
        if getattr(model, "_hf_peft_config_loaded", False):
            return True  # transformers saves the adapter only
        for name, module in model.named_modules():
            if hasattr(module, "base_layer"):
                raise CheckpointError(
                    f"{name}: carries an adapter; save the adapter by itself and unload it before "
                    "saving the packed model"
                )
        if type(model).__name__ != self._stored_by:
            raise CheckpointError(
                f"{type(model).__name__}: is another class than {self._stored_by}, which the "
                "checkpoint's names of layers belong to; load the checkpoint as that class to save "
                "it"
            )
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Its ops can be traced."""
        return True


class _Quantization(ConversionOps):
    """Quantizes a weight that transformers has read."""

    def __init__(self, quantizer: BlockDialectQuantizer) -> None:
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
        self._quantizer.pack(model, full_layer_name, weight)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def register() -> None:
    """Put quantizer and config into transformers' tables; again is harmless."""
    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(BlockDialectConfig)
    auto.register_quantizer(QUANT_METHOD)(BlockDialectQuantizer)
    # the third table has no function: configs whose get_loading_attributes() are asked for
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (BlockDialectConfig,)


def _layers_of(
    model: Any, checkpoint: Checkpoint, formats: Mapping[str, LayerFormat]
) -> dict[str, tuple[str, nn.Linear | nn.Embedding]]:
    """Stored layer -> name and module that transformers has for it.

    Raises:
        CheckpointError: if it has none, or another one.
    """
    names = parameter_names(model, [f"{stored}.weight" for stored in formats])
    found = {}
    for stored in formats:
        weight = f"{stored}.weight"
        name = names.parameters[weight].removesuffix(".weight")
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            if stored == "lm_head":
                continue  # a model without output projection
            layer = None
        other = _other(model, stored, name, layer)
        if other is None and weight in names.converted:
            other = "a layer of other parts"
        if other is not None:
            raise CheckpointError(
                f"{stored}: is packed, but {type(model).__name__} of transformers has {other} in "
                f"its place; {ELSEWHERE}"
            )
        shape = _shape(checkpoint, stored)
        if shape != tuple(layer.weight.shape):
            raise wrong_shape(weight, shape, layer.weight.shape)
        found[stored] = (name, layer)
    return found


def _other(model: Any, stored: str, name: str, layer: Any) -> str | None:
    """What the module of a stored layer is if no packed one can take its place; else None."""
    tied = {key for pair in model.all_tied_weights_keys.items() for key in pair}
    shares = f"{name}.weight" in tied
    if layer is None:
        return "no such layer"
    if is_embedding(stored):
        projections = [model.get_submodule(key) for key in _tied_projections(model, name)]
        if not DialectEmbedding.can_replace(layer):
            return type(layer).__name__
        shares = shares and not (projections and all(map(_is_linear, projections)))
    elif not _is_linear(layer):
        return type(layer).__name__
    return "a layer that shares its weight with another" if shares else None


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and type(layer).__name__ in _SAME_PRODUCT


def _tied_projections(model: Any, name: str) -> list[str]:
    """The modules whose weight is that of the embeddings `name`."""
    pairs = model.all_tied_weights_keys.items()
    return [key.removesuffix(".weight") for key, source in pairs if source == f"{name}.weight"]


def _pack_tied_projections(model: Any, name: str, form: LayerFormat, accumulation: str) -> None:
    """Let packed layers stand where projections are tied to the embeddings `name`.

    transformers ties their packed tensors to those of the embeddings after loading.
    """
    for projection in _tied_projections(model, name):
        layer = model.get_submodule(projection)
        model.set_submodule(projection, DialectLinear.empty(layer, form, accumulation))
        del model.all_tied_weights_keys[f"{projection}.weight"]
        for field in STORED_FIELDS:
            key = f"{projection}.{field.stored}"
            model.all_tied_weights_keys[key] = f"{name}.{field.stored}"


def _empty(layer: nn.Linear | nn.Embedding, form: LayerFormat, accumulation: str) -> PackedModule:
    """An empty packed module of the same shape."""
    if isinstance(layer, nn.Embedding):
        return DialectEmbedding.empty(layer, form)
    return DialectLinear.empty(layer, form, accumulation)


def _shape(checkpoint: Checkpoint, stored: str) -> tuple[int, ...]:
    """Rows and columns of a stored layer, packed or not."""
    tensor = checkpoint.tensors.get(f"{stored}.weight")
    if tensor is not None:
        return tensor.shape
    codes = f"{stored}.{STORED_FIELDS[0].stored}"
    if codes not in checkpoint.tensors:
        raise missing(codes)
    *rows, columns = checkpoint.tensors[codes].shape
    return (*rows, columns * 2)


def _without_method(checkpoint: Checkpoint) -> Checkpoint:
    """A 16-bit checkpoint whose config.json says that it is quantized while loading, without it."""
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    return Checkpoint(
        checkpoint.path, config, checkpoint.shards, checkpoint.tensors, checkpoint.unheld
    )


def _planned(model: Any) -> re.Pattern[str] | None:
    """What matches the names of parameters that transformers keeps in float32."""
    plan = model._get_dtype_plan(model.config.dtype)
    return re.compile("|".join(p.replace("*", ".*") for p in plan)) if plan else None


def _check_packed(name: str, layer: PackedModule) -> None:
    try:
        layer.check(name)
    except ValueError as error:
        sentence = str(error)
        raise CheckpointError(
            sentence if sentence.startswith(name) else f"{name}: {sentence}; {AGAIN}"
        ) from None
