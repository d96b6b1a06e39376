"""`register()` runs in every vLLM process: cheap, repeatable, and never the reason it stops."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

IMPORTED = """
import sys
import {module}
bad = [m for m in ("vllm", "diffusers", "transformers", "triton") if m in sys.modules]
import torch
assert not bad, bad
assert not torch.cuda.is_initialized()
"""
REGISTER = """
import logging
logging.basicConfig(level=logging.INFO)
import dialect_plugin
dialect_plugin.register()
dialect_plugin.register()
print("other models still start")
"""


def run(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment or None)


@pytest.mark.parametrize("module", ["dialect_kernels", "dialect_plugin", "dialect_plugin.cli"])
def test_imports_are_light(module):
    done = run(IMPORTED.format(module=module))
    assert done.returncode == 0, done.stderr


def test_entry_point():
    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "blockdialect"]
    assert [e.value for e in found] == ["dialect_plugin:register"]


@pytest.mark.parametrize("content", ["", "raise RuntimeError('broken')", "import no_such_module"])
def test_an_unknown_vllm_is_one_sentence_and_no_error(tmp_path, content):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(content)
    done = run(REGISTER, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "other models still start\n"
    assert "outside the supported range 0.26 to 0.32" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_registers_three_names_once():
    done = run(
        REGISTER
        + """
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
ours = [name for name in QUANTIZATION_METHODS if name.startswith("blockdialect")]
assert ours == ["blockdialect", "blockdialect_w4a8", "blockdialect_w4a16"], ours
for name in ours:
    assert get_quantization_config(name)().get_name() == name
"""
    )
    assert done.returncode == 0, done.stderr
