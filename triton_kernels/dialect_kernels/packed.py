"""A packed dialect tensor: 4-bit codes, one meta byte per block, one exponent per row.

Layout (format version 1), for a tensor of N rows and K columns, Kp = K rounded up to blocks of B::

    codes         uint8 [N, Kp/2]   element 2i in the low nibble, 2i+1 in the high nibble
    meta          uint8 [N, Kp/B]   delta << id_bits | dialect id
    row_exponent  int8  [N]         R; -128 marks a NaN row (activations only)

    value = half_unit(dialect, code) * 2**(R - delta - 1)

Codes and dialects: BlockDialect; the row exponent, the deltas relative to it and the byte layout:
ours. With ``f = 4 - delta`` every ``half_unit * 2**f`` is an E4M3 number, so a row *is* an FP8 row
with the scale ``2**(R - 5)``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch

from .arithmetic import padded_columns, power_of_two, row_scale
from .device_tables import kept_tables
from .formatbook import (
    BLOCK_SIZES,
    BOOKS,
    E4M3_WINDOW,
    HIGHEST_EXPONENT,
    LOWEST_EXPONENT,
    NAN_ROW,
    ROTATION_GROUP,
    ROTATIONS,
    Formatbook,
    Rotation,
    book_by_name,
    rotation_by_name,
)
from .rotation import check_rotation

__all__ = [
    "STORED_FIELDS",
    "PackedTensor",
    "bits_per_weight",
    "check_block_size",
    "pack_codes",
]

_FILE_VERSION: Final = 1
_ROTATED_FILE_VERSION: Final = 2


@dataclass(frozen=True)
class _StoredField:
    """One of the three tensors of a packed weight.

    Attributes:
        name: the attribute of :class:`PackedTensor`, e.g. ``"codes"``.
        stored: the name in checkpoints and modules, behind the layer's: ``"weight_packed"``.
        dtype: of the tensor.
        row_shape: (Kp, B) -> the shape of one row's part.
    """

    name: str
    stored: str
    dtype: torch.dtype
    row_shape: Callable[[int, int], tuple[int, ...]] = field(repr=False)

    def shape(self, rows: int, columns: int, block_size: int) -> tuple[int, ...]:
        """Shape of the tensor for a weight of `rows` x `columns` in blocks of `block_size`."""
        return (rows, *self.row_shape(padded_columns(columns, block_size), block_size))


STORED_FIELDS: Final = (
    _StoredField("codes", "weight_packed", torch.uint8, lambda padded, block: (padded // 2,)),
    _StoredField("meta", "weight_meta", torch.uint8, lambda padded, block: (padded // block,)),
    _StoredField("row_exponent", "weight_row_exponent", torch.int8, lambda padded, block: ()),
)
"""Name, stored name, dtype and shape of codes, meta and row exponents: the only such table."""


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A 2-D tensor in a dialect format. Immutable; all tensors live on one device.

    Kernels read the three tensors as bytes one behind the other: a view that is not contiguous is
    copied on construction.

    Attributes:
        codes: uint8 [N, Kp/2].
        meta: uint8 [N, Kp/B].
        row_exponent: int8 [N].
        shape: (N, K), K before padding.
        book: the formatbook the ids of `meta` refer to.
        block_size: B, 16, 32 or 64.
        rotation: what the matrix was multiplied by before it was quantized; products multiply
            their activations by the same.

    Raises:
        ValueError: on construction, if dtypes, shapes, devices, the block size or the rotation do
            not fit.
    """

    codes: torch.Tensor
    meta: torch.Tensor
    row_exponent: torch.Tensor
    shape: tuple[int, int]
    book: Formatbook
    block_size: int
    rotation: Rotation = "none"

    def __post_init__(self) -> None:
        rows, columns = self.shape
        check_block_size(self.block_size)
        check_rotation(self.rotation, columns)
        device, shapes = self.codes.device, _shapes(rows, columns, self.block_size)
        for part, tensor, shape in zip(STORED_FIELDS, self.tensors, shapes, strict=True):
            if tensor.dtype != part.dtype or tensor.shape != shape:
                raise ValueError(
                    f"{part.name}: {tensor.dtype} {list(tensor.shape)} does not fit a "
                    f"{rows} x {columns} tensor in blocks of {self.block_size}; "
                    f"it must be {part.dtype} {list(shape)}"
                )
            if tensor.device != device:
                raise ValueError(
                    f"{part.name}: is on {tensor.device}, codes on {device}; move them to one "
                    "device"
                )
            if not tensor.is_contiguous():
                object.__setattr__(self, part.name, tensor.contiguous())

    @classmethod
    def from_stored(
        cls,
        tensors: Mapping[str, torch.Tensor],
        columns: int,
        book: Formatbook,
        block_size: int,
        rotation: Rotation = "none",
    ) -> PackedTensor:
        """A weight of `columns` columns from its tensors under their stored names.

        Raises:
            KeyError: if one of them is missing.
            ValueError: if dtypes, shapes, devices, the block size or the rotation do not fit.
        """
        codes, meta, row_exponent = (tensors[part.stored] for part in STORED_FIELDS)
        shape = (codes.shape[0], columns)
        return cls(codes, meta, row_exponent, shape, book, block_size, rotation)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        book: Formatbook,
        block_size: int,
        device: torch.device | str | None = None,
        rotation: Rotation = "none",
    ) -> PackedTensor:
        """A tensor of `shape` (N, K) with any contents, e.g. on the meta device."""
        check_block_size(block_size)
        codes, meta, row_exponent = (
            torch.empty(part.shape(*shape, block_size), dtype=part.dtype, device=device)
            for part in STORED_FIELDS
        )
        return cls(codes, meta, row_exponent, shape, book, block_size, rotation)

    @classmethod
    def load(cls, path: str | Path) -> PackedTensor:
        """Read a file that :meth:`save` has written, and check every byte of it.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: one sentence, if it is not a safetensors file, its metadata are not those
                that :meth:`save` writes, or tensors are missing, do not fit or hold reserved
                values.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: is not a file; give one that PackedTensor.save wrote")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path}: cannot be read as safetensors ({error}); save the tensor again"
            ) from None
        shape, book, block_size, rotation = _read_metadata(metadata, str(path))
        names = sorted(part.stored for part in STORED_FIELDS)
        if sorted(tensors) != names:
            raise ValueError(
                f"{path}: holds the tensors {sorted(tensors)}; they must be {names}: save the "
                "tensor again"
            )
        codes, meta, row_exponent = (tensors[part.stored] for part in STORED_FIELDS)
        try:
            packed = cls(codes, meta, row_exponent, shape, book, block_size, rotation)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        packed.validate(str(path), prefix="weight_")
        return packed

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the three tensors, and shape, book and block size as metadata.

        A rotation is written only where there is one: the file then has version 2, else 1. The
        file is there whole or not at all.

        Raises:
            ValueError: if a row is NaN, which a file may not hold.
            OSError: if it cannot be written.
        """
        from safetensors.torch import save

        if (at := _first(self.row_exponent == NAN_ROW)) is not None:
            raise ValueError(
                f"row_exponent: row {at[0]} is NaN; a file holds finite rows only: repair the "
                "tensor and quantize it again"
            )
        self.validate()
        path = Path(path)
        metadata = {
            "format": "pt",
            "format_version": str(_FILE_VERSION),
            "shape": json.dumps(list(self.shape)),
            "book": self.book.name,
            "block_size": str(self.block_size),
        }
        if self.rotation != "none":
            metadata |= {
                "format_version": str(_ROTATED_FILE_VERSION),
                "rotation": self.rotation,
            }
        # clones, because safetensors refuses tensors that share memory
        tensors = {name: tensor.cpu().clone() for name, tensor in self.stored.items()}
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            temporary.write_bytes(save(tensors, metadata=metadata))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def __repr__(self) -> str:
        rows, columns = self.shape
        rotated = "" if self.rotation == "none" else f"{self.rotation}, "
        return (
            f"PackedTensor({rows} x {columns}, {self.book.name}, blocks of {self.block_size}, "
            f"{rotated}{self.bits_per_element:.3f} bits per element, {self.device})"
        )

    @classmethod
    def from_op(
        cls,
        codes: torch.Tensor,
        meta: torch.Tensor,
        row_exponent: torch.Tensor,
        in_features: int,
        book: str,
        block_size: int,
        rotation: str = "none",
    ) -> PackedTensor:
        """The weight that a torch op got; without the bias, in the order of `op_arguments`."""
        shape = (codes.shape[0], in_features)
        of_op = rotation_by_name(rotation)
        return cls(codes, meta, row_exponent, shape, book_by_name(book), block_size, of_op)

    def op_arguments(
        self, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, int, str, int]:
        """Weight and bias as torch ops take them: tensors, numbers and names, in their order.

        The rotation is not among them: it is the last argument of the ops, and may be left out.
        """
        return (*self.tensors, bias, self.shape[1], self.book.name, self.block_size)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, meta and row exponents, in the order of :data:`STORED_FIELDS`."""
        return self.codes, self.meta, self.row_exponent

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """The three tensors under their stored names; the inverse of :meth:`from_stored`."""
        names = (part.stored for part in STORED_FIELDS)
        return dict(zip(names, self.tensors, strict=True))

    @property
    def device(self) -> torch.device:
        """Device of the three tensors."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, meta and row exponents together."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_element(self) -> float:
        """Stored bits per unpadded element: 4 + 8/B + 8/K where K is a multiple of B."""
        return bits_per_weight(self.nbytes, self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> PackedTensor:
        """Return a copy on `device` (itself if it is there already)."""
        if torch.device(device) == self.device:
            return self
        codes, meta, row_exponent = (tensor.to(device) for tensor in self.tensors)
        return self._with(codes, meta, row_exponent, self.shape)

    def ids(self) -> torch.Tensor:
        """Dialect id of each block, uint8 [N, Kp/B]."""
        ids: torch.Tensor = self.meta & ((1 << self.book.id_bits) - 1)
        return ids

    def deltas(self) -> torch.Tensor:
        """Delta of each block as it is read (reserved 14 and 15 as 13), uint8 [N, Kp/B]."""
        delta: torch.Tensor = self.meta >> self.book.id_bits
        return delta.clamp(max=E4M3_WINDOW)

    def signed_half_units(self) -> torch.Tensor:
        """Signed half-units of all elements including padding, int8 [N, Kp]."""
        by_byte = _byte_pairs(self.book.signed_half_units, torch.int8, self.device)
        return self._look_up(by_byte, self.ids().to(torch.int32)).view(torch.int8)

    def block_scale(self) -> torch.Tensor:
        """``2**(R - delta - 1)``, the value of one half-unit, float32 [N, Kp/B]; NaN rows NaN."""
        relative = power_of_two(4 - self.deltas().to(torch.int32))
        return relative * self.row_scale()[:, None]

    def row_scale(self) -> torch.Tensor:
        """``2**(R - 5)``, the FP8 scale of each row, float32 [N]; NaN for NaN rows."""
        return row_scale(self.row_exponent)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values as `dtype` [N, K]; of a rotated tensor, those of the rotated matrix.

        float32 holds every value exactly; bfloat16 does for R - delta >= -132; float16 rounds or
        overflows where its range ends. :func:`~dialect_kernels.rotation.rotate_activation` turns
        the values of a rotated tensor back.
        """
        e4m3, scale = self.to_e4m3()
        return (e4m3.to(torch.float32) * scale[:, None]).to(dtype)

    def to_e4m3(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tensor as FP8, exactly: (float8_e4m3fn [N, K], float32 scale [N]).

        A value is ``e4m3 * scale``, where the scale is ``2**(R - 5)`` and the product exact (ours);
        of a rotated tensor, a value of the rotated matrix.
        """
        table = tuple(row for by_delta in self.book.e4m3_lut for row in by_delta)
        by_byte = _byte_pairs(table, torch.uint8, self.device)
        row = self.deltas().to(torch.int32) * len(self.book) + self.ids()
        e4m3 = self._look_up(by_byte, row).view(torch.float8_e4m3fn)
        return e4m3[:, : self.shape[1]].contiguous(), self.row_scale()

    @classmethod
    def concatenated(cls, parts: Sequence[PackedTensor]) -> PackedTensor:
        """Copies of the rows of `parts`, which have one K, book, block size, rotation and device.

        A single part is returned itself.
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        fields = zip(*(part.tensors for part in parts), strict=True)
        codes, meta, row_exponent = (torch.cat(field) for field in fields)
        return first._with(codes, meta, row_exponent, (codes.shape[0], first.shape[1]))

    def slice_rows(self, start: int, stop: int) -> PackedTensor:
        """Rows start..stop-1: byte for byte what quantizing these rows gives.

        Raises:
            ValueError: if not 0 <= start <= stop <= N.
        """
        rows, columns = self.shape
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"slice_rows: {start}..{stop} is not inside 0..{rows}")
        part = slice(start, stop)
        return self._with(
            self.codes[part], self.meta[part], self.row_exponent[part], (stop - start, columns)
        )

    def slice_columns(self, start: int, stop: int) -> PackedTensor:
        """Columns start..stop-1 with the rows' exponents kept: valid, but not always canonical.

        Raises:
            ValueError: if the range is not inside the tensor, or `start` or `stop` is not a
                multiple of the block size and, in a rotated tensor, of 32 (`stop` may be K).
        """
        rows, columns = self.shape
        block = self.block_size
        unit = block if self.rotation == "none" else max(block, ROTATION_GROUP)
        if not 0 <= start <= stop <= columns:
            raise ValueError(f"slice_columns: {start}..{stop} is not inside 0..{columns}")
        if start % unit or (stop % unit and stop != columns):
            part = "block" if unit == block else "rotated group"
            raise ValueError(
                f"slice_columns: {start}..{stop} cuts a {part} of {unit}; use multiples of {unit}"
            )
        first, last = start // block, -(-stop // block)
        return self._with(
            self.codes[:, first * block // 2 : last * block // 2],
            self.meta[:, first:last],
            self.row_exponent,
            (rows, stop - start),
        )

    def validate(self, name: str = "tensor", *, prefix: str = "") -> None:
        """Check the contents against what a file may hold.

        Raises:
            ValueError: naming tensor, position, value and what is allowed, if a delta is reserved
                (14, 15) or a row exponent lies outside -120..125.
        """
        delta = self.meta >> self.book.id_bits
        if (at := _first(delta > E4M3_WINDOW)) is not None:
            raise ValueError(
                f"{name}.{prefix}meta: byte {int(self.meta[at]):#04x} at {list(at)} holds the "
                f"reserved delta {int(delta[at])}; allowed are 0..{E4M3_WINDOW}: the file is "
                "damaged, convert the model again"
            )
        low, high = LOWEST_EXPONENT, HIGHEST_EXPONENT
        outside = (self.row_exponent < low) | (self.row_exponent > high)
        if (at := _first(outside)) is not None:
            raise ValueError(
                f"{name}.{prefix}row_exponent: {int(self.row_exponent[at])} at {list(at)}; allowed "
                f"are {low}..{high}: the file is damaged, convert the model again"
            )

    def _look_up(self, by_byte: torch.Tensor, table_row: torch.Tensor) -> torch.Tensor:
        """Two elements per code byte from ``by_byte[table_row * 256 + byte]``, int16 [N, Kp/2]."""
        codes = self.codes.view(*self.meta.shape, self.block_size // 2)
        index = codes + (table_row * 256)[:, :, None]
        return by_byte.index_select(0, index.flatten()).view(self.codes.shape)

    def _with(
        self,
        codes: torch.Tensor,
        meta: torch.Tensor,
        row_exponent: torch.Tensor,
        shape: tuple[int, int],
    ) -> PackedTensor:
        return PackedTensor(
            codes, meta, row_exponent, shape, self.book, self.block_size, self.rotation
        )


@lru_cache(maxsize=1024)
def _shapes(rows: int, columns: int, block_size: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the stored tensors, in their order; engines make a tensor of them for each call."""
    return tuple(part.shape(rows, columns, block_size) for part in STORED_FIELDS)


def _read_metadata(
    metadata: Mapping[str, str], where: str
) -> tuple[tuple[int, int], Formatbook, int, Rotation]:
    """Shape, book, block size and rotation of a saved tensor.

    Raises:
        ValueError: naming `where`, the key and its value, if one is missing or wrong.
    """

    def refused(key: str, allowed: str) -> ValueError:
        value = f"is {metadata[key]!r}" if key in metadata else "is missing"
        return ValueError(
            f"{where}: the metadata's {key} {value}; it must be {allowed}: give a file that "
            "PackedTensor.save wrote"
        )

    def value_of(key: str) -> Any:
        try:
            return json.loads(metadata.get(key, ""))
        except (ValueError, RecursionError):
            return None

    version = value_of("format_version")
    if type(version) is not int or version not in (_FILE_VERSION, _ROTATED_FILE_VERSION):
        raise refused("format_version", f"{_FILE_VERSION} or {_ROTATED_FILE_VERSION}")
    shape = value_of("shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and size >= 0 for size in shape)
    ):
        raise refused("shape", "[rows, columns]")
    block_size = value_of("block_size")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise refused("block_size", "16, 32 or 64")
    try:
        book = book_by_name(metadata.get("book", ""))
    except ValueError:
        raise refused("book", " or ".join(BOOKS)) from None
    rotation = metadata.get("rotation", "none")
    if version == _FILE_VERSION and "rotation" in metadata:
        raise refused("rotation", f"absent from a file of version {_FILE_VERSION}")
    if rotation not in ROTATIONS:
        raise refused("rotation", " or ".join(ROTATIONS))
    return (shape[0], shape[1]), book, block_size, rotation_by_name(rotation)


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless `block_size` is 16, 32 or 64."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: {block_size!r}; allowed are 16, 32 and 64")


def bits_per_weight(nbytes: int, weights: int) -> float:
    """Stored bits per weight of packed tensors of `nbytes` bytes that hold `weights` weights.

    4 + 8/B + 8/K for one tensor whose K is a multiple of B; 0 without weights is 0.
    """
    return 8 * nbytes / max(1, weights)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes, uint8 [N, Kp] (Kp even) -> uint8 [N, Kp/2], even elements low."""
    packed: torch.Tensor = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed


@kept_tables
def _byte_pairs(
    table: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Both elements of every code byte for each table row of 16, int16 [rows * 256].

    The low nibble's element lies in the low byte, so that viewing the result as bytes restores the
    order of the elements (little-endian hosts, which is all that torch supports).
    """
    by_code = torch.tensor(table, dtype=dtype).view(torch.uint8)
    byte = torch.arange(256)
    pairs = torch.stack([by_code[:, byte & 15], by_code[:, byte >> 4]], dim=-1)
    return pairs.view(torch.int16).flatten().to(device)


def _first(mask: torch.Tensor) -> tuple[int, ...] | None:
    """Index of the first true element, or None."""
    if not bool(mask.any()):
        return None
    position: list[int] = mask.nonzero()[0].tolist()
    return tuple(position)
