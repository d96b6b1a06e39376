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

from dataclasses import dataclass
from functools import lru_cache

import torch

from .formatbook import BLOCK_SIZES, E4M3_WINDOW, Formatbook

__all__ = ["NAN_ROW", "PackedTensor", "pack_codes", "power_of_two", "unpack_codes"]

NAN_ROW = -128
"""Row exponent of a row that held NaN or Inf; never stored in files."""
_ROW_EXPONENT_RANGE = (-120, 125)


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A 2-D tensor in a dialect format. Immutable; all tensors live on one device.

    Attributes:
        codes: uint8 [N, Kp/2].
        meta: uint8 [N, Kp/B].
        row_exponent: int8 [N].
        shape: (N, K), K before padding.
        book: the formatbook the ids of `meta` refer to.
        block_size: B, 16, 32 or 64.

    Raises:
        ValueError: on construction, if dtypes, shapes, devices or the block size do not fit.
    """

    codes: torch.Tensor
    meta: torch.Tensor
    row_exponent: torch.Tensor
    shape: tuple[int, int]
    book: Formatbook
    block_size: int

    def __post_init__(self) -> None:
        rows, columns = self.shape
        check_block_size(self.block_size)
        padded = padded_columns(columns, self.block_size)
        for name, tensor, dtype, shape in (
            ("codes", self.codes, torch.uint8, (rows, padded // 2)),
            ("meta", self.meta, torch.uint8, (rows, padded // self.block_size)),
            ("row_exponent", self.row_exponent, torch.int8, (rows,)),
        ):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name}: {tensor.dtype} {list(tensor.shape)} does not fit a "
                    f"{rows} x {columns} tensor in blocks of {self.block_size}; "
                    f"it must be {dtype} {list(shape)}"
                )
            if tensor.device != self.codes.device:
                raise ValueError(
                    f"{name}: is on {tensor.device}, codes on {self.codes.device}; move them to "
                    "one device"
                )

    @property
    def device(self) -> torch.device:
        """Device of the three tensors."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, meta and row exponents together."""
        return self.codes.nbytes + self.meta.nbytes + self.row_exponent.nbytes

    @property
    def bits_per_element(self) -> float:
        """Stored bits per unpadded element: 4 + 8/B + 8/K where K is a multiple of B."""
        return 8 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> PackedTensor:
        """Return a copy on `device` (itself if it is there already)."""
        if torch.device(device) == self.device:
            return self
        return self._with(
            self.codes.to(device), self.meta.to(device), self.row_exponent.to(device), self.shape
        )

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
        exponent = self.row_exponent.to(torch.int32)
        scale = power_of_two(exponent.clamp(min=-120) - 5)
        return torch.where(exponent == NAN_ROW, torch.nan, scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values as `dtype` [N, K].

        float32 holds every value exactly; bfloat16 does for R - delta >= -132; float16 rounds or
        overflows where its range ends.
        """
        e4m3, scale = self.to_e4m3()
        return (e4m3.to(torch.float32) * scale[:, None]).to(dtype)

    def to_e4m3(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tensor as FP8, exactly: (float8_e4m3fn [N, K], float32 scale [N]).

        A value is ``e4m3 * scale``, where the scale is ``2**(R - 5)`` and the product exact (ours).
        """
        table = tuple(row for by_delta in self.book.e4m3_lut for row in by_delta)
        by_byte = _byte_pairs(table, torch.uint8, self.device)
        row = self.deltas().to(torch.int32) * len(self.book) + self.ids()
        e4m3 = self._look_up(by_byte, row).view(torch.float8_e4m3fn)
        return e4m3[:, : self.shape[1]].contiguous(), self.row_scale()

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
                multiple of the block size (`stop` may be K).
        """
        rows, columns = self.shape
        block = self.block_size
        if not 0 <= start <= stop <= columns:
            raise ValueError(f"slice_columns: {start}..{stop} is not inside 0..{columns}")
        if start % block or (stop % block and stop != columns):
            raise ValueError(
                f"slice_columns: {start}..{stop} cuts a block of {block}; use multiples of {block}"
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
        low, high = _ROW_EXPONENT_RANGE
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
            codes.contiguous(),
            meta.contiguous(),
            row_exponent.contiguous(),
            shape,
            self.book,
            self.block_size,
        )


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless `block_size` is 16, 32 or 64."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: {block_size!r}; allowed are 16, 32 and 64")


def padded_columns(columns: int, block_size: int) -> int:
    """K rounded up to whole blocks."""
    return -(-columns // block_size) * block_size


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes, uint8 [N, Kp] (Kp even) -> uint8 [N, Kp/2], even elements low."""
    packed: torch.Tensor = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_codes`, uint8 [N, Kp/2] -> uint8 [N, Kp]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """``2**exponent`` as float32, exact, for int32 exponents in -126..127 (not checked)."""
    bits: torch.Tensor = (exponent + 127) << 23
    return bits.view(torch.float32)


@lru_cache(maxsize=32)
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
