"""Reading checkpoints: which tensors lie where, checked against each other first.

Only safetensors are read. Nothing here loads a model or runs code that came with one.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dialect_kernels import PackedTensor
from dialect_kernels.layer_names import is_expression, near_misses
from dialect_kernels.packed import STORED_FIELDS

from ..architectures import is_candidate, is_embedding
from ..experts import WEIGHT, ExpertMatrix, ExpertTensor, layout_of, names_of
from ..scheme import Scheme, SchemeError
from .json_files import CheckpointError, read_json, unique_keys

__all__ = [
    "CONFIG",
    "INDEX",
    "JOURNAL",
    "PACKED_SUFFIXES",
    "Checkpoint",
    "CheckpointError",
    "PackedCheckpoint",
    "TensorInfo",
    "find_checkpoint",
    "open_checkpoint",
    "open_packed",
]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
JOURNAL = ".blockdialect-journal.json"
PACKED_SUFFIXES = tuple(f".{field.stored}" for field in STORED_FIELDS)
"""What the names of a packed layer's tensors end in."""

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_OTHER_FORMAT = "consolidated*.safetensors"
"""Mistral's own format, beside which repositories hold the same weights under transformers' names.

vLLM prefers these files wherever they lie, so that a packed checkpoint must not hold them.
"""
_HUB_FILES = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_HUB_LEFT_OUT = ("*.py", _OTHER_FORMAT, "[!0-9]*/*.safetensors")
"""Of the folders only those with a number hold weights of the model (sentence-transformers)."""
_LARGEST_DIMENSION = 1 << 40
"""Of an empty tensor, which may have any; torch fails where sizes leave 64 bits."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is.

    Attributes:
        shard: file name inside the checkpoint's directory.
        dtype: safetensors' name of the dtype, e.g. ``"BF16"``.
        shape: its dimensions.
        nbytes: its size.
        offset: position of its first byte in the file.
        rows_among_others: where the rows of an expert's matrix lie in a tensor of all experts, of
            which the offset is that of this expert's part; None if its rows follow each other.
    """

    shard: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    rows_among_others: ExpertMatrix | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors files with a config.json.

    Attributes:
        path: the directory.
        config: contents of config.json.
        shards: file names, sorted.
        tensors: every tensor by name, in the order of the shards and of the bytes in them.
        unheld: tensors that the index lists and no shard holds, sorted.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[str, ...]
    tensors: dict[str, TensorInfo]
    unheld: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """The first entry of ``architectures``.

        Raises:
            CheckpointError: if config.json names none.
        """
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise CheckpointError(
                f"{self.path / CONFIG}: architectures is {names!r}; it must be a list with the "
                "model class's name, such as ['LlamaForCausalLM']"
            )
        return names[0]

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output projection is the embedding matrix."""
        text = self.config.get("text_config")
        config = text if isinstance(text, dict) else self.config
        return bool(config.get("tie_word_embeddings", False))

    def linear_layers(self) -> list[str]:
        """Names of modules with a 2-D floating-point ``.weight`` (embeddings included).

        Every matrix of an expert is a layer of its own, named as :mod:`..experts` does.
        """
        return list(self.weights)

    @cached_property
    def weights(self) -> dict[str, TensorInfo]:
        """Linear layer -> its weight [N, K]: a tensor, or a part of a tensor of experts."""
        return {
            layer: info for weights in self._weights_in.values() for layer, info in weights.items()
        }

    def layers_in(self, tensor: str) -> Sequence[str]:
        """The linear layers whose weights the tensor holds: one, an expert's many, or none."""
        return tuple(self._weights_in.get(tensor, ()))

    @cached_property
    def _weights_in(self) -> dict[str, dict[str, TensorInfo]]:
        """Tensor -> linear layers whose weights it holds -> these."""
        names = self.config.get("architectures")
        layout = layout_of(names if isinstance(names, list) else ())
        found: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            if not _is_float(info.dtype):
                continue
            experts = ExpertTensor.of(name)
            if experts is not None and experts.field == WEIGHT and experts.fits(info.shape):
                matrices = experts.matrices(info.shape, layout)
                found[name] = {matrix.layer: _part(info, matrix) for matrix in matrices}
            elif name.endswith(".weight") and len(info.shape) == 2:
                found[name] = {name.removesuffix(".weight"): info}
        return found

    def read_bytes(self, name: str, chunk_bytes: int) -> Iterator[bytes]:
        """The stored bytes of a tensor, at most `chunk_bytes` at a time.

        Read from the file instead of mapping it, so that memory stays at one chunk.

        Raises:
            CheckpointError: if the file ends before the tensor does.
        """
        info = self.tensors[name]
        with self._open_at(info) as file:
            left = info.nbytes
            while left:
                chunk = file.read(min(left, chunk_bytes))
                if not chunk:
                    raise self._changed(info)
                left -= len(chunk)
                yield chunk

    def read_rows(self, layer: str, chunk_elements: int) -> Iterator[torch.Tensor]:
        """The weight of a linear layer in groups of consecutive rows, each about `chunk_elements`.

        Yields:
            [n, K] in the stored dtype, one of BF16, F16 and F32; the last may have fewer rows.

        Raises:
            CheckpointError: if the file ends before the tensor does.
        """
        info = self.weights[layer]
        rows, columns = info.shape
        step = max(1, chunk_elements // max(1, columns))
        with self._open_at(info) as file:
            if (place := info.rows_among_others) is not None:
                matrix = place.cut_own(self._read(file, info, *place.own))
                yield from (part.contiguous() for part in torch.split(matrix, step))
                return
            for first in range(0, max(1, rows), step):
                yield self._read(file, info, min(step, rows - first), columns)

    def _read(self, file: FileIO, info: TensorInfo, rows: int, columns: int) -> torch.Tensor:
        """The next numbers of a file, in the dtype of `info`."""
        found = torch.empty(rows, columns, dtype=_DTYPES[info.dtype])
        left = found.view(torch.uint8).flatten().numpy().data
        while left:
            read = file.readinto(left)  # into the tensor: no copy of the bytes
            if not read:
                raise self._changed(info)
            left = left[read:]
        return found

    @contextmanager
    def open_shard(self, shard: str) -> Iterator[Any]:
        """The open safetensors file `shard`, as a context manager.

        Raises:
            CheckpointError: if the file is damaged.
        """
        with _named_faults(self.path / shard), safe_open(self.path / shard, framework="pt") as file:
            yield file

    @contextmanager
    def _open_at(self, info: TensorInfo) -> Iterator[FileIO]:
        """The file that holds a tensor, open at the tensor's first byte."""
        try:
            with (self.path / info.shard).open("rb", buffering=0) as file:
                file.seek(info.offset)
                yield file
        except OSError as error:
            raise CheckpointError(
                f"{self.path / info.shard}: cannot be read any more ({error.strerror}); leave the "
                "source alone during a conversion, and run the same command again"
            ) from None

    def _changed(self, info: TensorInfo) -> CheckpointError:
        return CheckpointError(
            f"{self.path / info.shard}: became shorter while it was read; leave the source alone "
            "during a conversion"
        )


@dataclass(frozen=True)
class PackedCheckpoint(Mapping[str, PackedTensor]):
    """A checkpoint that was packed by ``blockdialect quantize``: a mapping of its packed layers.

    ``packed["model.layers.0.mlp.down_proj"]`` reads that layer's weight from disk and checks it;
    nothing is kept in memory.

    Attributes:
        checkpoint: its files.
        scheme: its quantization_config.
        layers: names of the packed layers, in the order of the shards.
    """

    checkpoint: Checkpoint
    scheme: Scheme
    layers: tuple[str, ...]

    def __getitem__(self, name: str) -> PackedTensor:
        if name not in self.layers:
            near = near_misses(name, self.layers) if isinstance(name, str) else []
            hint = f"; similar names are {', '.join(near)}" if near else ""
            raise KeyError(f"{name!r} is not a packed layer of {self.checkpoint.path}{hint}")
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, name: object) -> bool:
        return name in self.layers  # without reading it

    def __repr__(self) -> str:
        return f"PackedCheckpoint({str(self.checkpoint.path)!r}, {len(self.layers)} packed layers)"

    def read(self, name: str) -> PackedTensor:
        """Read and check the packed weight of the layer `name`.

        Raises:
            CheckpointError: if a tensor is missing, does not fit or holds reserved values (naming
                tensor and position).
        """
        tensors = []
        for suffix in PACKED_SUFFIXES:
            info = self.checkpoint.tensors.get(name + suffix)
            if info is None:
                raise CheckpointError(
                    f"{self.checkpoint.path}: the tensor {name + suffix} is missing; convert the "
                    "model again"
                )
            with self.checkpoint.open_shard(info.shard) as file:
                tensors.append(file.get_tensor(name + suffix))
        codes, meta, row_exponent = tensors
        shape = (codes.shape[0], codes.shape[1] * 2) if codes.dim() == 2 else (0, 0)
        form = self.scheme.layer(name)
        try:
            packed = PackedTensor(
                codes,
                meta,
                row_exponent,
                shape,
                form.formatbook,
                form.block_size,
                form.rotation,
            )
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.path}: layer {name}: {error}") from None
        try:
            packed.validate(name, prefix="weight_")
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {error}") from None
        return packed


