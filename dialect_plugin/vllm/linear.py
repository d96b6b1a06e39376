"""vLLM's linear method for dialect weights, packed or quantized while loading."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)
from vllm.model_executor.utils import replace_parameter, set_weight_attrs
from vllm.platforms import current_platform

from dialect_kernels import PackedTensor, cpu, quantize
from dialect_kernels.backend import Decoded
from dialect_kernels.formatbook import ROTATION_GROUP
from dialect_kernels.ops import decode_ahead, linear, warm_up
from dialect_kernels.packed import STORED_FIELDS

from ..scheme import LayerFormat
from . import heap
from .errors import LoadError
from .parameters import MarksLoaded, checked, forget_loaded, held, hold_tables, loaded_shards
from .probes import WEIGHT, Orders

__all__ = ["DTYPES", "BlockDialectLinearMethod", "LinearSpec", "log_kernel"]

logger = init_logger("vllm.blockdialect")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of models, and of 16-bit weights."""
_KINDS: tuple[tuple[Any, dict[str, int]], ...] = (
    (PackedvLLMParameter, {"input_dim": 1, "packed_dim": 1, "packed_factor": 2}),
    (GroupQuantScaleParameter, {"input_dim": 1}),
    (ChannelQuantScaleParameter, {}),
)
"""How vLLM splits codes, meta and row exponents over fused layers and ranks."""
_DECODED = ("weight_decoded", "weight_decoded_scale")
"""Buffers of a layer that keeps its weight decoded."""
_KEPT = "_blockdialect_decoded"
"""Attribute of such a layer: the same tensors, which vLLM takes away while it reloads."""
_NOT_DECODED = (
    "keep_decoded has no effect on some layers: a CPU decodes in its caches, and 16-bit "
    "activations need bfloat16"
)
_PARAMETERS = {
    field.stored: (field, kind) for field, kind in zip(STORED_FIELDS, _KINDS, strict=True)
}


@dataclass(frozen=True)
class LinearSpec:
    """How one layer is quantized.

    Attributes:
        name: vLLM's name of the layer, for messages.
        serialized: whether the checkpoint holds packed weights.
        format: of its weight and of its activations.
        complete: whether every tensor must come from the checkpoint; False for load formats that
            fill parameters without their loaders, such as ``dummy``.
        keep_decoded: whether the layer is to keep its weight decoded, where a GPU can use that.
    """

    name: str
    serialized: bool
    format: LayerFormat
    complete: bool = True
    keep_decoded: bool = False

    def quantize(self, weight: torch.Tensor, name: str) -> PackedTensor:
        """Quantize a weight of the layer, [N, K], called `name` in messages.

        Raises:
            ValueError: if it holds NaN or Inf.
        """
        form = self.format
        return quantize(weight, form.formatbook, form.block_size, name=name, rotation=form.rotation)


