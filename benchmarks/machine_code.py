"""Kernels compiled for a GPU that is not there, and what can be read from the machine code.

Triton brings NVIDIA's assembler and disassemblers. `TRITON_INTERPRET` must not be set: kernels that
were made under it cannot be compiled.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that one program may use, by compute capability."""

POINTERS = {
    "p_x_scale": "*fp32", "p_scale": "*fp32", "p_codes": "*u8", "p_meta": "*u8", "p_q": "*u8",
    "p_row_exponent": "*i8", "p_salient": "*i32", "p_group": "*i32", "p_totals": "*i32",
    "p_book": "*i32", "p_bias": "*bf16", "p_y": "*bf16", "p_x": "*bf16", "p_zeros": "*i32",
    "p_partial": "*fp32", "p_arrived": "*i32",
}  # fmt: skip


@dataclass(frozen=True)
class MachineCode:
    """What came out.

    Attributes:
        registers, stack: per thread; stack is in bytes.
        shared: bytes per program.
        text: the disassembly.
    """

    registers: int
    stack: int
    shared: int
    text: str

    @property
    def instructions(self):
        """All instructions, in order, without predicates."""
        found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s*(.*?);", self.text, re.MULTILINE)
        return [re.sub(r"^@!?U?P\w+\s+", "", text) for text in found]

    @property
    def operations(self):
        """Instructions by their first part, e.g. ``"PRMT"``."""
        return Counter(text.split()[0].split(".")[0] for text in self.instructions)

    def main_loop(self):
        """The instructions of the smallest loop that multiplies matrices.

        Raises:
            AssertionError: if there is none.
        """
        code, labels, loops = [], {}, []
        for line in self.text.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s*(.*?);", line):
                code.append(found[1])
                jump = re.search(r"BRA\S*\s+.*?(\.L_x_\d+)", found[1])
                if jump and jump[1] in labels:
                    body = code[labels[jump[1]] :]
                    if any("MMA" in text for text in body):
                        loops.append(body)
        assert loops, "no loop holds a matrix instruction"
        return min(loops, key=len)


def compile_kernel(kernel, capability, constants, pointers=(), num_warps=4, num_stages=3):
    """Compile a kernel; every pointer is aligned to 16 bytes, every other argument an int32.

    Args:
        kernel: the jitted function.
        capability: 80, 89, 90, 100 or 120.
        constants: its constexpr arguments, and arguments that are None.
        pointers: types of pointers where they are not those of `POINTERS`.
        num_warps, num_stages: as at a launch.
    """
    types = {**POINTERS, **dict(pointers)}
    names = kernel.arg_names
    assert set(constants) <= set(names)
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    aligned = [n for n in names if signature[n].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", path)
        text = _run("nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return MachineCode(int(found[1]), int(found[2]), made.metadata.shared, text)


def _run(tool, option, path):
    command = [os.fspath(TOOLS / tool), option, os.fspath(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def assert_nothing_spills(code, capability):
    """No stack, no local memory, and registers and shared memory within the limits."""
    assert code.stack == 0
    assert not {"LDL", "STL"} & set(code.operations)
    assert code.registers <= 255
    assert code.shared <= SHARED_LIMIT[capability]
