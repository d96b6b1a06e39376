"""Sound tiny checkpoints, and ways to damage a copy of them at random.

A mutation is given by its number: it draws its victim, its kind and its place from the number
alone, so that every case can be repeated.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.layer_choice import ConvertOptions
from dialect_plugin.scheme import LayerOverride, Scheme

from ..lib.shapes import TINY
from . import odd_json
from .checkpoints import write_config

__all__ = ["KINDS", "PACKED", "SOURCES", "Mutation", "make_victims", "mutate"]

SOURCES = ("source", "source, one file")
"""16-bit checkpoints, which a conversion reads."""
PACKED = ("packed", "packed, one file")
"""Packed checkpoints, which the reader reads."""

_INDEX = "model.safetensors.index.json"
_SHARD = "*.safetensors"
_COMPANIONS = {
    "modules.json": [{"name": "0", "path": ""}, {"name": "1", "path": "1_Pooling"}],
    "1_Pooling/config.json": {"mode": "mean"},
    "tokenizer.json": {"version": "1.0", "model": {"vocab": {"a": 0, "b": 1}}},
    "tokenizer_config.json": {"chat_template": "{{ messages }}", "bos_token": None},
}
"""Files beside the weights -> what they hold; nobody reads the tokenizer."""


@dataclass(frozen=True)
class Mutation:
    """One damaged checkpoint.

    Attributes:
        number: what it was drawn from.
        victim: one of `SOURCES` and `PACKED`.
        kinds: one or two keys of `KINDS`, in the order in which they were applied.
    """

    number: int
    victim: str
    kinds: tuple[str, ...]


def make_victims(directory: Path) -> None:
    """Make a directory for each of `SOURCES` and `PACKED`; no two weights are alike."""
    directory.mkdir(exist_ok=True)
    several, single = (directory / name for name in SOURCES)
    tensors = _tensors()
    for path in (several, single):
        write_config(path, TINY)
        (path / "1_Pooling").mkdir()
        for name, content in _COMPANIONS.items():
            (path / name).write_text(json.dumps(content), encoding="utf-8")
    save_file(tensors, single / "model.safetensors", {"format": "pt"})
    weight_map = {}
    for number in range(3):
        name = f"model-{number + 1:05}-of-00003.safetensors"
        shard = {key: tensors[key] for key in sorted(tensors)[number::3]}
        save_file(shard, several / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (several / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    options = ConvertOptions(
        scheme=Scheme(
            book="semantic_32",
            block_size=64,
            activation_format="none",
            rotation="hadamard_32",
            ignore=["model.layers.0.self_attn.o_proj"],
            overrides={"re:.*down_proj": LayerOverride(block_size=16)},
            lm_head=True,
        )
    )
    convert(several, directory / PACKED[0], workers=1)
    convert(single, directory / PACKED[1], options, workers=1)


def mutate(victims: Path, number: int, target: Path) -> Mutation:
    """Copy a victim to `target`, which must not exist, and damage it.

    Args:
        victims: what `make_victims` made.
        number: what everything is drawn from.
        target: directory of the damaged copy.
    """
    draw = random.Random(number)
    victim = draw.choice([*SOURCES, *PACKED])
    shutil.copytree(victims / victim, target)
    kinds = tuple(draw.choices(list(KINDS), k=1 if draw.random() < 0.8 else 2))
    for kind in kinds:
        KINDS[kind](target, draw)
    return Mutation(number, victim, kinds)


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random_weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": random_weight(TINY.vocabulary, TINY.hidden),
        "lm_head.weight": random_weight(TINY.vocabulary, TINY.hidden),
        "model.norm.weight": random_weight(TINY.hidden),
    }
    for layer in range(TINY.layers):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = random_weight(TINY.hidden)
        for part, shape in TINY.projections.items():
            tensors[f"{name}.{part}.weight"] = random_weight(*shape)
    return tensors


def _file(directory: Path, pattern: str, draw: random.Random) -> Path | None:
    """One of the regular files that match; two mutations can have left none."""
    found = sorted(path for path in directory.glob(pattern) if path.is_file())
    return draw.choice(found) if found else None


def _change_bytes(
    pattern: str, change: Callable[[bytearray, int, random.Random], None]
) -> Callable[[Path, random.Random], None]:
    """A mutation of one file's bytes; `change` receives them and where the header ends."""

    def apply(directory: Path, draw: random.Random) -> None:
        path = _file(directory, pattern, draw)
        if path is not None:
            data = bytearray(path.read_bytes())
            header = min(len(data), 8 + int.from_bytes(data[:8], "little"))
            change(data, header, draw)
            path.write_bytes(data)

    return apply


