"""Compile kernels for a GPU without having one, and read properties from their machine code.

Triton brings NVIDIA's assembler and disassemblers. `TRITON_INTERPRET` must not be set: kernels that
were made under it cannot be compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dialect_kernels.gpu import gemm
from dialect_kernels.gpu.tuning import GemmPlan

from .memory_access import accesses, scattered_words, sectors, wavefronts

__all__ = [
    "MMA",
    "MachineCode",
    "compile_gemm",
    "compile_kernel",
    "faults",
    "loop_faults",
    "per_weight",
    "programs_at_once",
    "steps_ahead",
]

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that one program may use, by compute capability."""
_REGISTERS = 65536
_RESERVED_SHARED = 1024
STEPS_AHEAD = 2
"""Steps whose copies are on their way while the loop waits for one, at least."""

POINTERS = {
    "p_x_scale": "*fp32", "p_scale": "*fp32", "p_codes": "*u8", "p_meta": "*u8", "p_q": "*u8",
    "p_row_exponent": "*i8", "p_salient": "*i32", "p_group": "*i32", "p_totals": "*i32",
    "p_book": "*i32", "p_bias": "*bf16", "p_y": "*bf16", "p_x": "*bf16", "p_zeros": "*i32",
    "p_partial": "*fp32", "p_arrived": "*i32", "p_tiles": "*i64", "p_rows": "*i64",
}  # fmt: skip


