"""vLLM's method for the routed experts of a mixture, packed or quantized while loading.

What a layer holds, E being this rank's experts and N and K its share of each:

=====================  ============  ==========================================
``w13_weight_packed``  uint8         [E, N, K/2], gates before ups
``w13_weight_meta``    uint8         [E, N, K/B]
``w13_weight_row_exponent``  int8    [E, N]
``w2_weight_...``                    the same of the projections down
``w13_bias``, ``w2_bias``            [E, N], where the model has them
=====================  ============  ==========================================

A 16-bit weight is quantized when it arrives, matrix by matrix: no layer is ever held in 16 bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from dialect_kernels import PackedExperts, PackedTensor, quantize
from dialect_kernels.formatbook import ROTATION_GROUP
from dialect_kernels.ops import grouped_linear, warm_up_experts
from dialect_kernels.packed import STORED_FIELDS

from ..experts import BIAS, DOWN, GATE, PARTS, UP, WEIGHT, Expert, layout_of
from ..routing import chosen_experts
from ..scheme import LayerFormat, SchemeError
from . import compat, heap
from .activations import Activation
from .errors import LoadError
from .linear import DTYPES, log_kernel
from .parameters import (
    MarksLoaded,
    check_tensor,
    counted_before,
    forget_loaded,
    hold_tables,
    loaded_shards,
    mark_loaded,
)

__all__ = ["EXPERT_PARAMETERS", "BlockDialectExpertsMethod", "ExpertsSpec"]

_GATE_UP, _DOWN = "w13", "w2"
"""vLLM's names of the two stacks of matrices."""
EXPERT_PARAMETERS = (f"{_GATE_UP}_", f"{_DOWN}_")
"""What the names of the parameters begin with that are filled by this plugin."""
_STACK = {GATE: _GATE_UP, UP: _GATE_UP, DOWN: _DOWN}
_FIELDS = {field.stored: field for field in STORED_FIELDS}
_CODES, _META, _ROW_EXPONENT = _FIELDS


@dataclass(frozen=True)
class ExpertsSpec:
    """How the experts of a layer are quantized.

    Attributes:
        name: vLLM's name of the experts' module, for messages.
        serialized: whether the checkpoint holds packed weights.
        gate_up, down: formats of the two stacks of weights and of their activations.
        complete: whether every tensor must come from the checkpoint; False for load formats that
            fill parameters without their loaders, such as ``dummy``.
    """

    name: str
    serialized: bool
    gate_up: LayerFormat
    down: LayerFormat
    complete: bool = True

    def format(self, part: str) -> LayerFormat:
        """The format of a part of an expert."""
        return self.down if part == DOWN else self.gate_up


