"""Threads that share a transformer, as in diffusers' recipe for a server."""

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

import diffusers_hook
from diffusers_hook.model.attach import attached
from tests.video.support.tiny_parts import noise
from tests.video.support.tiny_pipelines import latte
from tests.video.support.tiny_video import TEXT_WIDTH, run, wan, wan_inputs, wan_pipeline

OPTIONS = {"progress": False, "seda": True, "salient_refresh": 2, "seda_refresh": 3}
SEEDS = (10, 20)


@contextmanager
def abreast(block):
    """Two threads go through a block at the same time: each waits for the other there."""
    barrier = threading.Barrier(2)

    def meet(*_):
        barrier.wait(timeout=60)

    handle = block.register_forward_pre_hook(meet)
    try:
        yield
    finally:
        handle.remove()


def together(generate):
    """What each thread got."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(generate, seed) for seed in SEEDS]]


@torch.no_grad()
def steps(model, seed):
    """A generation of five steps and two guidance branches; seeds differ in order and size."""
    found = []
    for step in range(5):
        for branch in ("cond", "uncond") if seed == SEEDS[0] else ("uncond", "cond"):
            inputs = wan_inputs(
                timestep=900 - 100 * step, seed=seed + len(branch), frames=seed // 5
            )
            with model.cache_context(branch):
                found.append(model(**inputs).sample)
    return found


def test_two_threads_get_what_each_gets_alone():
    """Other branches, sizes and tokens at the same time."""
    model = wan()
    diffusers_hook.enable(model, **OPTIONS)
    alone = [steps(model, seed) for seed in SEEDS]
    with abreast(model.blocks[1]):
        found = together(lambda seed: steps(model, seed))
    for got, expected in zip(found, alone, strict=True):
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    refreshes = diffusers_hook.summary(model).transformers[0].salient_refreshes
    assert refreshes == 2 * 2 * 2 * 2 * 3  # alone and together, seeds, blocks, branches, of 5 calls


def request(pipe, seed):
    """One request: a shallow copy of the pipeline with a scheduler of its own."""
    local = copy.copy(pipe)
    local.scheduler = copy.deepcopy(pipe.scheduler)
    embedded = {
        "prompt_embeds": noise(1, 7, TEXT_WIDTH, seed=seed),
        "negative_prompt_embeds": noise(1, 7, TEXT_WIDTH, seed=seed + 1),
    }
    return local(
        num_frames=9, height=16, width=16, num_inference_steps=4, guidance_scale=3.0,
        output_type="latent", generator=torch.Generator().manual_seed(seed), **embedded,
    ).frames  # fmt: skip


def test_requests_of_a_server_share_the_weights():
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(**OPTIONS)
    alone = [request(pipe, seed) for seed in SEEDS]
    with abreast(pipe.transformer.blocks[0]):
        found = together(lambda seed: request(pipe, seed))
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))


def test_requests_of_a_pipeline_that_names_nothing():
    """Latte names neither branches nor steps; its timesteps tell."""
    pipe, _ = latte()
    pipe.enable_semantic_dialect(**OPTIONS)

    def one(seed):
        local = copy.copy(pipe)
        local.scheduler = copy.deepcopy(pipe.scheduler)
        return local(
            prompt=None, negative_prompt=None, output_type="latent", return_dict=False,
            prompt_embeds=noise(1, 7, 32, seed=seed), height=64, width=32, video_length=3,
            negative_prompt_embeds=noise(1, 7, 32, seed=seed + 1), num_inference_steps=4,
            generator=torch.Generator().manual_seed(seed),
        )[0]  # fmt: skip

    alone = [one(seed) for seed in SEEDS]
    with abreast(pipe.transformer.transformer_blocks[0]):
        found = together(one)
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))


def test_a_thread_that_ends_leaves_nothing():
    model = wan()
    diffusers_hook.enable(model, **OPTIONS)
    run(model, context="cond")
    state = attached(model).state
    groups = len(state.group_sizes())
    seen = []

    def other():
        run(model, context="cond")
        seen.append(len(state.group_sizes()))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    gc.collect()
    assert seen == [2 * groups]  # the summary shows all threads
    assert len(state.group_sizes()) == groups
