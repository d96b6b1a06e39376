"""How a compiled kernel moves tensors: sectors of global memory, wavefronts of shared memory.

Read from the layouts in Triton's intermediate code, which say where every thread's elements lie.
A *wavefront* is what shared memory gives in a cycle: one word from each of its 32 banks. A *sector*
is the 32 bytes that a request to global memory moves at least.

Lanes that want 16 bytes each are served eight at a time, those that want 8 bytes sixteen at a time.
A load by `ldmatrix` counts as one of 4 bytes: eight rows of 16 bytes are 32 words too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import prod

__all__ = [
    "Access",
    "Blocked",
    "Linear",
    "Swizzled",
    "accesses",
    "scattered_words",
    "sectors",
    "wavefronts",
]

_BITS = {"i8": 8, "i16": 16, "i32": 32, "i64": 64, "bf16": 16, "f16": 16, "f32": 32}
_BITS["f8E4M3FN"] = 8
_WARP = 32

Place = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """Which element a thread has: the exclusive or of a place for every set bit of its numbers.

    Attributes:
        register, lane, warp: places for bit 0, 1, .. of the numbers of register, lane and warp.
    """

    register: tuple[Place, ...]
    lane: tuple[Place, ...]
    warp: tuple[Place, ...]

    def place(self, register: int, lane: int, warp: int) -> Place:
        """Indices of the element that a register holds."""
        chosen = [
            base
            for bases, number in ((self.register, register), (self.lane, lane), (self.warp, warp))
            for bit, base in enumerate(bases)
            if number >> bit & 1
        ]
        zero = (0,) * len((self.register + self.lane + self.warp)[0])
        return reduce(lambda a, b: tuple(x ^ y for x, y in zip(a, b, strict=True)), chosen, zero)


@dataclass(frozen=True)
class Blocked:
    """A tensor in blocks of threads, as Triton's ``#ttg.blocked``."""

    size_per_thread: Place
    threads_per_warp: Place
    warps: Place
    order: Place

    def linear(self, shape: Place) -> Linear:
        """The same for a tensor of this shape, whose sizes are powers of two."""
        size = [1] * len(shape)
        parts: list[list[Place]] = []
        for counts in (self.size_per_thread, self.threads_per_warp, self.warps):
            bases: list[Place] = []
            for axis in self.order:
                for bit in range(counts[axis].bit_length() - 1):
                    step = size[axis] << bit
                    # a tensor that is smaller than its threads lies in several of them
                    bases.append(_unit(axis, step if step < shape[axis] else 0, len(shape)))
                size[axis] *= counts[axis]
            parts.append(bases)
        register, lane, warp = parts
        for axis in self.order:
            while size[axis] < shape[axis]:
                register.append(_unit(axis, size[axis], len(shape)))
                size[axis] *= 2
        return Linear(tuple(register), tuple(lane), tuple(warp))


@dataclass(frozen=True)
class Swizzled:
    """Where elements lie in shared memory: vectors of a row in an order that depends on the row.

    Attributes:
        vector: elements that stay together.
        per_phase: neighbouring rows in the same order.
        phases: orders that there are.
        tile: elements of a row that lie side by side; what follows of the row lies behind the last
            row. 0: the whole row.
        fast: the axis of a row.
    """

    vector: int
    per_phase: int
    phases: int
    fast: int
    tile: int = 0

    def offset(self, place: Place, shape: Place) -> int:
        """The position of an element, counted in elements."""
        slow = [axis for axis in range(len(shape)) if axis != self.fast]
        row = reduce(lambda sum_, axis: sum_ * shape[axis] + place[axis], slow, 0)
        rows = prod(shape[axis] for axis in slow)
        width = self.tile or shape[self.fast]
        block, column = divmod(place[self.fast], width)
        vector = column // self.vector ^ row // self.per_phase % self.phases
        return (block * rows + row) * width + vector * self.vector + column % self.vector


@dataclass(frozen=True)
class Access:
    """A tensor on its way into shared memory or out of it.

    Attributes:
        shape, bits: of the tensor and of an element.
        threads: who has which element.
        memory: where elements lie in shared memory; None for a load into registers.
        reads_global: from global memory, else from shared memory into registers.
        indirect: its addresses were loaded themselves, so that rows say nothing about them.
    """

    shape: Place
    bits: int
    threads: Linear
    memory: Swizzled | None
    reads_global: bool
    indirect: bool


