"""What reader and converter make of a damaged checkpoint, and whether that is right.

A refusal is right if it is one sentence of ours and leaves nothing behind. An acceptance is right
if the files are what safetensors' format allows and every tensor holds what its bytes say: this
module reads them by itself, with neither the product's reader nor the library, decodes packed
weights from the format's tables, and quantizes with the reference.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dialect_kernels import reference
from dialect_kernels.formatbook import BOOKS
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.inspection import inspect_checkpoint
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import CheckpointError, open_packed
from dialect_plugin.scheme import SchemeError

from .mutations import PACKED, SOURCES, make_victims, mutate

__all__ = ["OUTCOMES", "Verdict", "judge", "sound_faults"]

OUTCOMES = ("refused", "right", "wrong", "crash", "hang")
"""What can come of a damaged checkpoint; the last three are faults."""

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16}
_BITS |= {"U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64}
_BITS |= {"I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DEFAULTS = {"block_size": 32, "book": "dialect_fp4", "rotation": "none"}
_CODES, _META, _EXPONENT = ".weight_packed", ".weight_meta", ".weight_row_exponent"
_SCHEME_TYPES = {
    **dict.fromkeys(("quant_method", "book", "activation_format", "rotation"), str),
    **dict.fromkeys(("format_version", "block_size"), int),
    **dict.fromkeys(("serialized", "lm_head"), bool),
    "ignore": list,
    "overrides": dict,
}


class _InvalidError(Exception):
    """Files that the format of safetensors does not allow."""


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def as_torch(self, dtype: torch.dtype) -> torch.Tensor:
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.data), dtype=dtype).view(self.shape)


@dataclass(frozen=True)
class Verdict:
    """What came of one damaged checkpoint.

    Attributes:
        number: of the mutation.
        victim: what was damaged.
        kinds: how.
        outcome: one of `OUTCOMES`.
        detail: the sentence of a refusal, or the fault.
        seconds: how long reading or converting took.
    """

    number: int
    victim: str
    kinds: tuple[str, ...]
    outcome: str
    detail: str
    seconds: float


def judge(victims: Path, number: int, scratch: Path) -> Verdict:
    """Make the mutation `number`, give it to reader or converter, and judge what they did.

    Args:
        victims: what `make_victims` made.
        number: of the mutation.
        scratch: an empty directory, emptied again.
    """
    damaged, output = scratch / "damaged", scratch / "output"
    mutation = mutate(victims, number, damaged)
    begin = time.perf_counter()
    try:
        if mutation.victim in SOURCES:
            convert(damaged, output, workers=1)
        else:
            inspect_checkpoint(damaged, Silent())
    except (CheckpointError, SchemeError) as error:
        outcome, detail = "refused", str(error)
        if not detail.isprintable() or not 20 < len(detail) < 20_000:
            outcome, detail = "crash", f"no sentence: {detail!r}"
        elif output.exists():
            outcome, detail = "crash", f"left a destination behind: {detail}"
    except (Exception, SystemExit) as error:
        outcome, detail = "crash", f"{type(error).__name__}: {error}"
    else:
        outcome = detail = ""
    seconds = time.perf_counter() - begin
    if not outcome:
        detail = _fault(victims / mutation.victim, damaged, output)
        outcome = "wrong" if detail else "right"
    for path in scratch.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return Verdict(number, mutation.victim, mutation.kinds, outcome, detail, seconds)


def sound_faults(victims: Path, scratch: Path) -> list[str]:
    """Make the victims and return what is wrong with the undamaged ones, by the same rules."""
    make_victims(victims)
    found = []
    for name in (*SOURCES, *PACKED):
        output = scratch / name
        if name in SOURCES:
            convert(victims / name, output, workers=1)
        else:
            inspect_checkpoint(victims / name, Silent())
        fault = _fault(victims / name, victims / name, output)
        found += [f"{name}: {fault}"] if fault else []
    return found


def _fault(sound: Path, damaged: Path, output: Path) -> str:
    """What is wrong with having accepted `damaged`; an empty text if nothing is."""
    try:
        return _fault_of_bytes(sound, damaged, output)
    except _InvalidError as invalid:
        return f"accepted, but {invalid}"
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        return f"accepted, but this module cannot read it: {type(error).__name__}: {error}"


def _fault_of_bytes(sound: Path, damaged: Path, output: Path) -> str:
    held = _tensors(damaged)
    config = json.loads((damaged / "config.json").read_text(encoding="utf-8"))
    if not output.exists():
        fault = _read_fault(damaged, held, config["quantization_config"])
    else:
        fault = _conversion_fault(held, config, output)
    same = held == _sound_tensors(sound) and config == _sound_config(sound)
    if not fault and same and output.exists() and _tensors(output) != _converted(sound, output):
        fault = "the same tensors were converted to others than those of the sound checkpoint"
    return fault


def _tensors(path: Path) -> dict[str, _Tensor]:
    """All tensors of a checkpoint, read strictly by the format's description.

    Raises:
        _InvalidError: saying what the format does not allow.
    """
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
        if not all(re.fullmatch(r"[^/\\\0]+\.safetensors", name) for name in names):
            raise _InvalidError(f"the index names {sorted(names)}")
    else:
        names = {file.name for file in path.glob("*.safetensors")}
        names = {name for name in names if not name.startswith("consolidated")} or names
    found: dict[str, _Tensor] = {}
    for name in sorted(names):
        tensors = _file_tensors((path / name).read_bytes())
        if found.keys() & tensors.keys():
            raise _InvalidError("a tensor is in two files")
        found |= tensors
    return found


def _file_tensors(raw: bytes) -> dict[str, _Tensor]:
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or not 0 < length <= len(raw) - 8:
        raise _InvalidError("the header's length is wrong")
    try:
        header = json.loads(raw[8 : 8 + length].decode(), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise _InvalidError(f"the header is not JSON: {error}") from None
    data = raw[8 + length :]
    header.pop("__metadata__", None)
    found, at = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if begin != at or end < begin or end > len(data):
            raise _InvalidError(f"{name} lies at {begin}..{end}, after {at}")
        if any(type(size) is not int or size < 0 for size in shape):
            raise _InvalidError(f"{name} has the shape {shape}")
        if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
            raise _InvalidError(f"{name} has {end - begin} bytes, its shape is {shape} {dtype}")
        found[name], at = _Tensor(dtype, shape, data[begin:end]), end
    if at != len(data):
        raise _InvalidError(f"{len(data) - at} bytes belong to no tensor")
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _conversion_fault(held: dict[str, _Tensor], config: Any, output: Path) -> str:
    """What is wrong with a conversion, by default options, of the tensors `held`."""
    written = _tensors(output)
    found = json.loads((output / "config.json").read_text(encoding="utf-8"))
    scheme = found.pop("quantization_config")
    kept = {key: entry for key, entry in config.items() if key != "quantization_config"}
    if "auto_map" in kept and found.get("auto_map") != kept["auto_map"]:
        kept.pop("auto_map")  # entries that name code of the checkpoint are left out
        found.pop("auto_map", None)
    if json.dumps(found) != json.dumps(kept):
        return "config.json has other entries"
    if (output / "model.safetensors.index.json").exists():
        index = json.loads((output / "model.safetensors.index.json").read_text(encoding="utf-8"))
        if index["weight_map"].keys() != written.keys():
            return "the index lists other tensors than the files hold"
    expected = set()
    for name, tensor in held.items():
        layer = name.removesuffix(".weight")
        if written.get(name) == tensor:
            expected.add(name)
            continue
        parts = [layer + suffix for suffix in (_CODES, _META, _EXPONENT)]
        expected.update(parts)
        if any(part not in written for part in parts):
            return f"{name} is neither kept nor packed"
        stored = [(written[part].dtype, written[part].shape, written[part].data) for part in parts]
        if stored != _quantized(tensor, _option(scheme, layer, "block_size"), scheme["book"]):
            return f"{name} is not packed as its bytes say"
    odd = expected ^ written.keys()
    return f"{sorted(odd)[0]} is written, but the source has no such tensor" if odd else ""


def _read_fault(path: Path, held: dict[str, _Tensor], scheme: Any) -> str:
    """What is wrong with what the reader says of a packed checkpoint with the tensors `held`."""
    for key, entry in scheme.items():
        if key not in _SCHEME_TYPES or type(entry) is not _SCHEME_TYPES[key]:
            return f"quantization_config: {key} is {entry!r}"
    packed = open_packed(path)
    listed = {name.removesuffix(_CODES) for name in held if name.endswith(_CODES)}
    if set(packed) != listed:
        return f"the packed layers are {sorted(listed ^ set(packed))} besides"
    for layer, weight in packed.items():
        block_size, book, rotation = (_option(scheme, layer, key) for key in _DEFAULTS)
        decoded = _decoded(held, layer, block_size, book)
        if isinstance(decoded, str):
            return f"{layer}: {decoded}"
        if not torch.equal(weight.dequantize(), decoded):
            return f"{layer} decodes to other values than its bytes say"
        if weight.rotation != rotation:
            return f"{layer} is read as rotated by {weight.rotation}"
    if set(packed.checkpoint.tensors) != set(held):
        return "the reader finds other tensors than the files hold"
    for name, tensor in held.items():
        if b"".join(packed.checkpoint.read_bytes(name, 1 << 20)) != tensor.data:
            return f"{name} is read from other bytes than its own"
    return ""


def _decoded(
    held: dict[str, _Tensor], layer: str, block_size: int, book: str
) -> torch.Tensor | str:
    """The values of a packed layer from the format's tables, or what is wrong with its bytes."""
    codes = held[layer + _CODES].as_torch(torch.uint8).to(torch.int64)
    meta = held[layer + _META].as_torch(torch.uint8).to(torch.int64)
    exponent = held[layer + _EXPONENT].as_torch(torch.int8).to(torch.int64)
    rows, blocks = meta.shape
    if codes.shape != (rows, blocks * block_size // 2) or exponent.shape != (rows,):
        return "the shapes do not fit"
    table = BOOKS[book]
    delta, identity = meta >> table.id_bits, meta & ((1 << table.id_bits) - 1)
    if bool((delta > 13).any()) or bool((exponent < -120).any()) or bool((exponent > 125).any()):
        return "a reserved value was accepted"
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).view(rows, blocks, block_size)
    half_units = torch.tensor(table.half_units, dtype=torch.float64)
    magnitude = half_units[identity[:, :, None], nibbles & 7]
    signed = torch.where(nibbles >= 8, -magnitude, magnitude)
    scale = torch.pow(2.0, (exponent[:, None] - delta - 1).to(torch.float64))
    return (signed * scale[:, :, None]).view(rows, blocks * block_size).to(torch.float32)


