"""Environment of all tests, set before anything imports vLLM or Triton.

Nothing is downloaded or reported, and vLLM stays in one process.
"""

import os

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB; the default is a share of all memory
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process: a third of the start-up time
    VLLM_DISABLE_COMPILE_CACHE="1",
    VLLM_LOGGING_LEVEL="WARNING",
    GLOO_SOCKET_IFNAME="lo",  # ranks find each other on machines without a network too
)
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two processes of tests share the cores
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns until 3.10 changes it


def pytest_collection_modifyitems(items):
    """Skip tests that are marked `gpu` on a machine without a GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A function that makes tiny random checkpoints, each once per session."""
    from tests.support.tiny_models import make_model

    made = {}

    def make(architecture="LlamaForCausalLM", **options):
        key = (architecture, tuple(sorted(options.items())))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(architecture), architecture, **options)
        return made[key]

    return make