def _flip(data: bytearray, begin: int, end: int, draw: random.Random) -> None:
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        if begin < end:
            data[draw.randrange(begin, end)] ^= 1 << draw.randrange(8)


def _flip_header(data: bytearray, header: int, draw: random.Random) -> None:
    _flip(data, 0, 8 if draw.random() < 0.1 else header, draw)


def _flip_data(data: bytearray, header: int, draw: random.Random) -> None:
    _flip(data, header, len(data), draw)


def _flip_anywhere(data: bytearray, header: int, draw: random.Random) -> None:
    _flip(data, 0, len(data), draw)


def _change_length(data: bytearray, header: int, draw: random.Random) -> None:
    how = draw.randrange(4)
    if how == 0:
        del data[draw.randrange(len(data) + 1) :]
    elif how == 1:
        del data[draw.randrange(header + 1) :]
    elif how == 2:
        data += draw.randbytes(draw.choice([1, 2, 8, 1000]))
    else:
        first = draw.randrange(len(data) + 1)
        del data[first : first + draw.choice([1, 2, 8, 512])]


def _overwrite(data: bytearray, header: int, draw: random.Random) -> None:
    first = draw.randrange(len(data) + 1)
    length = min(len(data) - first, draw.choice([1, 8, 64, 4096]))
    filling = draw.choice([bytes(length), b"\xff" * length, draw.randbytes(length)])
    data[first : first + length] = filling


def _header_length(data: bytearray, header: int, draw: random.Random) -> None:
    length = max(0, header - 8)
    odd = [0, 1, length - 1, length + 1, length + 8, 10**8, 2**31, 2**62, 2**63, 2**64 - 1]
    data[:8] = (draw.choice(odd) % 2**64).to_bytes(8, "little")


def _change_header(
    change: Callable[[dict[str, Any], random.Random], None],
) -> Callable[[Path, random.Random], None]:
    """A mutation of a shard's header as JSON, with its length set right and its data kept."""

    def apply(directory: Path, draw: random.Random) -> None:
        path = _file(directory, _SHARD, draw)
        data = path.read_bytes() if path is not None else b""
        length = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + length])
            tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
            change(tensors, draw)
        except (ValueError, LookupError, TypeError, AttributeError):
            return  # an earlier mutation left nothing to change
        text = odd_json.dump({"__metadata__": {"format": "pt"}} | tensors, draw)
        assert path is not None
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return apply


def _offsets(header: dict[str, Any], draw: random.Random) -> None:
    name, other = draw.sample(sorted(header), 2)
    entry, offsets = header[name], header[name]["data_offsets"]
    how = draw.randrange(6)
    if how == 0:
        entry["data_offsets"], header[other]["data_offsets"] = (
            header[other]["data_offsets"],
            offsets,
        )
    elif how == 1:
        entry["data_offsets"] = list(header[other]["data_offsets"])
    elif how == 2:
        shift = draw.choice([-2, -1, 1, 2, 64, 4096])
        entry["data_offsets"] = [offsets[0] + shift, offsets[1] + shift]
    elif how == 3:
        offsets[draw.randrange(2)] += draw.choice([-2, -1, 1, 2, 64, 2**40, 2**63])
    elif how == 4:
        offsets[draw.randrange(2)] = odd_json.value(draw)
    else:
        entry["data_offsets"] = draw.choice([offsets[::-1], offsets[:1], [*offsets, 0]])


def _dtype(header: dict[str, Any], draw: random.Random) -> None:
    known = ["BF16", "F16", "F32", "F64", "I8", "U8", "I16", "U16", "I64", "BOOL", "F8_E4M3", "F4"]
    entry = header[draw.choice(sorted(header))]
    entry["dtype"] = draw.choice([*known, "bf16", "", odd_json.value(draw)])


