"""vLLM's side of the scheme: four quantization methods that differ in the activation format.

======================  ============================================================
``blockdialect``        the checkpoint's activation format; W4A4 for a 16-bit checkpoint
``blockdialect_w4a4``   activations in the weight's dialect format, whatever the checkpoint says
``blockdialect_w4a8``   FP8 activations, whatever the checkpoint says
``blockdialect_w4a16``  16-bit activations, whatever the checkpoint says
======================  ============================================================

One packed checkpoint serves all of them: the weights' bytes are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from dialect_kernels.layer_names import is_expression, near_misses

from .. import architectures
from ..experts import DOWN, PARTS, UP, aliases, names_of, prefixes
from ..scheme import (
    METHODS,
    QUANT_METHOD,
    ActivationFormat,
    LayerFormat,
    Scheme,
    SchemeError,
    disagreement,
    experts_disagreement,
    fitted,
)
from . import compat, loading
from .errors import LoadError
from .experts import BlockDialectExpertsMethod, ExpertsSpec
from .linear import BlockDialectLinearMethod, LinearSpec
from .options import engine_options
from .probes import WEIGHT
from .renaming import mapped
from .settling import settle
from .watch import watch

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = [
    "BlockDialectConfig",
    "BlockDialectW4A4Config",
    "BlockDialectW4A8Config",
    "BlockDialectW4A16Config",
    "register_configs",
]

logger = init_logger("vllm.blockdialect")

_TIED = (
    "quantization_config: lm_head is true, but this model ties its output projection to the "
    "embeddings; set embeddings to true, which packs the one matrix of both, or lm_head to false"
)

_NO_CACHE = (
    "quantization_config: kv_cache is 'dialect', but such a cache needs vLLM 0.28 or later on a "
    "CPU, or 0.29 or later on an NVIDIA GPU; set it to 'none'"
)

_OTHER_BACKEND = (
    "quantization_config: kv_cache is 'dialect', but the attention back end is {}, which has no "
    "such cache; add --attention-backend CUSTOM, or set kv_cache to 'none'"
)

_EAGER_STAGES = (
    "--enforce-eager: on a CPU, vLLM's pipeline stages need a compiled model; leave it out, or use "
    "--tensor-parallel-size instead of --pipeline-parallel-size"
)

_POOLING = (
    "quantization_config: lm_head is true, but a pooling model (embeddings, scores) does not use "
    "its output projection; set lm_head to false"
)

_ROOT = "model."


class BlockDialectConfig(QuantizationConfig):
    """The quantization config vLLM holds for a model.

    Args:
        scheme: the scheme of config.json or of the command line; default: quantize a 16-bit
            checkpoint while it loads.
    """

    name: ClassVar[str] = METHODS["dialect"].quantization
    forced_activation_format: ClassVar[ActivationFormat | None] = None

    def __init__(self, scheme: Scheme | None = None) -> None:
        super().__init__()
        scheme = scheme or Scheme(serialized=False)
        if self.forced_activation_format is not None:
            scheme = scheme.with_activation_format(self.forced_activation_format)
        self.scheme = scheme
        self.complete = self._keep_decoded = False
        self._serialized, self._multimodal, self._pooling = scheme.serialized, False, False
        self._architectures: list[str] = []
        self._names = [*scheme.ignore, *scheme.overrides]
        self._mappers: list[WeightsMapper] = []
        self._inner_mappers: Mapping[str, WeightsMapper] = {}
        self._stacked: Mapping[str, list[str]] = {}
        self._fused: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.scheme!r})"

    def get_name(self) -> str:
        """The name given to ``--quantization``."""
        return self.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Model dtypes; float32 is for CPUs without fast bfloat16."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: the first with bfloat16."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: an empty list lets vLLM build the config without arguments for online mode."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BlockDialectConfig:
        """From the ``quantization_config`` of config.json or of ``--hf-overrides``.

        Raises:
            SchemeError: one sentence, if it is not a valid scheme, or has no ``serialized`` (a
                packed checkpoint always has it).
        """
        if "serialized" not in config:
            raise SchemeError(
                "quantization_config: serialized is missing; set it to false to quantize a 16-bit "
                "checkpoint while it loads, or to true if its weights are packed"
            )
        return cls(Scheme.parse(config))

    @classmethod
    def from_config_dict_json(cls, text: str) -> BlockDialectConfig:
        """From ``--hf-overrides '{"quantization_config_dict_json": "{...}"}'``, online mode."""
        where = "quantization_config_dict_json"
        return cls(Scheme.parse({"serialized": False, **_options(text, where)}, where))

    @classmethod
    def from_config_file(cls, path: str) -> BlockDialectConfig:
        """From ``--hf-overrides '{"quantization_config_file": "FILE"}'``, online mode."""
        where = f"quantization_config_file {path}"
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SchemeError(f"{where}: cannot be read ({error}); give a JSON file") from error
        return cls(Scheme.parse({"serialized": False, **_options(text, where)}, path))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, **_: Any
    ) -> str | None:
        """The method that ``--quantization`` names, for packed checkpoints and for no others."""
        if hf_quant_cfg.get("quant_method") != QUANT_METHOD:
            return None
        return cls.name if user_quant == cls.name else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Refuse what the model cannot have; vLLM calls this before it starts its workers.

        Raises:
            SchemeError: if the output projection of a tied model should be quantized without the
                embeddings, or the KV cache where vLLM cannot pack it.
        """
        if self.scheme.kv_cache != "none" and not compat.packs_caches():
            raise SchemeError(_NO_CACHE)
        if not self.scheme.lm_head or self.scheme.embeddings:
            return
        if hf_config is not None and compat.tied_embeddings(hf_config):
            raise SchemeError(_TIED)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rewrite exact names to vLLM's module names (patterns are left as they are)."""
        self._mappers.append(hf_to_vllm_mapper)
        self._rename(lambda name: [mapped(hf_to_vllm_mapper, name)])

    def see_parts(
        self,
        mappers: Mapping[str, WeightsMapper],
        stacked: Mapping[str, list[str]],
        exists: Callable[[str], bool],
    ) -> None:
        """Learn what the parts of the complete model call their layers.

        Args:
            mappers: place of a part in the model -> its map of names, which begin at that place.
            stacked: last word of a fused layer -> those of its parts, in the checkpoint.
            exists: whether a module is at a place.
        """
        self._inner_mappers, self._stacked = mappers, stacked
        self._rename(
            lambda name: [
                name,
                *(n for n in self._names_inside(name) if exists(n.rpartition(".")[0])),
            ]
        )

    def _rename(self, names: Callable[[str], list[str]]) -> None:
        """Let exact names in `ignore` and `overrides` be what `names` makes of them."""
        scheme = self.scheme
        ignore = [name for pattern in scheme.ignore for name in _renamed(pattern, names)]
        overrides = {
            name: override
            for pattern, override in scheme.overrides.items()
            for name in _renamed(pattern, names)
        }
        self.scheme = scheme.model_copy(update={"ignore": ignore, "overrides": overrides})

    def _names_inside(self, name: str) -> list[str]:
        """What the parts of the model that hold the layer `name` call it."""
        return [
            f"{place}.{mapped(mapper, name.removeprefix(f'{place}.'))}"
            for place, mapper in self._inner_mappers.items()
            if name.startswith(f"{place}.")
        ]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for a linear layer; None where vLLM's default serves.

        Embeddings and output projections are decided when the model is complete.

        Raises:
            ValueError: if the parts of a fused layer disagree.
            SchemeError: if the model cannot have what its scheme says.
        """
        if self.scheme.lm_head and not self.scheme.serialized and compat.is_pooling():
            raise SchemeError(_POOLING)
        backend = compat.attention_backend(layer)
        if self.scheme.kv_cache != "none" and backend not in (None, "CUSTOM"):
            raise SchemeError(_OTHER_BACKEND.format(backend))
        if isinstance(layer, LinearBase):
            self._see_engine()
            begin = partial(settle, self) if compat.loads_sharded_state() else None
            watch(layer, partial(loading.load, self), begin)
            spec = self.spec(layer, prefix)
            return UnquantizedLinearMethod() if spec is None else BlockDialectLinearMethod(spec)
        if compat.is_expert_layer(layer):
            self._see_engine()
            begin = partial(settle, self) if compat.loads_sharded_state() else None
            watch(layer, partial(loading.load, self), begin)
            experts = self._experts_spec(layer, prefix)
            return None if experts is None else BlockDialectExpertsMethod(experts, layer)
        return None

    def chosen_by_name(self, layers: Iterable[str]) -> str:
        """Patterns of the layers that a model of an unknown architecture quantizes while loading.

        Empty if the table of architectures has the model's, or its weights are packed.

        Args:
            layers: vLLM's names of the quantized layers.
        """
        if self._serialized or not architectures.ARCHITECTURES.keys().isdisjoint(
            self._architectures
        ):
            return ""
        return architectures.patterns_of(layers)

    def _see_engine(self) -> None:
        """Note what is known only while vLLM builds a model.

        Raises:
            SchemeError: if the engine would stop at its first request.
        """
        if compat.stages_stop():
            raise SchemeError(_EAGER_STAGES)
        self.complete = compat.loads_through_loaders()
        self._serialized = self.scheme.serialized or compat.loads_sharded_state()
        self._multimodal = compat.is_multimodal()
        self._pooling = compat.is_pooling()
        self._architectures = compat.current_architectures()
        self._keep_decoded = engine_options(compat.current_config()).keep_decoded

    def spec(self, layer: Any, *names: str) -> LinearSpec | None:
        """How a linear layer is quantized; None if it stays in 16 bit.

        Args:
            layer: the layer.
            names: vLLM's name of it, and other ones that it is known by.

        Raises:
            ValueError: if the parts of a fused layer disagree.
        """
        columns = getattr(layer, "input_size_per_partition", layer.input_size)
        form = self._format(names, layer.input_size, columns)
        if form is None:
            return None
        keeps = self._keep_decoded
        return LinearSpec(names[0], self._serialized, form, self.complete, keeps)

    def embedding_spec(self, layer: Any, name: str, tied: bool) -> LinearSpec | None:
        """How the embeddings of tokens are quantized; None if they stay in 16 bit.

        Args:
            layer: the layer.
            name: vLLM's name of it.
            tied: whether it is the output projection, too.
        """
        if not self.scheme.embeddings:
            return None
        tied = tied and self.forced_activation_format is None
        form = self.scheme.embedding(*_spellings(name), tied=tied)
        return self._vocabulary_spec(layer, form, name)

    def projection_spec(self, layer: Any, name: str, tied: bool) -> LinearSpec | None:
        """How an output projection is quantized; None if it stays in 16 bit.

        Args:
            layer, name: as for :meth:`embedding_spec`.
            tied: whether it is tied to embeddings that stay in 16 bit.

        Raises:
            SchemeError: if it should be quantized although it is.
        """
        if not self.scheme.lm_head:
            return None
        if self._pooling:
            logger.info_once("the output projection of a pooling model is not quantized")
            return None
        if tied:
            raise SchemeError(_TIED)
        form = self.scheme.layer(*_spellings(name), "lm_head")
        return self._vocabulary_spec(layer, form, name, "lm_head")

    def _vocabulary_spec(self, layer: Any, form: LayerFormat, *names: str) -> LinearSpec | None:
        spellings = [spelling for name in names for spelling in _spellings(name)]
        if any(self.scheme.is_ignored(spelling) for spelling in spellings):
            return None
        found: LayerFormat | None = form
        if not self.scheme.serialized:
            found = fitted(form, layer.embedding_dim)
        if found is None:
            columns = layer.embedding_dim
            logger.info_once(
                f"{names[0]} stays in 16 bit: no block size divides its {columns} columns"
            )
            return None
        self._fused |= dict.fromkeys(spellings, names[0])
        return LinearSpec(names[0], self._serialized, found, self.complete)

    def _experts_spec(self, layer: Any, prefix: str) -> ExpertsSpec | None:
        """How the routed experts of a layer are quantized; None if they stay in 16 bit.

        Raises:
            ValueError: if they disagree, or an adapter could not be applied to packed ones.
        """
        scheme, moe = _about(self.scheme, prefix), layer.moe_config
        formats: dict[str, LayerFormat | None] = {}
        for part in PARTS if compat.has_gated_experts(layer) else PARTS[1:]:
            for number in range(compat.number_of_experts(layer)):
                name = f"{prefix}.{number}.{part}"
                known = [
                    spelling
                    for alias in aliases(part)
                    for spelling in _spellings(f"{prefix}.{number}.{alias}")
                ]
                ignored = any(scheme.is_ignored(spelling) for spelling in known)
                formats[name] = None if ignored else scheme.layer(*known)
                self._fused |= dict.fromkeys((n for k in known for n in names_of(k)), prefix)
        if (found := experts_disagreement(formats)) is not None:
            listed, common = found
            raise ValueError(
                f"quantization_config: the experts of {prefix} disagree ({listed}); give all of "
                f"them the same {common}, or ignore {prefix}"
            )
        gate_up, down = formats[f"{prefix}.0.{UP}"], formats[f"{prefix}.0.{DOWN}"]
        if gate_up is None or down is None:
            return None
        if not scheme.serialized:
            if not self._quantized_online(f"{prefix}.0.{UP}"):
                return None
            inner = moe.intermediate_size_per_partition
            gate_up, down = fitted(gate_up, moe.hidden_dim), fitted(down, inner)
            if gate_up is None or down is None:
                logger.info_once(f"{prefix}: no block size divides the columns of its experts")
                return None
        if compat.has_adapters_for_experts(layer):
            if scheme.serialized:
                raise SchemeError(
                    f"--enable-lora: adapters cannot be applied to packed experts ({prefix}); "
                    "restrict them with --lora-target-modules, or convert with --no-experts"
                )
            logger.info_once("the experts stay in 16 bit, because adapters may be for them")
            return None
        return ExpertsSpec(prefix, self._serialized, gate_up, down, self.complete)

    def fused_name(self, layer: str) -> str | None:
        """vLLM's layer that the checkpoint's `layer` is loaded into, by its name; None if none."""
        names = self.engine_names(layer)
        return next((self._fused[name] for name in names if name in self._fused), None)

    def engine_names(self, name: str) -> list[str]:
        """What vLLM may call the checkpoint's layer or module `name`."""
        for mapper in self._mappers:
            name = mapped(mapper, name)
        return [n for inner in (name, *self._names_inside(name)) for n in _spellings(inner)]

    def check_names(self, tensors: Iterable[str], skipped: Callable[[str], bool] | None) -> None:
        """Check that every exact name in `ignore` and `overrides` is a layer's.

        Args:
            tensors: names of the checkpoint's tensors.
            skipped: whether vLLM leaves a tensor out of `tensors`, if the model says so.

        Raises:
            LoadError: at the first that is none, with similar names.
        """
        layers = {tensor.rpartition(".")[0] for tensor in tensors}
        layers |= prefixes(layers).keys()  # those of a draft's block are in no module of the model
        for name in self._names:
            if is_expression(name) or name in layers or self.fused_name(name) is not None:
                continue
            if name.rpartition(".")[2] == "lm_head" or (skipped and skipped(f"{name}.{WEIGHT}")):
                continue
            near = near_misses(name, sorted(layers))
            hint = f"; similar names are {', '.join(near)}" if near else ""
            raise LoadError(
                f"quantization_config: {name!r} in ignore or overrides is no layer of this "
                f"model{hint}; give the checkpoint's name of a layer, or 're:' and a regular "
                "expression"
            )

    def _format(self, names: tuple[str, ...], input_size: int, columns: int) -> LayerFormat | None:
        """How a (fused) layer is quantized, or None if it stays in 16 bit."""
        parts = self._parts(names)
        formats = {part[0]: self._part_format(part, input_size, columns) for part in parts}
        if (found := disagreement(formats)) is not None:
            listed, common = found
            raise ValueError(
                f"quantization_config: the parts of the fused layer {names[0]} disagree ({listed});"
                f" give all of them the same {common}, or ignore all of them"
            )
        self._fused |= dict.fromkeys((name for part in parts for name in part), names[0])
        return formats[parts[0][0]]

    def _part_format(self, names: list[str], input_size: int, columns: int) -> LayerFormat | None:
        """How a layer of `input_size` columns is quantized, of which this rank has `columns`."""
        scheme = self.scheme
        spellings = [spelling for name in names for spelling in _spellings(name)]
        if any(scheme.is_ignored(spelling) for spelling in spellings):
            return None
        wanted = scheme.layer(*spellings)
        if scheme.serialized:
            return wanted  # the converter resolved everything to exact names
        if not self._quantized_online(names[0]):
            return None
        return fitted(wanted, columns) or fitted(wanted, input_size)

    def _quantized_online(self, name: str) -> bool:
        if self._multimodal and architectures.is_in_encoder(name):
            return False
        return architectures.is_candidate(name)

    def _parts(self, names: tuple[str, ...]) -> list[list[str]]:
        """The checkpoint's names of a layer that vLLM may have fused; for each part, all of them.

        Args:
            names: of the layer.
        """
        leaf = names[0].rpartition(".")[2]
        leaves = self.packed_modules_mapping.get(leaf) or self._stacked.get(leaf) or [leaf]
        parents = [name.rpartition(".")[0] for name in names]
        return [[f"{parent}.{leaf}" if parent else leaf for parent in parents] for leaf in leaves]