class BlockDialectExpertsMethod(MarksLoaded, FusedMoEMethodBase):
    """Creates, loads and applies the packed weights of a layer's routed experts.

    Attributes:
        spec: how they are quantized.
        layout: of the checkpoint's tensors of all experts.
    """

    def __init__(self, spec: ExpertsSpec, layer: Any) -> None:
        super().__init__(layer.moe_config)
        self.spec = spec
        self.layout = layout_of(compat.current_architectures())
        self._gated = compat.has_gated_experts(layer)
        self._parts = PARTS if self._gated else PARTS[1:]
        self._refuse()
        self._act = self._activation(layer)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters that the checkpoint's tensors are loaded into.

        Raises:
            ValueError: if the dtype is not supported, or this rank's share of the columns is not a
                multiple of the block size.
        """
        self._hidden, self._inner = hidden_size, intermediate_size_per_partition
        if extra_weight_attrs.get("unpadded_hidden_size", hidden_size) != hidden_size:
            raise SchemeError(
                f"--all2all-backend: it pads the tokens for {self.spec.name}, which packed experts "
                f"cannot have; use another one, or ignore {self.spec.name}"
            )
        self._dtype = params_dtype
        if params_dtype not in DTYPES:
            raise ValueError(
                f"{self.spec.name}: dtype {params_dtype} is not supported; use --dtype bfloat16, "
                "float16 or float32"
            )
        for part in (UP, DOWN):
            self._check_columns(part)
            rows = self._rows(part) * (2 if part == UP and self._gated else 1)
            block_size = self.spec.format(part).block_size
            for field in STORED_FIELDS:
                shape = field.shape(rows, self._columns(part), block_size)
                name = f"{_STACK[part]}_{field.stored}"
                self._register(layer, name, torch.zeros((num_experts, *shape), dtype=field.dtype))
            if self.moe.has_bias:
                bias = torch.zeros(num_experts, rows, dtype=params_dtype)
                self._register(layer, f"{_STACK[part]}_{BIAS}", bias)

    def take(self, layer: Any, expert: Expert, field: str, tensor: torch.Tensor) -> None:
        """Load a tensor of the checkpoint: a 16-bit weight, a part of a packed one, or a bias.

        Args:
            layer: the layer.
            expert: whose it is, by its number in the whole model.
            field: ``"weight"``, ``"bias"`` or a stored field's name.
            tensor: all rows and columns, those of other ranks included.

        Raises:
            LoadError: if it is not what the model needs.
            ValueError: if a weight to quantize holds NaN or Inf.
        """
        number = layer._map_global_expert_id_to_local_expert_id(expert.number)
        if number < 0:
            return  # another rank's
        name = f"{self.spec.name}.{expert.number}.{expert.part}"
        self._check(name, expert.part, field, tensor)
        share = self._share(expert.part, field, tensor)
        stored: Mapping[str, torch.Tensor] = {field: share}
        if field == WEIGHT:
            form, device = self.spec.format(expert.part), layer.w2_weight_packed.device
            if device.type != "meta":  # on which a reload has them
                share = share.to(device)
            stored = quantize(
                share.contiguous(),
                form.formatbook,
                form.block_size,
                name=f"{name}.{WEIGHT}",
                rotation=form.rotation,
            ).stored
        for key, value in stored.items():
            parameter = getattr(layer, f"{_STACK[expert.part]}_{key}")
            parameter.weight_loader(parameter, value, expert.part, number)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded; a second call does nothing.

        Raises:
            ValueError: if a tensor is missing, or a packed one holds reserved values.
        """
        if self.is_loaded(layer):
            return
        log_kernel()
        if self.spec.complete:
            self.check_loaded(layer)
        for parameter in layer.parameters():
            forget_loaded(parameter)
        if self.spec.serialized:
            self._validate(layer)
        elif layer.w2_weight_packed.device.type == "cpu":
            heap.trim()
        self._warm_up(layer)
        hold_tables(layer)
        self.set_loaded(layer)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's kernels for experts are not used."""
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The sum of the chosen experts' outputs; vLLM runs shared experts by itself.

        Args:
            layer: the layer.
            x: [T, H].
            topk_weights: [T, k].
            topk_ids: [T, k], numbers of experts in the whole model.

        Returns:
            [T, H] in x's dtype, see :func:`~dialect_plugin.routing.chosen_experts`.
        """
        if layer.apply_router_weight_on_input:
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        ids = topk_ids.long()
        count = layer.w2_weight_packed.shape[0]
        if layer.expert_map is not None:
            local = layer.expert_map.to(torch.int64)[ids]
            ids = torch.where(local < 0, count, local)  # behind all of this rank's
        before = partial(self._product, layer, _GATE_UP)
        after = partial(self._product, layer, _DOWN)
        return chosen_experts(x, topk_weights, ids, count, before, self._act, after)

    def _warm_up(self, layer: Any) -> None:
        """Compile a GPU's kernels now: nothing is compiled while serving, or in a CUDA graph."""
        for stack in (_GATE_UP, _DOWN):
            form = self.spec.down if stack == _DOWN else self.spec.gate_up
            codes, meta, row_exponent = (
                getattr(layer, f"{stack}_{name}").data for name in (_CODES, _META, _ROW_EXPONENT)
            )
            columns = codes.shape[2] * 2
            experts = PackedExperts.from_op(
                codes, meta, row_exponent, columns, form.book, form.block_size, form.rotation
            )
            bias_dtype = self._dtype if self.moe.has_bias else None
            warm_up_experts(experts, form.activation_format, self._dtype, bias_dtype)

    def _product(
        self,
        layer: Any,
        stack: str,
        x: torch.Tensor,
        rows: torch.Tensor | None,
        offsets: torch.Tensor,
    ) -> torch.Tensor:
        form = self.spec.down if stack == _DOWN else self.spec.gate_up
        codes = getattr(layer, f"{stack}_{_CODES}")
        return grouped_linear(
            x,
            rows,
            offsets,
            codes,
            getattr(layer, f"{stack}_{_META}"),
            getattr(layer, f"{stack}_{_ROW_EXPONENT}"),
            getattr(layer, f"{stack}_{BIAS}", None),
            codes.shape[2] * 2,
            form.book,
            form.block_size,
            form.activation_format,
            "default",
            form.rotation,
        )

    def check_loaded(self, layer: Any) -> None:
        """Raise LoadError if a tensor of an expert was not in the checkpoint."""
        for name, part in self._tensors():
            parameter = getattr(layer, f"{_STACK[part]}_{name}")
            loaded = loaded_shards(parameter)
            for number in range(parameter.shape[0]):
                if (part, number) not in loaded:
                    raise self._missing(layer, number, part, name)

    def _missing(self, layer: Any, number: int, part: str, field: str) -> LoadError:
        if layer.expert_map is not None:
            number = int((layer.expert_map == number).nonzero()[0])
        if not self.spec.serialized and field in _FIELDS:
            field = WEIGHT
        remedy = (
            "convert the model again"
            if self.spec.serialized
            else f"complete the checkpoint, or ignore {self.spec.name}"
        )
        return LoadError(
            f"{self.spec.name}.{number}.{part}.{field}: the checkpoint does not hold it under a "
            f"name that is known; {remedy}"
        )

    def _tensors(self) -> Iterator[tuple[str, str]]:
        """(field, part) of all that must be loaded for each expert."""
        for part in self._parts:
            for name in _FIELDS:
                yield name, part
            if self.moe.has_bias:
                yield BIAS, part

    def _register(self, layer: Any, name: str, data: torch.Tensor) -> None:
        parameter = Parameter(data, requires_grad=False)
        parameter.weight_loader = self._loader(data.shape[1])  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)

    def _loader(self, height: int) -> Callable[..., None]:
        """What puts this rank's share of a part of an expert into a stack of `height` rows each.

        It does not keep the layer alive: vLLM keeps loaders for a later reload.
        """
        middle = height // 2 if self._gated else 0

        def load(param: Any, loaded_weight: torch.Tensor, part: str, number: int) -> None:
            if param.is_meta and counted_before(param, (part, number)):
                return
            first = middle if part == UP else 0
            param.data[number].narrow(0, first, loaded_weight.shape[0]).copy_(loaded_weight)
            mark_loaded(param, ((part, number),))

        return load

    def _rows(self, part: str) -> int:
        """Rows of this rank's share of a matrix."""
        return self._hidden if part == DOWN else self._inner

    def _columns(self, part: str) -> int:
        return self._inner if part == DOWN else self._hidden

    def _share(self, part: str, field: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank has of a tensor of an expert, whose inner axis is split over the ranks."""
        ranks, rank = self.moe.tp_size, self.moe.tp_rank
        if ranks == 1:
            return tensor
        if part != DOWN:
            return tensor.narrow(0, rank * self._inner, self._inner)
        if field == BIAS:  # only the first adds it, because the ranks' outputs are added up
            return tensor if rank == 0 else torch.zeros_like(tensor)
        if field == _ROW_EXPONENT:
            return tensor
        width = tensor.shape[1] // ranks
        return tensor.narrow(1, rank * width, width)

    def _check(self, name: str, part: str, field: str, tensor: torch.Tensor) -> None:
        """Raise LoadError unless a tensor of the checkpoint has the right dtype and shape."""
        rows, columns = self._rows(part), self._columns(part)
        if part == DOWN:
            columns *= self.moe.tp_size
        else:
            rows *= self.moe.tp_size
        stored = _FIELDS.get(field)
        dtypes = DTYPES if stored is None else (stored.dtype,)
        width: int | None = columns if field == WEIGHT else None
        if stored is not None:
            _, *rest = stored.shape(1, columns, self.spec.format(part).block_size)
            width = rest[0] if rest else None
        check_tensor(tensor, f"{name}.{field}", rows, width, dtypes)

    def _validate(self, layer: Any) -> None:
        """Raise ValueError at the first reserved value, naming its tensor."""
        for part in (UP, DOWN):
            form = self.spec.format(part)
            stack = {n: getattr(layer, f"{_STACK[part]}_{n}").data for n in _FIELDS}

            def packed(
                tensors: Mapping[str, torch.Tensor], form: LayerFormat = form
            ) -> PackedTensor:
                columns = tensors[_CODES].shape[-1] * 2
                book = form.formatbook
                return PackedTensor.from_stored(tensors, columns, book, form.block_size)

            try:
                packed({n: tensor.flatten(0, 1) for n, tensor in stack.items()}).validate()
            except ValueError:
                what = DOWN if part == DOWN else f"{GATE} and {UP}" if self._gated else UP
                for number in range(stack[_CODES].shape[0]):
                    one = {n: tensor[number] for n, tensor in stack.items()}
                    name = f"{self.spec.name}: {what} of expert {number}"
                    packed(one).validate(name, prefix="weight_")
                raise

    def _check_columns(self, part: str) -> None:
        form, columns = self.spec.format(part), self._columns(part)
        unit = form.block_size
        if form.rotation != "none":
            unit = max(unit, ROTATION_GROUP)
        if columns % unit:
            ranks = self.moe.tp_size if part == DOWN else 1
            raise ValueError(
                f"{self.spec.name}.{part}: {columns} input columns"
                f"{f' on each of {ranks} ranks' if ranks > 1 else ''} are not a multiple of "
                f"{unit}, which its block size or rotation needs; use another "
                f"--tensor-parallel-size, override its block size, or ignore {self.spec.name}"
            )

    def _refuse(self) -> None:
        """Raise SchemeError for what vLLM may do with experts and this method cannot."""
        moe, name = self.moe, self.spec.name
        if getattr(moe.moe_parallel_config, "enable_eplb", False):
            raise SchemeError(
                f"--enable-eplb: packed experts ({name}) cannot be moved between ranks; leave it "
                f"out, or ignore {name}"
            )
        ranks = getattr(moe.moe_parallel_config, "dp_size", 1)
        if ranks > 1 and not compat.exchanges_tokens():
            raise SchemeError(
                f"--data-parallel-size: {ranks}; vLLM cannot exchange the tokens of a mixture of "
                "experts between such ranks on a CPU; use --tensor-parallel-size, and "
                "--enable-expert-parallel for whole experts on each rank"
            )

    def _activation(self, layer: Any) -> Activation:
        try:
            return Activation(layer.activation.value, self.moe)
        except KeyError:
            raise SchemeError(
                f"{self.spec.name}: its activation {layer.activation.value!r} is not known to "
                f"packed experts; ignore {self.spec.name}"
            ) from None
