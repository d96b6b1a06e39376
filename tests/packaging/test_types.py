"""mypy sees through the seams between the packages: a wrong call across one is an error."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WRONG = """
import dialect_kernels
from dialect_kernels.ops import quantize_counted

packed: int = dialect_kernels.quantize("x")
counted: str = quantize_counted(window="all")
"""
FAULTS = (
    'Argument 1 to "quantize" has incompatible type "str"; expected "Tensor"',
    'expression has type "PackedTensor", variable has type "int"',
    'Missing positional argument "x" in call to "quantize_counted"',
    'Argument "window" to "quantize_counted" has incompatible type "str"; expected "int | None"',
    'expression has type "Quantized", variable has type "str"',
)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["dialect_plugin/architectures.py", "diffusers_hook/config.py"])
def test_a_wrong_call_into_the_ground_floor_is_an_error(module, tmp_path):
    """mypy reads `WRONG` in the place of a module of each wing."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--shadow-file", module, str(wrong), module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    for fault in FAULTS:
        assert fault in done.stdout