@register_weight_loader_v2_supported_method
class BlockDialectLinearMethod(MarksLoaded, LinearMethodBase):
    """Creates, loads and applies the packed weight of a linear layer or an output projection.

    After loading, the layer holds ``weight_packed`` uint8 [N, K/2], ``weight_meta`` uint8
    [N, K/B] and ``weight_row_exponent`` int8 [N], N and K being this rank's share.

    Attributes:
        spec: how the layer is quantized.
        load: a context around the model's first load while it lasts, else None.
        input_size: columns of the whole layer, all ranks together.
    """

    # Online weights are created on the meta device and quantized as soon as their shards are in,
    # so that only one layer is held in 16 bit at a time.
    uses_meta_device: bool = True

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec
        self.uses_meta_device = not spec.serialized
        self.load: ExitStack | None = None
        self._orders: Orders = {}
        self._own_loader: Callable[..., Any] | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters that the checkpoint's tensors are loaded into.

        Raises:
            ValueError: if the dtype is not supported, or this rank's share of the columns is not a
                multiple of the block size.
        """
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        self._check(params_dtype, columns, input_size)
        self.dtype = params_dtype
        layer.logical_widths = output_partition_sizes
        self._loader = held(extra_weight_attrs.pop("weight_loader"))
        self._rows = self.whole_rows(layer, self._loader())
        self.input_size = input_size
        weight = self._weight(self._loader(), rows, columns)
        if self.spec.serialized:
            # no parameter: what a model that gives its weight a loader of its own finds meanwhile
            vars(layer)[WEIGHT] = weight
            self._own_loader = weight.weight_loader
        else:
            # float32 holds every 16-bit dtype, so that the packed bytes depend on the checkpoint
            # alone and not on --dtype; one layer at a time, it is small
            layer.register_parameter(WEIGHT, weight)
            set_weight_attrs(layer.weight, extra_weight_attrs)
            initialize_online_processing(layer)
            self._own_loader = layer.weight.weight_loader
            return
        sizes = (rows, columns, self.spec.format.block_size)
        for field in STORED_FIELDS:
            data = torch.zeros(field.shape(*sizes), dtype=field.dtype)
            layer.register_parameter(field.stored, self._stored(field.stored, data))

    def other_loader(self, layer: Any) -> Callable[..., Any] | None:
        """The loader that the model has given to the layer's weight after it was created, if any.

        A second call finds none.
        """
        own, self._own_loader = self._own_loader, None
        if own is None:
            return None
        found: Callable[..., Any] = layer.weight.weight_loader
        if self.spec.serialized:
            del vars(layer)[WEIGHT]
        return None if found is own else found

    def whole_rows(self, layer: Any, loader: Callable[..., Any]) -> dict[Hashable, int]:
        """Rows of the checkpoint's tensors by shard id; None stands for the whole layer.

        All ranks' rows, because vLLM's loaders cut this rank's out of them. Nothing is known of a
        loader of the model's own.
        """
        owner: object = getattr(loader, "__self__", None)
        if not isinstance(layer, LinearBase) or owner is not layer:
            return {}
        parts: dict[Hashable, int]
        if isinstance(layer, QKVParallelLinear):
            head, heads, shared = layer.head_size, layer.total_num_heads, layer.total_num_kv_heads
            of_value = getattr(layer, "v_head_size", head)
            parts = {"q": heads * head, "k": shared * head, "v": shared * of_value}
        else:
            parts = dict(enumerate(getattr(layer, "output_sizes", ())))
        if len(parts) < 2:
            return {None: layer.output_size}
        return {None: sum(parts.values()), **parts}

    def _weight(self, loader: Callable[..., Any], rows: int, columns: int) -> ModelWeightParameter:
        """A 16-bit weight without memory, which `loader` fills."""
        loader = checked(
            loader, self.spec.name, WEIGHT, self._rows, self.input_size, DTYPES, self._orders
        )
        data = torch.empty(rows, columns, dtype=torch.float32, device="meta")
        return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)

    def _stored(self, name: str, data: torch.Tensor) -> Parameter:
        """The parameter that a packed tensor of the checkpoint is loaded into; it shares `data`."""
        field, (kind, dimensions) = _PARAMETERS[name]
        # a checkpoint's tensor is as wide as the whole layer, whatever this rank's share is
        whole = field.shape(1, self.input_size, self.spec.format.block_size)
        width = whole[1] if len(whole) > 1 else None
        loader = checked(
            self._loader(), self.spec.name, name, self._rows, width, (field.dtype,), self._orders
        )
        made: Parameter = kind(data=data, output_dim=0, weight_loader=loader, **dimensions)
        return made

    @contextmanager
    def open(self, layer: Any, quantizes: bool) -> Iterator[None]:
        """Let a loader find parameters for the layer's packed tensors and for its 16-bit weight.

        Args:
            layer: the layer, with its packed tensors; they are overwritten in place.
            quantizes: whether 16-bit weights that arrive are quantized into them; else only probes
                may arrive.
        """
        plain = {field.stored: getattr(layer, field.stored) for field in STORED_FIELDS}
        codes = plain[STORED_FIELDS[0].stored]
        take = self._quantizing(layer) if quantizes else self._refusing()
        weight = self._weight(take, codes.shape[0], codes.shape[1] * 2)
        if quantizes:
            for name, parameter in plain.items():
                layer.register_parameter(name, self._stored(name, parameter.data))
        layer.register_parameter(WEIGHT, weight)
        if hasattr(layer, "update_param_tp_status"):
            layer.update_param_tp_status()
        try:
            yield
        finally:
            del layer.weight
            for name, parameter in plain.items():
                layer.register_parameter(name, parameter)

    def _quantizing(self, layer: Any) -> Callable[..., Any]:
        original = self._loader

        def take(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            packed = self.spec.quantize(loaded_weight, f"{self.spec.name}.{WEIGHT}")
            for name, tensor in packed.stored.items():
                original()(getattr(layer, name), tensor, *args, **kwargs)

        take.__signature__ = inspect.signature(original())  # type: ignore[attr-defined]
        return take

    def _refusing(self) -> Callable[..., Any]:
        def take(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            raise LoadError(
                f"{self.spec.name}.{WEIGHT}: the checkpoint holds a 16-bit weight of a layer that "
                "its quantization_config calls packed; convert the model again"
            )

        take.__signature__ = inspect.signature(self._loader())  # type: ignore[attr-defined]
        return take

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize a 16-bit weight, or check a packed one; a second call does nothing.

        Raises:
            ValueError: if a tensor is missing, a 16-bit weight holds NaN or Inf, or a packed one
                reserved values.
        """
        if self.is_loaded(layer):
            return
        self.other_loader(layer)  # of a layer that was loaded by itself
        log_kernel()
        if self.spec.complete:
            self.check_loaded(layer)
        for parameter in layer.parameters():
            forget_loaded(parameter)
        if self.spec.serialized:
            for field in STORED_FIELDS:
                replace_parameter(layer, field.stored, getattr(layer, field.stored).data)
            self._packed(layer).validate(self.spec.name, prefix="weight_")
        else:
            weight = layer.weight.data
            packed = self.spec.quantize(weight, f"{self.spec.name}.{WEIGHT}")
            del layer.weight, weight
            if packed.device.type == "cpu":
                heap.trim()
            for name, tensor in packed.stored.items():
                layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        self.decode(layer)
        self._warm_up(layer)
        hold_tables(layer)
        self.set_loaded(layer)
        if self.load is not None:  # blocks that share the layer bring its tensors again
            self.load.enter_context(self.open(layer, quantizes=True))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ weight.T + bias``, [..., K] -> [..., N] in x's dtype."""
        form = self.spec.format
        return linear(
            x,
            layer.weight_packed,
            layer.weight_meta,
            layer.weight_row_exponent,
            bias,
            layer.weight_packed.shape[1] * 2,
            form.book,
            form.block_size,
            form.activation_format,
            "default",
            form.rotation,
            *(getattr(layer, name, None) for name in _DECODED),
        )

    def decode(self, layer: Any) -> None:
        """Decode the packed weight, if the layer keeps it decoded; again into the same memory.

        CUDA graphs hold the memory, and a reload of vLLM puts new values of parameters alone into
        the old ones.
        """
        if not self.spec.keep_decoded:
            return
        old: Decoded | None = vars(layer).get(_KEPT)
        activation_format = self.spec.format.activation_format
        kept = decode_ahead(self._packed(layer), activation_format, self.dtype, old)
        if kept is None:
            logger.info_once(_NOT_DECODED)
            return
        vars(layer)[_KEPT] = kept
        for name, tensor in zip(_DECODED, kept, strict=True):
            layer.register_buffer(name, tensor, persistent=False)

    def _warm_up(self, layer: Any) -> None:
        """Compile a GPU's kernels now: nothing is compiled while serving, or in a CUDA graph."""
        bias = None if getattr(layer, "skip_bias_add", False) else getattr(layer, "bias", None)
        dtypes = {None if bias is None else self.dtype}
        if getattr(layer, "tp_rank", 0) > 0:
            dtypes.add(None)  # where ranks add up their parts, only the first adds the bias
        for bias_dtype in dtypes:
            warm_up(
                self._packed(layer),
                self.spec.format.activation_format,
                self.dtype,
                bias_dtype,
                vars(layer).get(_KEPT),
            )

    def check_loaded(self, layer: Any) -> None:
        """Raise LoadError if a tensor was not in the checkpoint: vLLM does not check this."""
        stored = [field.stored for field in STORED_FIELDS]
        for name in stored if self.spec.serialized else (WEIGHT,):
            loaded = loaded_shards(getattr(layer, name))
            if None in loaded or len(loaded) >= len(layer.logical_widths):
                continue
            remedy = (
                "convert the model again"
                if self.spec.serialized
                else "complete the checkpoint, or ignore the layer"
            )
            raise LoadError(
                f"{self.spec.name}.{name}: the checkpoint does not hold "
                f"{'all of its parts' if loaded else 'it'}; {remedy}"
            )

    def _packed(self, layer: Any) -> PackedTensor:
        return PackedTensor.from_stored(
            {field.stored: getattr(layer, field.stored).data for field in STORED_FIELDS},
            layer.weight_packed.shape[1] * 2,
            self.spec.format.formatbook,
            self.spec.format.block_size,
            self.spec.format.rotation,
        )

    def _check(self, dtype: torch.dtype, columns: int, all_columns: int) -> None:
        name, block_size = self.spec.name, self.spec.format.block_size
        if dtype not in DTYPES:
            raise ValueError(
                f"{name}: dtype {dtype} is not supported; use --dtype bfloat16, float16 or float32"
            )
        if columns % block_size:
            unit, key = f"the block size {block_size}", "block size"
        elif self.spec.format.rotation != "none" and columns % ROTATION_GROUP:
            unit = f"{ROTATION_GROUP}, which the rotation {self.spec.format.rotation} needs"
            key = "rotation"
        else:
            return
        if columns == all_columns:
            raise ValueError(
                f"{name}: its {columns} input columns are not a multiple of {unit}; override its "
                f"{key} or ignore the layer"
            )
        raise ValueError(
            f"{name}: {columns} of {all_columns} input columns per tensor-parallel rank are not a "
            f"multiple of {unit}; use another --tensor-parallel-size, or override the layer's "
            f"{key}"
        )


@cache
def log_kernel() -> None:
    """Say once what computes on the CPU."""
    if current_platform.is_cpu() and cpu.available():
        logger.info("blockdialect runs on the CPU with %s", cpu.describe())