def _option(scheme: Any, layer: str, key: str) -> Any:
    """An option of a layer: that of its name, of the first pattern that gives it, or of all."""
    overrides = scheme.get("overrides", {})
    matching = [
        override
        for pattern, override in overrides.items()
        if pattern.startswith("re:") and re.match(pattern[3:], layer)
    ]
    for override in (overrides.get(layer, {}), *matching, scheme):
        if key in override:
            return override[key]
    return _DEFAULTS[key]


@functools.lru_cache(maxsize=500)
def _quantized(tensor: _Tensor, block_size: int, book: str) -> list[tuple[str, Any, bytes]]:
    """dtype, shape and bytes of the three stored tensors of a weight, from the reference."""
    weight = tensor.as_torch(_FLOATS[tensor.dtype])
    packed = reference.quantize(weight, BOOKS[book], block_size)
    names = ("U8", "U8", "I8")
    return [
        (name, tuple(part.shape), part.contiguous().view(torch.uint8).numpy().tobytes())
        for name, part in zip(names, packed.tensors, strict=True)
    ]


@functools.cache
def _sound_tensors(sound: Path) -> dict[str, _Tensor]:
    return _tensors(sound)


@functools.cache
def _sound_config(sound: Path) -> Any:
    return json.loads((sound / "config.json").read_text(encoding="utf-8"))


_CONVERTED: dict[Path, dict[str, _Tensor]] = {}


def _converted(sound: Path, output: Path) -> dict[str, _Tensor]:
    """What the sound checkpoint is converted to."""
    if sound not in _CONVERTED:
        whole = output.with_name(f"{sound.name} converted")
        convert(sound, whole, workers=1)
        _CONVERTED[sound] = _tensors(whole)
    return _CONVERTED[sound]
