"""Some instructions of PTX, executed in numpy; what they mean is written from the PTX manual."""

import re

import numpy as np

WORD = np.uint64(0xFFFFFFFF)


def prmt(a, b, selector):
    """Four of the eight bytes of a (low) and b; bit 3 of a selector nibble replicates the sign."""
    result = np.zeros_like(selector)
    both = a | (b << np.uint64(32))
    for i in range(4):
        nibble = (selector >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        byte = np.where(nibble & np.uint64(8), sign, byte)
        result |= byte << np.uint64(8 * i)
    return result


def lop3(a, b, c, table):
    """Any function of three bits: bit (a, b, c) of `table`."""
    result = np.zeros_like(a)
    for number in range(8):
        if table >> number & 1:
            terms = [x if number >> place & 1 else ~x for x, place in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result & WORD


def fma_towards_zero(a, b, c):
    """Float32 bits of a * b + c for numbers whose exact result has at most 53 bits."""
    a, b, c = (
        np.asarray(x).astype(np.uint32).view(np.float32).astype(np.float64) for x in (a, b, c)
    )
    exact = a * b + c
    near = exact.astype(np.float32)
    beyond = np.abs(near.astype(np.float64)) > np.abs(exact)
    towards = np.where(beyond, np.nextafter(near, np.float32(0)), near).astype(np.float32)
    return towards.view(np.uint32).astype(np.uint64)


WORDS_OF = {
    "abs.f32": lambda a: a & np.uint64(0x7FFFFFFF),
    "add.u32": lambda a, b: (a + b) & WORD,
    "and.b32": lambda a, b: a & b,
    "fma.rz.f32": fma_towards_zero,
    "lop3.b32": lambda a, b, c, table: lop3(a, b, c, int(table)),
    "mad.lo.u32": lambda a, b, c: (a * b + c) & WORD,
    "mad.wide.u32": lambda a, b, c: a * b + c,  # 64 bits wrap around
    "mov.b32": lambda a: a,
    "prmt.b32": lambda a, b, selector: prmt(a, b, np.broadcast_to(selector, np.shape(a))),
    "shl.b32": lambda a, b: (a << b) & WORD,
    "shr.u32": lambda a, b: a >> b,
}


def execute(text, operands, results, memory=None):
    """Run a block of PTX on uint64 arrays that hold 32-bit words; returns operands 0..results-1.

    Args:
        memory: the words that loads find, the first at address 0.
    """
    registers = {f"${number}": value for number, value in operands.items()}
    lines = [line.strip() for line in text.strip()[1:-1].split(";")]
    for line in filter(None, lines):
        if line.startswith(".reg"):
            continue
        name, rest = re.fullmatch(r"(\S+)\s+(.*)", line).groups()
        items = [item.strip(" {}[]") for item in rest.split(",")]
        if name == "ld.global.nc.v2.b32":
            first, second, address = items
            assert not np.any(registers[address] % np.uint64(8))
            place = registers[address] // np.uint64(4)
            registers[first], registers[second] = memory[place], memory[place + np.uint64(1)]
            continue
        target, *sources = items
        registers[target] = WORDS_OF[name](*(_value(registers, item) for item in sources))
    return [registers[f"${number}"] for number in range(results)]


def _value(registers, item):
    if item in registers:
        return registers[item]
    return np.uint64(int(item[2:], 16) if item.startswith("0f") else int(item, 0))
