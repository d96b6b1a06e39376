"""lm-eval on transformers' packed model; tests/plugin/vllm/test_server has the served one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.support.lm_eval_choices import evaluated, expected

pytestmark = pytest.mark.slow


def test_a_packed_checkpoint_in_transformers(packed, tiny_model, tmp_path):
    found, accuracy = evaluated(
        tmp_path, "dialect_plugin.lm_eval", "hf", pretrained=packed(), dtype="float32"
    )
    scores, right = expected(packed())
    torch.testing.assert_close(found, scores, rtol=0, atol=1e-3)
    assert accuracy == pytest.approx(right)
    assert (found - expected(tiny_model())[0]).abs().max() > 0.2  # the 16-bit model's are others


def test_the_command_without_lm_eval():
    """One sentence where it is not installed; here a finder hides it."""
    code = (
        "import runpy, sys\n"
        "sys.modules['lm_eval'] = None\n"
        "runpy.run_module('dialect_plugin.lm_eval', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "lm-eval is not installed; install it with pip install 'blockdialect[lm-eval]'"
    )