def wavefronts(access: Access) -> tuple[int, int]:
    """Wavefronts of shared memory for all warps of a program, and the fewest there can be."""
    memory = access.memory
    assert memory is not None, "the tensor does not pass through shared memory"

    def address(place: Place) -> int:
        return memory.offset(place, access.shape) * access.bits // 8

    found = least = 0
    for lanes, width in _requests(access, address):
        together = _WARP * 4 // max(4, width)
        for first in range(0, _WARP, together):
            words = {
                start // 4 + word
                for start in lanes[first : first + together]
                for word in range(-(-width // 4))
            }
            banks = [sum(word % 32 == bank for word in words) for bank in range(32)]
            found += max(banks)
            least += -(-len(words) // 32)
    return found, least


def sectors(access: Access) -> tuple[int, int]:
    """Sectors of global memory for all warps, and the fewest for as many bytes of these rows.

    Rows begin at a sector, and the last axis is contiguous in memory.
    """
    row_bytes = 1 << 20

    def address(place: Place) -> int:
        row = reduce(lambda a, b: a * 4096 + b, place[:-1], 0)
        return row * row_bytes + place[-1] * access.bits // 8

    found = least = 0
    for lanes, width in _requests(access, address):
        wanted = {start + byte for start in lanes for byte in range(width)}
        found += len({byte // 32 for byte in wanted})
        rows = [byte // row_bytes for byte in wanted]
        least += sum(-(-rows.count(row) // 32) for row in set(rows))
    return found, least


def _requests(access: Access, address: object) -> Iterator[tuple[list[int], int]]:
    """First bytes of all lanes and their width, for every instruction of every warp."""
    assert callable(address)
    threads, size = access.threads, max(1, access.bits // 8)
    numbers = range(1 << len(threads.register))
    # registers of the first lane by address; those that follow each other move together
    by_address = {address(threads.place(number, 0, 0)): number for number in reversed(numbers)}
    width = 16
    while width > size and any(
        (start - start % width) + byte not in by_address
        for start in by_address
        for byte in range(0, width, size)
    ):
        width //= 2
    firsts = sorted(number for start, number in by_address.items() if start % width == 0)
    for warp, number in product(range(1 << len(threads.warp)), firsts):
        yield [address(threads.place(number, lane, warp)) for lane in range(_WARP)], width


def accesses(ttgir: str) -> list[Access]:
    """Loads and copies of the main loop that layouts describe, each kind of them once.

    Operands that the MMA reads from shared memory itself are no loads, and their swizzle is the
    hardware's own.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.(\w+<\{.*\}>)", ttgir, re.MULTILINE))
    loop = re.search(r"^( *)%[^\n]* = scf\.for .*?^\1\}", ttgir, re.MULTILINE | re.DOTALL)
    assert loop, "there is no loop"
    found: dict[Access, None] = {}
    for line in loop[0].splitlines():
        if "ttg.async_copy_global_to_local" in line:
            match = re.search(r"tensor<([\dx]+)x!tt\.ptr<(\w+)>, (#\w+)> -> <[^,]*, (#\w+)", line)
        elif "ttg.local_load" in line:
            match = re.search(r"memdesc<[^,]*, ()()(#\w+).*-> tensor<([\dx]+)x(\w+), (#\w+)>", line)
        elif "tt.load" in line:
            match = re.search(r"tensor<([\dx]+)x!tt\.ptr<(\w+)>, (#\w+)>()", line)
        else:
            continue
        if match is None:
            continue
        groups = [group for group in match.groups() if group]
        if "ttg.local_load" in line:
            memory, shape, kind, threads = groups
        else:
            shape, kind, threads, *rest = groups
            memory = rest[0] if rest else ""
        sizes = tuple(int(size) for size in shape.split("x"))
        layout = _threads(layouts.get(threads, ""), sizes)
        if layout is None:
            continue
        access = Access(
            sizes,
            _BITS[kind],
            layout,
            _memory(layouts[memory], _BITS[kind]) if memory else None,
            "local_load" not in line,
            kind == "i64",
        )
        found[access] = None
    return list(found)


def scattered_words(ttgir: str) -> list[str]:
    """Inline assembly that is given words of elements which are not neighbours in a row.

    Triton packs so many registers of a thread as the assembly asks for, whatever is in them. A
    number of 32 bits is a word of its own.

    Returns:
        For each, how many elements of which tensor.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.(\w+<\{.*\}>)", ttgir, re.MULTILINE))
    found = []
    for line in ttgir.splitlines():
        match = re.search(r"packed_element = (\d+).*? : tensor<([\dx]+)x(\w+), (#\w+)>", line)
        if match is None or match[1] == "1" or _BITS[match[3]] >= 32:
            continue
        packed, sizes = int(match[1]), tuple(int(size) for size in match[2].split("x"))
        threads = _threads(layouts.get(match[4], ""), sizes)
        wanted = [_unit(len(sizes) - 1, 1 << bit, len(sizes)) for bit in range(packed.bit_length())]
        if threads is None or threads.register[: len(wanted) - 1] != tuple(wanted[:-1]):
            found.append(f"{packed} of {match[2]} in {match[4]}")
    return found


def _threads(text: str, shape: Place) -> Linear | None:
    """The layout of a tensor in registers; None if it is one of an MMA."""
    if text.startswith("blocked"):
        return Blocked(
            *(_numbers(text, name) for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")),
            _numbers(text, "order"),
        ).linear(shape)
    if text.startswith("linear"):
        return Linear(*(_places(text, name) for name in ("register", "lane", "warp")))
    return None


def _memory(text: str, bits: int) -> Swizzled:
    if text.startswith("swizzled_shared"):
        vector, per_phase, phases = (
            int(re.search(rf"{name} = (\d+)", text)[1])  # type: ignore[index]
            for name in ("vec", "perPhase", "maxPhase")
        )
        return Swizzled(vector, per_phase, phases, _numbers(text, "order")[0])
    match = re.search(r"swizzlingByteWidth = (\d+), transposed = false", text)
    assert match, text
    swizzle = int(match[1])
    return Swizzled(
        128 // bits, max(1, 128 // max(16, swizzle)), max(1, swizzle // 16), 1, swizzle * 8 // bits
    )


def _numbers(text: str, name: str) -> Place:
    match = re.search(rf"{name} = \[([\d, ]*)\]", text)
    assert match, text
    return tuple(int(number) for number in match[1].split(","))


def _places(text: str, name: str) -> tuple[Place, ...]:
    match = re.search(rf"{name} = \[((?:\[[\d, ]*\](?:, )?)*)\]", text)
    assert match, text
    return tuple(
        tuple(int(number) for number in place.split(","))
        for place in re.findall(r"\[([\d, ]+)\]", match[1])
    )


def _unit(axis: int, value: int, axes: int) -> Place:
    return tuple(value if place == axis else 0 for place in range(axes))
