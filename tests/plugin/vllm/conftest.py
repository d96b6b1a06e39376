"""vLLM in the tests' own process, without an engine."""

import gc

import pytest
import torch


@pytest.fixture
def one_rank(tmp_path_factory):
    """vLLM's process groups for a single rank, and a config that says float32."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    # vLLM's loader collects garbage twice: nearly all of its time, unless what is there is left out
    if not gc.get_freeze_count():
        gc.freeze()
    # without an accelerator this raises; vLLM's CPU worker replaces it in the same way
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "file"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield
        # vLLM's own function does the same, thaws and collects
        destroy_model_parallel()
        destroy_distributed_environment()
    monkeypatch.undo()