def _shape(header: dict[str, Any], draw: random.Random) -> None:
    entry = header[draw.choice(sorted(header))]
    shape = entry["shape"]
    how = draw.randrange(6)
    if how == 0:
        entry["shape"] = shape[::-1]
    elif how == 1:
        entry["shape"] = draw.choice([[*shape, 1], [1, *shape], [2, *shape], []])
    elif how == 2 and len(shape) == 2:
        rows, columns = shape
        entry["shape"] = draw.choice(
            [[rows * columns], [rows * 2, columns // 2], [rows * columns, 1], [1, rows * columns]]
        )
    elif how == 3:
        shape[draw.randrange(len(shape))] += draw.choice([-1, 1, 2**32, 2**63])
    elif how == 4:
        shape[draw.randrange(len(shape))] = odd_json.value(draw)
    else:
        entry["shape"] = draw.choice([[2**32, 2**32], [0, *shape], [2**63, 0], [-1, -1]])


def _names(header: dict[str, Any], draw: random.Random) -> None:
    name = draw.choice(sorted(header))
    how = draw.randrange(5)
    if how == 0:
        del header[name]
    elif how == 1:
        header[draw.choice(odd_json.TEXTS)] = header.pop(name)
    elif how == 2:
        at = draw.randrange(len(name))
        header[name[:at] + draw.choice("\0\n\r\x1b\u202e .xX0é") + name[at + 1 :]] = header.pop(
            name
        )
    elif how == 3:
        other = draw.choice(sorted(header))
        header[name], header[other] = header[other], header[name]
    else:
        header[name + draw.choice([".weight", "_packed", "_scale", ".bias"])] = header.pop(name)


def _entries(header: dict[str, Any], draw: random.Random) -> None:
    name = draw.choice(sorted(header))
    how = draw.randrange(5)
    if how == 4:
        _add_empty(header, draw)
    elif how == 0:
        header[name] = odd_json.value(draw)
    elif how == 1:
        header[name].pop(draw.choice(sorted(header[name])))
    elif how == 2:
        header[name][draw.choice(odd_json.TEXTS)] = odd_json.value(draw)
    else:
        header["__metadata__"] = odd_json.value(draw)


def _add_empty(header: dict[str, Any], draw: random.Random) -> None:
    """Add a layer without a byte, whose other dimension may be anything."""
    layer = f"model.layers.{draw.choice([0, 1, 7])}.mlp.{draw.choice(['up_proj', 'new_proj'])}"
    size = draw.choice([0, 1, 64, 2**20, 2**40, 2**41, 2**58, 2**62, 2**63, 2**64 - 1])
    end = max(entry["data_offsets"][1] for entry in header.values())
    shapes: dict[str, tuple[str, list[int]]] = {".weight": ("BF16", [0, size])}
    if draw.random() < 0.5:
        shapes = {".weight": ("BF16", [size, 0])}
    if draw.random() < 0.5:
        shapes = {
            ".weight_packed": ("U8", [0, size // 2]),
            ".weight_meta": ("U8", [0, size // 32]),
            ".weight_row_exponent": ("I8", [0]),
        }
    for suffix, (dtype, shape) in shapes.items():
        header[layer + suffix] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end]}


def _change_json(
    name: str, change: Callable[[dict[str, Any], random.Random], None]
) -> Callable[[Path, random.Random], None]:
    """A mutation of a file as JSON."""

    def apply(directory: Path, draw: random.Random) -> None:
        path = directory / name
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            change(data, draw)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return  # it has none, or an earlier mutation left nothing to change
        path.write_bytes(odd_json.dump(data, draw))

    return apply


def _file_names(index: dict[str, Any], draw: random.Random) -> None:
    names = index["weight_map"]
    odd = [*odd_json.TEXTS, "../source/model.safetensors", "/etc/passwd", "a/../model.safetensors"]
    odd += [".safetensors", "..safetensors", "model.safetensors", "a\0.safetensors"]
    odd += ["é" * 200 + ".safetensors", "MODEL-00001-OF-00003.SAFETENSORS", "config.json"]
    chosen = names if draw.random() < 0.1 else draw.sample(sorted(names), draw.choice([1, 1, 2]))
    for name in chosen:
        names[name] = draw.choice([*odd, *sorted(set(names.values())), odd_json.value(draw)])


def _config_keys(config: dict[str, Any], draw: random.Random) -> None:
    keys = (
        *("architectures", "text_config", "llm_config", "num_hidden_layers", "n_layer"),
        *("tie_word_embeddings", "auto_map", "quantization_config", "compression_config"),
        *("attention_k_eq_v", "num_kv_shared_layers", "model_type", "torch_dtype"),
    )
    near = [["LlamaForCausalLM"], "LlamaForCausalLM", {"auto_map": {}}, {"num_hidden_layers": 1}]
    near += [{"quant_method": "gptq"}, {"AutoConfig": "modeling.Config"}, {"A": ["m.A", None]}]
    config[draw.choice(keys)] = draw.choice([*near, odd_json.value(draw), odd_json.value(draw)])


def _scheme(config: dict[str, Any], draw: random.Random) -> None:
    scheme = config["quantization_config"]
    layer = "model.layers.1.mlp.up_proj"
    values: Mapping[str, list[Any]] = {
        "block_size": [16, 32, 64, 32.0, "32", 0, -16, 48, 128],
        "book": ["dialect_fp4", "semantic_32", "DIALECT_FP4", "mxfp4"],
        "format_version": [1, 0, 2, 1.0, True, "1", 2**70],
        "serialized": [True, False, 1, 0, "true"],
        "activation_format": ["dialect", "fp8", "none", None, "int8"],
        "ignore": [[], [layer], ["re:.*"], ["re:("], ["re:a{4294967296}"], ["re:" + "(" * 5000]],
        "overrides": [
            *({}, {layer: {"block_size": 16}}, {"re:(": {"block_size": 16}}, {layer: 16}),
            *({layer: {"book": "semantic_32"}}, {layer: {"rotation": "hadamard_32"}}, {layer: {}}),
        ],
        "rotation": ["none", "hadamard_32", "hadamard", None],
        "lm_head": [True, False, 1, "yes"],
        "quant_method": ["blockdialect", "BlockDialect", "gptq"],
    }
    key = draw.choice([*values, *values, *odd_json.TEXTS])
    allowed = values.get(key, [])
    if draw.random() < 0.1:
        scheme.pop(key, None)
    else:
        scheme[key] = draw.choice([*allowed, *allowed, odd_json.value(draw)])


def _files(directory: Path, draw: random.Random) -> None:
    path = _file(directory, draw.choice(["*", _SHARD]), draw)
    other = _file(directory, _SHARD, draw)
    if path is None or other is None:
        return
    how = draw.randrange(6)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.rename(directory / draw.choice(["a.safetensors", "consolidated.safetensors", "x.bin"]))
    elif how == 2:
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
    elif how == 3:
        shutil.copyfile(path, directory / f"copy{path.suffix}")
    elif how == 4:
        path.write_bytes(b"")
    else:
        path.unlink()
        path.mkdir()


def _links(directory: Path, draw: random.Random) -> None:
    folder = directory / "1_Pooling"
    if draw.random() < 0.15 and folder.is_dir() and not folder.is_symlink():
        (directory / "1_Pooling").rename(directory / "2_Pooling")
        (directory / "1_Pooling").symlink_to(draw.choice(["/", "..", ".", "2_Pooling", "nothing"]))
        return
    names = ["*", "*.json", _SHARD, "modules.json", "tokenizer.json", _INDEX]
    path = _file(directory, draw.choice(names), draw)
    if path is None or path.is_symlink():
        return
    moved = directory.with_name(f"{directory.name}-moved")
    shutil.copyfile(path, moved)
    path.unlink()
    how = draw.randrange(8)
    if how == 0:
        os.mkfifo(path)
        return
    goals = [moved, Path("..", moved.name), Path(path.name), Path("nothing"), directory]
    goals += [Path("/dev/zero"), Path("/dev/null")]
    path.symlink_to(goals[how - 1])


def _companions(directory: Path, draw: random.Random) -> None:
    name = draw.choice(["modules.json", "tokenizer_config.json", "generation_config.json"])
    texts = [*odd_json.TEXTS, "1_Pooling", "tokenizer.json", "é" * 200, "..", "/", "/dev"]
    entries = [{"path": draw.choice([*texts, odd_json.value(draw)])} for _ in range(3)]
    values = [entries, {"a": draw.choice(texts), "auto_map": odd_json.value(draw)}]
    (directory / name).write_bytes(
        odd_json.dump(draw.choice([*values, odd_json.value(draw)]), draw)
    )


KINDS: Mapping[str, Callable[[Path, random.Random], None]] = {
    "header: bits": _change_bytes(_SHARD, _flip_header),
    "header: its length": _change_bytes(_SHARD, _header_length),
    "header: offsets": _change_header(_offsets),
    "header: dtypes": _change_header(_dtype),
    "header: shapes": _change_header(_shape),
    "header: names": _change_header(_names),
    "header: entries": _change_header(_entries),
    "data: bits": _change_bytes(_SHARD, _flip_data),
    "data: bytes overwritten": _change_bytes(_SHARD, _overwrite),
    "files: cut, shortened, extended": _change_bytes(_SHARD, _change_length),
    "files: missing, exchanged, doubled": _files,
    "files: links, pipes, devices": _links,
    "index: file names": _change_json(_INDEX, _file_names),
    "index: values": _change_json(_INDEX, odd_json.change),
    "index: text": _change_bytes(_INDEX, odd_json.change_text),
    "config.json: values": _change_json("config.json", odd_json.change),
    "config.json: known keys": _change_json("config.json", _config_keys),
    "config.json: text": _change_bytes("config.json", odd_json.change_text),
    "config.json: bits": _change_bytes("config.json", _flip_anywhere),
    "quantization_config": _change_json("config.json", _scheme),
    "other JSON files": _companions,
}
"""Name of a way to damage a checkpoint -> what does it to a directory."""