class BlockDialectW4A4Config(BlockDialectConfig):
    """W4A4: activations in a dialect format."""

    name = f"{QUANT_METHOD}_w4a4"
    forced_activation_format = "dialect"


class BlockDialectW4A8Config(BlockDialectConfig):
    """W4A8: FP8 activations."""

    name = METHODS["fp8"].quantization
    forced_activation_format = "fp8"


class BlockDialectW4A16Config(BlockDialectConfig):
    """W4A16: 16-bit activations."""

    name = METHODS["none"].quantization
    forced_activation_format = "none"


def register_configs() -> None:
    """Register the four methods; a second call changes nothing."""
    for config in (
        BlockDialectConfig,
        BlockDialectW4A4Config,
        BlockDialectW4A8Config,
        BlockDialectW4A16Config,
    ):
        if config.name not in QUANTIZATION_METHODS:
            register_quantization_config(config.name)(config)


def _options(given: str | dict[str, Any], where: str) -> dict[str, Any]:
    try:
        data = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise SchemeError(f"{where}: is not JSON ({error}); write an object: {{...}}") from error
    if not isinstance(data, dict):
        raise SchemeError(f"{where}: holds {type(data).__name__}; write an object: {{...}}")
    return data


def _renamed(pattern: str, names: Callable[[str], list[str]]) -> list[str]:
    """What `names` makes of an exact name; an expression is left as it is."""
    return [pattern] if is_expression(pattern) else names(pattern)


def _about(scheme: Scheme, module: str) -> Scheme:
    """`scheme` without names of layers outside of a module, which has thousands of layers."""
    inside = tuple(_spellings(module))

    def may_match(pattern: str) -> bool:
        return is_expression(pattern) or pattern.startswith(inside)

    ignore = [pattern for pattern in scheme.ignore if may_match(pattern)]
    overrides = {name: entry for name, entry in scheme.overrides.items() if may_match(name)}
    return scheme.model_copy(update={"ignore": ignore, "overrides": overrides})


def _spellings(name: str) -> list[str]:
    """A layer's name, and as it is in checkpoints of the inner model: without ``model.``."""
    inner = name.removeprefix(_ROOT)
    return [name, inner if inner != name else f"{_ROOT}{name}"]
