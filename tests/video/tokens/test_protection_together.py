"""Protected steps that the scheduler names, beside caches, offloading and compiled blocks."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig
from torch._dynamo.utils import counters

import diffusers_hook
from tests.video.support.tiny_video import generate, wan_pipeline

STEPS = 6
CPU = torch.device("cpu")
AUTO = {"protected_steps": "auto", "salient_fraction": 0.25, "selection": "random"}


def video(pipe):
    return generate(pipe, num_inference_steps=STEPS)


def enabled(**options):
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(progress=False, **{**AUTO, **options})
    return pipe


def protected_calls(pipe):
    return pipe.semantic_dialect_summary().transformers[0].protected_calls


@pytest.fixture(scope="module")
def expected():
    pipe = enabled()
    found = video(pipe)
    assert protected_calls(pipe) == 2  # one step of both guidance branches
    assert not torch.equal(found, video(enabled(protected_steps="none")))
    return found


@pytest.fixture(scope="module")
def step(expected):
    """The step that the scheduler names."""
    numbers = range(STEPS)
    [found] = [n for n in numbers if torch.equal(video(enabled(protected_steps=[n])), expected)]
    assert found > 0  # where a cache skips blocks
    return found


@pytest.mark.parametrize("first", ["enable", "cache"])
def test_a_first_block_cache_leaves_the_protected_step_where_it_is(first, step):
    """The cache skips the other blocks from the second step on; the first block is protected."""

    def cached(**options):
        pipe = wan_pipeline()
        if first == "cache":
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        pipe.enable_semantic_dialect(progress=False, **{**AUTO, **options})
        if first == "enable":
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        return pipe, video(pipe)

    pipe, found = cached()
    assert protected_calls(pipe) == 2
    for number in range(STEPS):
        assert torch.equal(found, cached(protected_steps=[number])[1]) == (number == step)
    pipe.transformer.disable_cache()
    pipe.disable_semantic_dialect()
    assert video(pipe).isfinite().all()


def _model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def _sequential_offload(pipe):
    cpu_offload(pipe.transformer, CPU)


def _group_offload(pipe):
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [_model_offload, _sequential_offload, _group_offload])
def test_offloading_changes_no_bit(offload, expected):
    pipe = enabled()
    offload(pipe)
    assert torch.equal(video(pipe), expected)
    assert protected_calls(pipe) == 2


def test_model_offload_before_enabling_changes_no_bit(expected):
    pipe = wan_pipeline()
    _model_offload(pipe)
    pipe.enable_semantic_dialect(progress=False, **AUTO)
    assert torch.equal(video(pipe), expected)
    assert protected_calls(pipe) == 2


def test_compiled_blocks_are_not_compiled_again_in_the_protected_step(expected):
    """The decision is made outside of the blocks, whose one graph serves every step."""
    torch._dynamo.reset()
    counters.clear()
    pipe = enabled()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(video(pipe), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert protected_calls(pipe) == 2
    diffusers_hook.disable(pipe)
    torch._dynamo.reset()
