"""vLLM in the tests' own process, without an engine."""

import pytest
import torch


@pytest.fixture
def one_rank(tmp_path_factory):
    """vLLM's process groups for a single rank, and a config that says float32."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    # without an accelerator this raises; vLLM's CPU worker replaces it in the same way
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "file"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield
        cleanup_dist_env_and_memory()
    monkeypatch.undo()
