"""The embedding kernel's machine code for GPUs that are not there."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels made for the interpreter cannot be compiled", allow_module_level=True)

from benchmarks.lib.machine_code import compile_kernel, faults
from dialect_kernels.gpu import rows

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("capability", [80, 90])
def test_rows_are_decoded_in_registers(capability):
    constants = {"B": 32, "BT": rows._TOKENS, "BK": rows._COLUMNS, "ASM": True}
    pointers = {"p_ids": "*i64", "p_table": "*i64", "p_out": "*bf16"}
    code = compile_kernel(rows._embedding_kernel, capability, constants, pointers)
    assert not faults(code, capability)
    assert code.operations["PRMT"]
