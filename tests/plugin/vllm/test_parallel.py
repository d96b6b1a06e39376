"""Two ranks, in processes of their own as vLLM starts them."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.scheme import Scheme
from tests.support.engines import load_model
from tests.support.served_models import build, expected_logprobs

_SECONDS = 900
"""For the start of two processes, while other tests take the machine's time."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(_SECONDS + 60)]
ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import json
from tests.support.engines import engine, logprobs

if __name__ == "__main__":
    with engine({model!r}, quantization="blockdialect_w4a16", {options}) as llm:
        print("logprobs", json.dumps(logprobs(llm).tolist()))
"""


def logprobs_on_two_ranks(model, tmp_path, options):
    script = tmp_path / "two_ranks.py"
    script.write_text(textwrap.dedent(SCRIPT).format(model=str(model), options=options))
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    # vLLM binds a rank to a NUMA node by default; a small machine has one node
    cores = sorted(os.sched_getaffinity(0))
    environment["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}|{cores[-1]}"
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=_SECONDS, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("logprobs ")]
    return torch.tensor(json.loads(line.removeprefix("logprobs ")))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        # attention and vocabulary are cut, experts are not
        ("MixtralForCausalLM", "tensor_parallel_size=2, enable_expert_parallel=True"),
        # an eager engine cannot have stages on a CPU; this one compiles nothing either
        (
            "LlamaForCausalLM",
            "pipeline_parallel_size=2, enforce_eager=False, "
            'compilation_config={"mode": 2, "backend": "eager"}',
        ),
    ],
)
def test_two_ranks_compute_what_one_does(architecture, options, tmp_path):
    """W4A16: the ranks' parts add up to the same sums, so the comparison can be tight.

    With rounded activations each rank rounds its own share of a row-parallel layer's inputs with a
    row exponent of its own (docs/reference/format.md, shards), which may differ from rounding the
    whole row.
    """
    scheme = {"rotation": "hadamard_32", "lm_head": True, "embeddings": True}
    source = build(architecture, tmp_path / "source")
    convert(source, tmp_path / "packed", Scheme(**scheme))
    found = logprobs_on_two_ranks(tmp_path / "packed", tmp_path, options)
    oracle = expected_logprobs(source, architecture, "none", **scheme)[:-1]
    torch.testing.assert_close(found, oracle, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("one_rank")
def test_stages_of_an_eager_engine_are_refused(tmp_path):
    convert(build("LlamaForCausalLM", tmp_path / "source"), tmp_path / "packed")
    with pytest.raises(
        ValueError, match=r"^--enforce-eager: on a CPU, vLLM's pipeline stages need"
    ):
        load_model(tmp_path / "packed", pipeline_parallel_size=2)
