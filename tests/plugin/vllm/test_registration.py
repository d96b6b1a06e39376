"""What `register()` does and, above all, what it does not do."""

import subprocess
import sys
import textwrap
from importlib.metadata import entry_points

import pytest
import torch

from dialect_plugin.checkpoint.convert import convert
from tests.support.served_models import build


def run(code, **environment):
    """Run `code` in a fresh interpreter; its output. vLLM's import takes long on a busy machine."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_entry_point_is_register():
    (entry,) = entry_points(group="vllm.general_plugins", name="blockdialect")
    assert entry.value == "dialect_plugin:register"


@pytest.mark.parametrize(
    "contents",
    ["", "raise RuntimeError('broken')", "raise ImportError('half installed')"],
    ids=["empty", "raises", "import-error"],
)
def test_an_unsupported_vllm_is_one_sentence(contents, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(contents)
    output = run(
        """
        import dialect_plugin
        dialect_plugin.register()
        """,
        PYTHONPATH=str(tmp_path),
    )
    (line,) = [line for line in output.splitlines() if "blockdialect" in line]
    assert line.startswith(
        "blockdialect is not available: this vLLM is outside the supported range"
    )
    assert "Traceback" not in output


@pytest.mark.slow
def test_other_models_start_where_the_plugin_cannot(tmp_path):
    source = build("LlamaForCausalLM", tmp_path / "source")
    convert(source, tmp_path / "packed")
    output = run(
        f"""
        import sys
        # its import fails, as if vLLM had moved a name
        sys.modules["dialect_plugin.vllm.linear"] = None

        from vllm import LLM, SamplingParams
        from vllm.engine.arg_utils import EngineArgs

        try:
            EngineArgs({str(tmp_path / "packed")!r}, skip_tokenizer_init=True).create_model_config()
        except ValueError as error:
            print("refused:", error)
        llm = LLM({str(source)!r}, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64)
        parameters = SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False)
        (output,) = llm.generate([{{"prompt_token_ids": [1, 2, 3]}}], parameters)
        print("generated", len(output.outputs[0].token_ids))
        """,
    )
    assert "blockdialect is not available" in output
    assert "Unknown quantization method: blockdialect" in output
    assert "generated 3" in output


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
def test_amx_tiles_are_requested():
    output = run(
        """
        import ctypes
        import dialect_plugin

        def tiles_are_permitted():
            mask, prctl, get_permission = ctypes.c_uint64(), 158, 0x1022
            assert ctypes.CDLL(None).syscall(prctl, get_permission, ctypes.byref(mask)) == 0
            return bool(mask.value >> 18 & 1)

        print("permitted:", tiles_are_permitted())
        dialect_plugin.register()
        print("permitted:", tiles_are_permitted())
        """
    )
    said = [line for line in output.splitlines() if line.startswith("permitted:")]
    assert said == ["permitted: False", "permitted: True"]
