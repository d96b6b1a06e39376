"""Nothing happens at import: no engine, no pipeline, no Triton, no CUDA context."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {"vllm", "diffusers", "transformers", "triton"}
MODULES = ["dialect_kernels", "dialect_kernels.cpu", "dialect_plugin", "dialect_plugin.cli"]


def modules_after(statement):
    """The top-level modules a fresh interpreter has loaded after `statement`."""
    code = (
        f"import sys\n{statement}\nimport torch\nassert not torch.cuda.is_initialized()\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_loads_nothing_heavy():
    assert modules_after(f"import {', '.join(MODULES)}") & FORBIDDEN == set()


def test_the_check_sees_what_is_loaded():
    assert modules_after("import triton") & FORBIDDEN == {"triton"}


def test_packages_are_importable_by_their_installed_names_only(tmp_path):
    """Away from the repository no `triton_kernels` is found: vLLM would take it for OpenAI's."""
    code = (
        "import importlib.util as u\n"
        "assert u.find_spec('dialect_kernels') and u.find_spec('dialect_plugin')\n"
        "assert u.find_spec('triton_kernels') is None"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_vllm_does_not_take_the_folder_for_a_package_of_its_own():
    """From the repository's root, where the folder `triton_kernels` can be seen."""
    code = (
        "import vllm.model_executor.models.mixtral, dialect_kernels.ops\n"
        "from vllm.utils.import_utils import has_triton_kernels\n"
        "assert not has_triton_kernels()\n"
        "import torch; torch.ops.blockdialect.linear"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_folder_says_that_it_is_no_package():
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], capture_output=True, text=True, cwd=ROOT
    )
    assert "ImportError: This folder only holds the package dialect_kernels" in done.stderr