def find_checkpoint(source: str | Path) -> Path:
    """The directory of a checkpoint given as a directory or as a hub id.

    Raises:
        CheckpointError: if it is neither.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(
            f"{source}: is not a directory; give a directory with config.json and safetensors "
            "files, or a hub id such as organisation/model"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                str(source),
                allow_patterns=list(_HUB_FILES),
                ignore_patterns=list(_HUB_LEFT_OUT),
            )
        )
    except Exception as error:  # the hub's client raises some twenty classes
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise CheckpointError(
            f"{source}: is not a local directory, and it could not be downloaded from the hub "
            f"({reason}); download the model and give its directory"
        ) from None


def open_checkpoint(path: Path) -> Checkpoint:
    """Read config.json, the index and all headers, and check them against each other.

    The headers decide which tensors there are; engines do not read the index for that either.

    Raises:
        CheckpointError: one sentence on the first fault.
    """
    config = read_json(path / CONFIG)
    shards = _shard_names(path)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in _read_header(path, shard).items():
            if name in tensors:
                raise CheckpointError(
                    f"{path}: the tensor {name} is in {tensors[name].shard} and again in {shard}; "
                    "remove the file that does not belong to the model"
                )
            tensors[name] = info
    listed = _weight_map(path) if (path / INDEX).exists() else {}
    unheld = tuple(sorted(listed.keys() - tensors.keys()))
    return Checkpoint(path, config, shards, tensors, unheld)


def open_packed(path: str | Path) -> PackedCheckpoint:
    """Open a checkpoint that ``blockdialect quantize`` has written.

    Args:
        path: its directory.

    Raises:
        CheckpointError: if it is not one, or its layers and its scheme do not fit together.
        SchemeError: if its quantization_config is not valid.
    """
    path = Path(path)
    if (path / JOURNAL).exists():
        raise CheckpointError(
            f"{path}: is an unfinished conversion; run the same blockdialect quantize again"
        )
    checkpoint = open_checkpoint(path)
    data = checkpoint.config.get("quantization_config")
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path / CONFIG}: has no quantization_config; this is not a packed checkpoint: make "
            "one with blockdialect quantize"
        )
    scheme = Scheme.parse(data, f"{path / CONFIG}: quantization_config")
    if not scheme.serialized:
        raise SchemeError(
            f"{path / CONFIG}: quantization_config: serialized is false; it must be true in a "
            "packed checkpoint: convert the model again"
        )
    if checkpoint.unheld:
        raise CheckpointError(
            f"{path / INDEX}: lists {checkpoint.unheld[0]}, which no file holds; copy the packed "
            "checkpoint again"
        )
    found = Counter(
        name.removesuffix(suffix)
        for name in checkpoint.tensors
        for suffix in PACKED_SUFFIXES
        if name.endswith(suffix)
    )
    _check_packed_layers(checkpoint, scheme, found)
    return PackedCheckpoint(checkpoint, scheme, tuple(found))


def _check_packed_layers(checkpoint: Checkpoint, scheme: Scheme, found: Collection[str]) -> None:
    """Raise CheckpointError unless the layers `found` packed are those that the scheme names."""
    path = checkpoint.path
    for name in found:
        if scheme.is_ignored(name) or name in checkpoint.weights:
            raise CheckpointError(
                f"{path}: the layer {name} is stored packed although config.json ignores it or a "
                "16-bit weight is stored too; convert the model again"
            )
    for name in checkpoint.linear_layers():
        if is_candidate(name) and not scheme.is_ignored(name):
            raise CheckpointError(
                f"{path}: {name}.weight is stored in 16 bit although config.json does not ignore "
                "it; convert the model again"
            )
    if scheme.lm_head and "lm_head" not in found:
        raise CheckpointError(
            f"{path}: config.json says that lm_head is packed, but it is not; convert the model "
            "again"
        )
    embeddings = [name for name in found if is_embedding(name)]
    if scheme.embeddings != bool(embeddings):
        says, holds = ("", " not") if scheme.embeddings else (" not", "")
        raise CheckpointError(
            f"{path}: config.json says that the embeddings are{says} packed, but they are{holds}; "
            "convert the model again"
        )
    for name in embeddings:
        if (rotation := scheme.layer(name).rotation) != "none":
            raise CheckpointError(
                f"{path}: config.json says that {name} has the rotation {rotation}, but embeddings "
                "are never rotated; convert the model again"
            )
    known = {name for layer in found for name in names_of(layer)}
    for name in scheme.overrides:
        if not is_expression(name) and name not in known:
            raise CheckpointError(
                f"{path}: config.json has an override for {name}, but no such layer is packed; "
                "convert the model again"
            )


def _weight_map(path: Path) -> dict[str, str]:
    """The index: tensor -> file name."""
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX}: has no weight_map; it must map tensors to files")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or _is_path(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path / INDEX}: gives {name!r} as the file of {tensor}; it must be the name of "
                "a file in the same directory that ends in .safetensors"
            )
    return weight_map


def _shard_names(path: Path) -> tuple[str, ...]:
    """The names of the safetensors files that hold the model."""
    if (path / INDEX).exists():
        names = sorted(set(_weight_map(path).values()))
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
        own_format = {file.name for file in path.glob(_OTHER_FORMAT)}
        if names and not own_format.issuperset(names):
            names = [name for name in names if name not in own_format]
        elif names:
            raise CheckpointError(
                f"{path}: holds {names[0]}, Mistral's own format, and no weights under "
                "transformers' names; give a repository that holds model.safetensors"
            )
    if not names:
        others = sorted(p.name for s in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in path.glob(s))
        if others:
            raise CheckpointError(
                f"{path}: holds {others[0]} but no safetensors files; only safetensors are read: "
                "load the model in transformers and save_pretrained it"
            )
        raise CheckpointError(f"{path}: holds no safetensors files; give a model's directory")
    for name in names:
        if not _is_file(path / name):
            raise CheckpointError(f"{path}: the file {name} is missing; download the model again")
    return tuple(names)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no file can have such a name
        return False


def _is_path(name: str) -> bool:
    return "/" in name or "\\" in name or PurePosixPath(name).name != name


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("BF", "F"))


def _part(info: TensorInfo, matrix: ExpertMatrix) -> TensorInfo:
    """The weight of one expert in a tensor."""
    if matrix.number is None and matrix.own == (matrix.rows, matrix.columns):
        return info
    element = info.nbytes // math.prod(info.shape) if info.nbytes else 0
    offset = info.offset + (matrix.number or 0) * math.prod(matrix.own) * element
    if not matrix.scattered:
        offset += matrix.first * matrix.columns * element
    shape = (matrix.rows, matrix.columns)
    nbytes = math.prod(shape) * element
    place = matrix if matrix.scattered else None
    return TensorInfo(info.shard, info.dtype, shape, nbytes, offset, place)


def _read_header(path: Path, shard: str) -> dict[str, TensorInfo]:
    """Names, dtypes, shapes and positions; safetensors checks them against the file's size."""
    with _named_faults(path / shard):
        with safe_open(path / shard, framework="pt"):
            pass
        with (path / shard).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path / shard}: its header cannot be read ({error}); download or convert it again"
        ) from None
    header.pop("__metadata__", None)
    for name in header:
        if not name.isprintable():
            raise CheckpointError(
                f"{path / shard}: the name of the tensor {name!r} cannot be printed; rename it"
            )
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if max(shape, default=0) > _LARGEST_DIMENSION:
            raise CheckpointError(
                f"{path / shard}: {name} has the shape {list(shape)}; no dimension may be larger "
                "than 2**40: download or convert it again"
            )
        tensors[name] = TensorInfo(shard, entry["dtype"], shape, end - begin, 8 + length + begin)
    return tensors


@contextmanager
def _named_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({reason}); download or convert it again"
        ) from None