MMA = {
    True: {
        89: r"QMMA\.16832\.F32\.E4M3",
        90: r"QGMMA\.64x\d+x32\.F32\.E4M3",
        100: r"UTCQMMA",
        120: r"QMMA\.16832\.F32\.E4M3",
    },
    False: {
        80: r"HMMA\.16816\.F32\.BF16",
        89: r"HMMA\.16816\.F32\.BF16",
        90: r"HGMMA\.64x\d+x16\.F32\.BF16",
        100: r"UTCHMMA|HMMA\.16816\.F32\.BF16",
    },
}
"""The matrix instruction by operands (FP8 or not) and compute capability."""


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel.

    Attributes:
        registers, stack: per thread; stack is in bytes.
        shared: bytes per program.
        text: the disassembly.
        ttgir: Triton's intermediate code for GPUs, with the layouts of all tensors.
    """

    registers: int
    stack: int
    shared: int
    text: str
    ttgir: str

    @property
    def instructions(self) -> list[str]:
        """All instructions, in order, without predicates."""
        found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s*(.*?);", self.text, re.MULTILINE)
        return [re.sub(r"^@!?U?P\w+\s+", "", text) for text in found]

    @property
    def operations(self) -> Counter[str]:
        """Instructions by their first part, e.g. ``"PRMT"``."""
        return Counter(text.split()[0].split(".")[0] for text in self.instructions)

    def without_divisions(self) -> list[str]:
        """The instructions that run where no division is needed.

        They are those of the straight pieces up to the one that ends the kernel, without the pieces
        that divide or call the division that stands behind it.
        """
        pieces: list[list[str]] = [[]]
        for text in self.instructions:
            pieces[-1].append(text)
            if text.split()[0].split(".")[0] in ("BRA", "EXIT", "RET", "CALL"):
                pieces.append([])
        ends = (i for i, piece in enumerate(pieces) if any("EXIT" in text for text in piece))
        return [
            text
            for piece in pieces[: next(ends) + 1]
            if not any(text.startswith(("FCHK", "CALL")) for text in piece)
            for text in piece
        ]

    def main_loop(self) -> list[str]:
        """The instructions of the smallest loop that multiplies matrices.

        Raises:
            AssertionError: if there is none.
        """
        code: list[str] = []
        labels: dict[str, int] = {}
        loops: list[list[str]] = []
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


def compile_kernel(
    kernel: Any,
    capability: int,
    constants: Mapping[str, Any],
    pointers: Mapping[str, str] | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
) -> MachineCode:
    """Compile a kernel; every pointer is aligned to 16 bytes, every other argument an int32.

    Args:
        kernel: the jitted function.
        capability: 80, 89, 90, 100 or 120.
        constants: its constexpr arguments, and arguments that are None.
        pointers: types of pointers where they are not those of `POINTERS`.
        num_warps, num_stages: as at a launch.
    """
    types = POINTERS | dict(pointers or {})
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
    assert found, usage
    return MachineCode(int(found[1]), int(found[2]), made.metadata.shared, text, made.asm["ttgir"])


def _run(tool: str, option: str, path: Path) -> str:
    command = [os.fspath(TOOLS / tool), option, os.fspath(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_gemm(
    plan: GemmPlan,
    capability: int,
    eight_bits: bool,
    exact: bool = False,
    experts: bool = False,
) -> MachineCode:
    """The kernel of a plan, for blocks of 32 and whole tiles.

    Args:
        plan: of the fused kernel.
        capability: see :func:`compile_kernel`.
        eight_bits: FP8 operands; else bfloat16.
        exact: the mode ``exact``, on bfloat16.
        experts: one of several weights for each tile, named by a schedule.
    """
    constants: dict[str, Any] = {
        "B": 32,
        "BM": plan.tokens,
        "BN": plan.features,
        "BK": 32 if exact else plan.columns,
        "SPLIT": plan.splits > 1,
        "EVEN": True,
        "ASM": True,
    }
    if not experts:
        constants |= {"p_tiles": None, "p_rows": None}
    if plan.splits == 1:
        constants |= {"p_partial": None, "p_arrived": None}
    pointers = {"p_table": "*i64"}
    if eight_bits:
        kernel, pointers["p_x"] = gemm.eight_bit_kernel, "*fp8e4nv"
    else:
        kernel = gemm.sixteen_bit_kernel
        constants |= {"ALIGNED": True, "EXACT": exact, "FLOAT16": False}
        if not exact:
            constants["p_x_scale"] = None
    return compile_kernel(kernel, capability, constants, pointers, plan.num_warps, plan.num_stages)


def per_weight(code: MachineCode, plan: GemmPlan, exact: bool = False) -> float:
    """Instructions of the main loop for each weight that a thread decodes in it."""
    columns = 32 if exact else plan.columns
    return len(code.main_loop()) / (plan.features * columns / (32 * plan.num_warps))


def faults(code: MachineCode, capability: int, mma: str | None = None) -> list[str]:
    """Faults of machine code: spills, too much shared memory, wrong words, another MMA.

    Args:
        code: the compiled kernel.
        capability: the compute capability that it was compiled for.
        mma: pattern of the matrix instruction that the main loop must hold, beside byte permutes,
            which say that weights are decoded in registers.
    """
    found = []
    if code.stack or {"LDL", "STL"} & set(code.operations):
        found.append(f"spills {code.stack} bytes a thread")
    if code.registers > 255:
        found.append(f"{code.registers} registers")
    if code.shared > SHARED_LIMIT[capability]:
        found.append(f"{code.shared} bytes of shared memory")
    found += [f"packs words of no neighbours: {word}" for word in scattered_words(code.ttgir)]
    if mma is not None:
        loop = code.main_loop()
        found += [
            f"no {wanted} in the main loop"
            for wanted in (mma, "PRMT")
            if not any(re.search(wanted, text) for text in loop)
        ]
    return found


def steps_ahead(code: MachineCode) -> int:
    """Steps of the main loop whose copies are on their way while it waits for those of one."""
    loop = code.main_loop()
    waits = [int(n, 0) for n in re.findall(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)", "\n".join(loop))]
    groups = sum("LDGDEPBAR" in text for text in loop)
    return min(waits) // groups if waits and groups else 0


def loop_faults(code: MachineCode) -> list[str]:
    """Faults of the main loop of a GEMM: what it waits for, and what memory does twice.

    Loads that are not asynchronous; copies that begin too late; more wavefronts of shared memory
    or more sectors of global memory than its bytes need, see :mod:`.memory_access`.
    """
    found = []
    if steps_ahead(code) < STEPS_AHEAD:
        found.append(f"copies are {steps_ahead(code)} steps ahead")
    loads = [text for text in code.main_loop() if re.search(r"\bLDG\.", text)]
    found += [f"waits for {text}" for text in loads]
    for access in accesses(code.ttgir):
        what = f"{access.bits}-bit {'x'.join(str(size) for size in access.shape)}"
        if access.memory is not None:
            needed, least = wavefronts(access)
            if needed > least:
                found.append(f"{what}: {needed} wavefronts instead of {least}")
        if access.reads_global and not access.indirect:
            needed, least = sectors(access)
            if needed > least:
                found.append(f"{what}: {needed} sectors instead of {least}")
    return found


def programs_at_once(code: MachineCode, capability: int, num_warps: int) -> int:
    """Programs that one processor runs at the same time, by registers and shared memory."""
    by_registers = _REGISTERS // (-(-code.registers // 8) * 8 * 32 * num_warps)
    per_processor = SHARED_LIMIT[capability] + _RESERVED_SHARED
    return min(by_registers, per_processor // (code.shared + _RESERVED_SHARED))
