"""Protected steps: which calls they are, and how tokens are rounded in them."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)

import diffusers_hook
from dialect_kernels import dialect_linear, semantic_linear
from diffusers_hook import ConfigError, SemanticDialectConfig
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.layouts import Grid
from diffusers_hook.model.attach import attached
from diffusers_hook.tokens.branch import Context
from diffusers_hook.tokens.model_state import ModelState
from diffusers_hook.tokens.protection import Protection
from diffusers_hook.tokens.running import running, running_pipeline
from tests.video.support import tiny_pipelines
from tests.video.support.image_cases import flux
from tests.video.support.tiny_parts import noise
from tests.video.support.tiny_video import TEXT_WIDTH, generate, run, wan, wan_pipeline

PLAIN = {"progress": False, "salient_fraction": 0.0}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0}


def planned(scheduler, steps, **options):
    scheduler.set_timesteps(steps)
    return Protection.of(SemanticDialectConfig(protected_steps="auto", **options), scheduler)


@pytest.mark.parametrize(
    ("scheduler", "steps", "expected"),
    [
        # shifted towards noise, and its last sigma is next to 0
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 16, {14}),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 50, {46, 47, 48}),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True), 16, {14}),
        # even, but for the last step, from 0.001 to 0: no later step repairs step 14
        (FlowMatchEulerDiscreteScheduler(), 16, {14}),
        (FlowMatchEulerDiscreteScheduler(), 3, {1}),
        (UniPCMultistepScheduler(**FLOW), 16, {15}),
        (UniPCMultistepScheduler(**FLOW), 2, {1}),
        (DPMSolverMultistepScheduler(**FLOW), 16, {15}),
        # every timestep but the first twice
        (FlowMatchHeunDiscreteScheduler(shift=3.0), 16, {14}),
        (PNDMScheduler(skip_prk_steps=True), 16, {14}),
        (DDIMScheduler(), 16, {14}),
        (DPMSolverMultistepScheduler(), 16, {15}),
        (EulerDiscreteScheduler(), 16, {14}),
        (EDMEulerScheduler(), 16, {11}),
    ],
)
def test_the_steps_that_are_chosen(scheduler, steps, expected):
    found = planned(scheduler, steps)
    assert found.steps == expected
    assert found.step_of[-1] == len(set(scheduler.timesteps.tolist())) - 1


@pytest.mark.parametrize(
    ("steps", "fraction", "count"),
    [(16, 1 / 16, 1), (31, 1 / 16, 1), (32, 1 / 16, 2), (50, 1 / 16, 3), (4, 1 / 16, 1),
     (10, 0.5, 5), (10, 1.0, 10)],
)  # fmt: skip
def test_how_many_steps_are_chosen(steps, fraction, count):
    chosen = planned(UniPCMultistepScheduler(**FLOW), steps, protected_fraction=fraction).steps
    assert chosen == set(range(steps - count, steps))  # less and less noise is left


@pytest.mark.parametrize(
    ("options", "scheduler", "sentence"),
    [
        ({"protected_steps": (4, 9)}, DDIMScheduler(), "protected_steps: 9 is not a step of this "
         "generation, whose 8 steps are 0 to 7; give smaller numbers or 'auto'"),
        ({"protected_steps": (8,)}, FlowMatchHeunDiscreteScheduler(), "protected_steps: 8 is not "
         "a step of this generation, whose 8 steps are 0 to 7; "),
        ({"protected_steps": "auto"}, None, "protected_steps: 'auto' needs the scheduler of a "
         "pipeline, which is not known here; call pipe.enable_semantic_dialect(), or give the "),
        ({"protected_steps": "auto"}, IPNDMScheduler(), "protected_steps: 'auto' needs a scheduler "
         "with sigmas or alphas_cumprod, which IPNDMScheduler does not have; give the numbers"),
        ({"protected_steps": "auto"}, SimpleNamespace(sigmas=[1, 0], timesteps=torch.arange(8)),
         "protected_steps: 'auto' needs a sigma for each timestep, and SimpleNamespace has 2 for "
         "8; give the numbers of the steps"),
    ],
)  # fmt: skip
def test_steps_that_cannot_be_protected_get_one_sentence(options, scheduler, sentence):
    if hasattr(scheduler, "set_timesteps"):
        scheduler.set_timesteps(8)
    with pytest.raises(ConfigError) as caught:
        Protection.of(SemanticDialectConfig(**options), scheduler)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "scheduler", "steps", "expected", "reason"),
    [
        ({}, UniPCMultistepScheduler(**FLOW), 16, {15}, "by default"),
        ({}, UniPCMultistepScheduler(**FLOW), 50, {47, 48, 49}, "by default"),
        ({}, DDIMScheduler(), 16, {14}, "by default"),
        ({}, FlowMatchHeunDiscreteScheduler(shift=3.0), 16, {14}, "by default"),
        ({}, FlowMatchHeunDiscreteScheduler(shift=3.0), 15, (), "fewer than 16 steps"),
        ({}, UniPCMultistepScheduler(**FLOW), 15, (), "fewer than 16 steps"),
        ({"protected_fraction": 0.3}, UniPCMultistepScheduler(**FLOW), 4, {3}, "by default"),
        ({"protected_fraction": 0.3}, UniPCMultistepScheduler(**FLOW), 3, (), "fewer than 4 steps"),
        ({}, IPNDMScheduler(), 16, (), "IPNDMScheduler tells no noise levels"),
        ({}, SimpleNamespace(sigmas=[1, 0], timesteps=torch.arange(16)), None, (),
         "SimpleNamespace tells no noise levels"),
        ({}, SimpleNamespace(alphas_cumprod=None, timesteps=torch.arange(16)), None, (),
         "SimpleNamespace tells no noise levels"),
        ({}, None, None, (), "no scheduler with timesteps is known"),
        ({}, SimpleNamespace(), None, (), "no scheduler with timesteps is known"),
        ({"activation_format": "fp8"}, UniPCMultistepScheduler(**FLOW), 16, (), "switched off"),
        ({"protected_steps": "none"}, UniPCMultistepScheduler(**FLOW), 16, (), "switched off"),
        ({"protected_steps": "auto"}, UniPCMultistepScheduler(**FLOW), 15, {14}, "auto"),
        ({"protected_steps": [2]}, UniPCMultistepScheduler(**FLOW), 15, {2}, "as given"),
    ],
)  # fmt: skip
def test_what_the_default_protects(options, scheduler, steps, expected, reason, recwarn):
    if steps is not None:
        scheduler.set_timesteps(steps)
    recwarn.clear()
    found = Protection.of(SemanticDialectConfig(**options), scheduler)
    assert (found.steps, found.reason) == (set(expected), reason)
    assert not recwarn


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, in diffusers
def test_the_default_gets_along_with_every_scheduler_of_diffusers():
    """It protects as many steps as the share says, or tells why it protects none."""
    names = [n for n in dir(diffusers.schedulers) if n.endswith("Scheduler") and n[0] != "_"]
    tried = 0
    for name in names:
        try:
            scheduler = getattr(diffusers.schedulers, name)()
            scheduler.set_timesteps(40)
        except Exception:  # it needs arguments of its own, or a package
            continue
        found = Protection.of(SemanticDialectConfig(), scheduler)
        if found.steps:
            assert found.reason == "by default", name
            assert len(found.steps) == (found.step_of[-1] + 1) // 16, name
        else:
            assert found.reason.startswith((name, "no scheduler", "fewer")), (name, found)
        tried += 1
    assert tried >= 30


def test_the_default_protects_in_a_pipeline_and_says_so():
    """As `auto` does from 16 steps on, also where the transformer was saved; else as `none`."""
    pipe = wan_pipeline()
    video = {}
    for chosen in (None, "auto", "none"):
        options = {} if chosen is None else {"protected_steps": chosen}
        pipe.enable_semantic_dialect(**PLAIN, **options)
        assert ("none (no generation yet)" in lines(pipe, "protected steps")) == (chosen != "none")
        video[chosen] = [generate(pipe, num_inference_steps=steps) for steps in (16, 15)]
        if chosen is None:
            assert "none (fewer than 16 steps)" in lines(pipe, "protected steps")
            generate(pipe, num_inference_steps=16)
            [step] = pipe.semantic_dialect_summary().transformers[0].protected_steps
            assert f"{step} (by default)" in lines(pipe, "protected steps")
            assert lines(pipe, "decomposed rows")
        pipe.disable_semantic_dialect()
    long, short = zip(*video.values(), strict=True)
    assert torch.equal(long[0], long[1])
    assert not torch.equal(long[0], long[2])
    assert torch.equal(short[0], short[2])
    assert not torch.equal(short[0], short[1])


def lines(pipe, label):
    """The rows of the summary with a label."""
    return "".join(x for x in str(pipe.semantic_dialect_summary()).splitlines() if label in x)


def test_a_transformer_alone_protects_nothing_by_default(recwarn):
    video = []
    for options in ({}, {"protected_steps": "none"}):
        model = wan()
        diffusers_hook.enable(model, **PLAIN, **options)
        video.append([run(model, timestep=1000 - 50 * step) for step in range(17)])
        assert diffusers_hook.summary(model).transformers[0].protected_calls == 0
    assert all(torch.equal(a, b) for a, b in zip(*video, strict=True))
    assert not recwarn


@pytest.mark.parametrize("scheduler", [IPNDMScheduler(), None])
def test_a_pipeline_without_noise_levels_stays_as_it_was(scheduler):
    pipe = wan_pipeline()
    before = generate(pipe)
    target = pipe.transformer
    if scheduler is not None:
        right, pipe.scheduler, target = pipe.scheduler, scheduler, pipe
    with pytest.raises(ConfigError, match=r"^protected_steps: 'auto' needs "):
        diffusers_hook.enable(target, progress=False, protected_steps="auto")
    assert attached(pipe.transformer) is None
    if scheduler is not None:
        pipe.scheduler = right
    assert torch.equal(generate(pipe), before)


def test_a_step_too_many_is_told_and_the_pipeline_stays_usable():
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(**PLAIN, protected_steps=[3])
    with pytest.raises(ConfigError, match=r"3 is not a step of this generation, whose 3 steps"):
        generate(pipe)
    longer = generate(pipe, num_inference_steps=4)
    with pytest.raises(ConfigError):
        generate(pipe)
    assert torch.equal(generate(pipe, num_inference_steps=4), longer)


def record(model, layer):
    """What a layer gets and gives, and whether its call was in a protected step."""
    seen = []

    def look(layer, arguments, output):
        protected = attached(model).state.generation.protected
        seen.append((protected, arguments[0].detach().clone(), output.detach().clone()))

    model.get_submodule(layer).register_forward_hook(look)
    return seen


@pytest.mark.parametrize("form", ["decomposed", "fp8"])
@pytest.mark.parametrize("layer", ["blocks.0.attn1.to_q", "blocks.1.attn2.to_k"])
def test_all_tokens_of_a_protected_step_are_rounded_more_finely(layer, form):
    model = wan()
    diffusers_hook.enable(model, **PLAIN, protected_steps=[1], protected_format=form)
    seen = record(model, layer)
    for timestep in (900, 800, 700):
        for branch in ("cond", "uncond"):
            run(model, batch=2, context=branch, timestep=timestep, seed=timestep)
    assert [protected for protected, _, _ in seen] == [False, False, True, True, False, False]
    found = model.get_submodule(layer)
    assert isinstance(found, DialectLinear)
    for protected, x, y in seen:
        rows = x.flatten(0, -2)
        expected = dialect_linear(rows, found.packed, found.bias, "dialect")
        if protected and form == "fp8":
            expected = dialect_linear(rows, found.packed, found.bias, "fp8")
        elif protected:
            every = torch.arange(len(rows))[None]
            expected = semantic_linear(rows[None], found.packed, found.bias, every)[0]
        assert torch.equal(y.flatten(0, -2), expected)
    summary = diffusers_hook.summary(model)
    [figures] = summary.transformers
    assert figures.protected_calls == 2
    assert figures.salient_share == (1 / 3 if form == "decomposed" else 0)
    assert "calls in protected steps" in str(summary)
    assert "1 (as given)" in str(summary)
    assert ("decomposed rows" in str(summary)) == (form == "decomposed")


def test_salient_tokens_and_groups_go_on_around_a_protected_step():
    """And groups stay in force in it, as they do for salient tokens."""
    options = {"progress": False, "seda": True, "salient_refresh": 2}
    video = {}
    for steps in ("none", [1]):
        model = wan()
        diffusers_hook.enable(model, **options, protected_steps=steps)
        seen = record(model, "blocks.0.ffn.net.2")
        for timestep in (900, 800, 700):
            run(model, context="cond", timestep=timestep)
        block = attached(model).state.blocks[0]
        video[str(steps)] = [y for _, _, y in seen], block.branches["cond"].salient
    [plain, salient], [protected, same] = video.values()
    assert torch.equal(salient, same)
    assert [torch.equal(a, b) for a, b in zip(plain, protected, strict=True)] == [True, False, True]
    layer, group = model.blocks[0].ffn.net[2], block.branches["cond"].group
    assert (group >= 0).any()
    [_, x, y] = seen[1]
    every = torch.arange(x.shape[1])[None]
    assert torch.equal(y, semantic_linear(x, layer.packed, layer.bias, every, group))
    assert not torch.equal(y, semantic_linear(x, layer.packed, layer.bias, every))


def test_tokens_on_no_grid_are_protected_too():
    torch.manual_seed(0)
    model, arguments = flux()
    diffusers_hook.enable(model, progress=False, block_size=16, protected_steps=[1])
    outputs = []
    with torch.no_grad():
        for timestep in (0.9, 0.8, 0.8, 0.9):
            arguments["timestep"] = torch.full_like(arguments["timestep"], timestep)
            outputs.append(model(**arguments, return_dict=False)[0])
    assert diffusers_hook.summary(model).transformers[0].protected_calls == 2
    assert torch.equal(outputs[0], outputs[3])
    assert torch.equal(outputs[1], outputs[2])


def protected_timesteps(pipe, generate, **options):
    """The timesteps of the calls in protected steps, of each transformer."""
    found = []
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        if model is None:
            continue
        seen, begin = [], attached(model).state.begin

        def watch(grid, timestep, context, seen=seen, begin=begin, model=model):
            begin(grid, timestep, context)
            if attached(model).state.generation.protected:
                seen.append(timestep.flatten()[0].item())

        attached(model).state.begin = watch
        found.append(seen)
    generate(**options)
    return found


@pytest.mark.parametrize(
    ("make", "calls", "step"),
    [
        (tiny_pipelines.latte, 1, 2),  # guidance in one batch; no names
        (tiny_pipelines.ltx2, 3, 3),
        (tiny_pipelines.mochi, 1, 3),  # its timestep rises, and is the share of the video
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "transformer"])
def test_pipelines_of_several_families(make, calls, step, whole):
    pipe, generate = make()
    chosen = "auto" if whole else [step]
    diffusers_hook.enable(pipe if whole else pipe.transformer, **PLAIN, protected_steps=chosen)
    [seen] = protected_timesteps(pipe, generate)
    assert seen == pytest.approx([pipe.scheduler.timesteps[step].item()] * calls, rel=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "step", "index", "calls"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 2, 2, 2),
        (UniPCMultistepScheduler(**FLOW), 3, 3, 2),
        (FlowMatchHeunDiscreteScheduler(shift=3.0), 2, 4, 4),
    ],
)
@pytest.mark.parametrize("two", [False, True])
def test_branches_orders_and_two_transformers(scheduler, step, index, calls, two):
    """Wan names its branches and calls them one after the other."""
    pipe = wan_pipeline(two)
    pipe.scheduler = scheduler
    for chosen in ("auto", [step]):
        pipe.enable_semantic_dialect(**PLAIN, protected_steps=chosen)
        found = protected_timesteps(pipe, lambda: generate(pipe, num_inference_steps=4))
        expected = [pipe.scheduler.timesteps[index].item()] * calls
        low = expected[0] < 500  # the second transformer's part
        assert found == ([[] if low else expected, expected if low else []] if two else [expected])
        pipe.disable_semantic_dialect()


def test_frames_with_noise_levels_of_their_own_are_counted():
    pipe, generate = tiny_pipelines.skyreels()
    pipe.enable_semantic_dialect(**PLAIN, protected_steps=[0])
    [seen] = protected_timesteps(pipe, generate, ar_step=2, causal_block_size=1)
    assert seen == [pipe.scheduler.timesteps[0].item()] * 2


def test_the_scheduler_tells_the_step_where_16_bit_timesteps_collide():
    """1000, 996.9 and 993.7 become 1000, 996 and 992; 990.2 becomes 992 again."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(50)
    rounded = [t.expand(1).bfloat16() for t in scheduler.timesteps]
    assert len({t.item() for t in rounded}) < 50

    class Pipeline:
        pass

    pipe = Pipeline()
    pipe.scheduler = scheduler
    state = ModelState(SemanticDialectConfig(protected_steps=[49], salient_fraction=0.0))
    protected = []
    sample = torch.zeros(1)
    with running(pipe):
        for t, timestep in zip(scheduler.timesteps, rounded, strict=True):
            for branch in ("cond", "uncond"):
                state.begin(Grid(1, 5, 4, 4), timestep, Context(branch))
                protected.append(state.generation.protected)
                state.end()
                assert not state.generation.protected
            sample = scheduler.step(sample, t, sample).prev_sample
    assert protected == [False] * 98 + [True] * 2
    assert running_pipeline() is None


@contextmanager
def abreast(block, calls):
    """Two threads wait for each other in the first calls of a block."""
    barrier, left = threading.Barrier(2), threading.local()

    def meet(*_):
        left.calls = getattr(left, "calls", calls) - 1
        if left.calls >= 0:
            barrier.wait(timeout=60)

    handle = block.register_forward_pre_hook(meet)
    try:
        yield
    finally:
        handle.remove()


def request(pipe, steps):
    """As in diffusers' recipe for a server: a copy of the pipeline, its own scheduler.

    Short requests use the pipeline itself.
    """
    if steps > 3:
        pipe = copy.copy(pipe)
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
    return pipe(
        prompt_embeds=noise(1, 7, TEXT_WIDTH), negative_prompt_embeds=noise(1, 7, TEXT_WIDTH),
        num_frames=9, height=16, width=16, num_inference_steps=steps, guidance_scale=3.0,
        output_type="latent", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip


def test_threads_have_steps_of_their_own():
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(
        progress=False, salient_refresh=100, protected_steps="auto", protected_fraction=0.3
    )
    counts = attached(pipe.transformer).state.meter.counts
    alone = {}
    for steps, protected in ((3, 1), (7, 2)):
        before = counts["protected calls"]
        alone[steps] = request(pipe, steps)
        assert counts["protected calls"] - before == 2 * protected
    with abreast(pipe.transformer.blocks[0], calls=2 * 3), ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda steps: request(pipe, steps), alone))
    for video, expected in zip(found, alone.values(), strict=True):
        assert torch.equal(video, expected)


def test_it_is_saved_and_loaded_and_needs_the_pipeline_again(tmp_path):
    pipe = wan_pipeline()
    options = {"protected_steps": "auto", "protected_fraction": 0.4, "protected_format": "fp8"}
    pipe.enable_semantic_dialect(**PLAIN, **options)
    expected = generate(pipe)
    pipe.transformer.save_pretrained(tmp_path)
    pipe = wan_pipeline()
    plain = pipe.scheduler
    pipe.transformer = WanTransformer3DModel.from_pretrained(tmp_path)
    config = attached(pipe.transformer).config
    assert {name: getattr(config, name) for name in options} == options
    with pytest.raises(ConfigError, match="needs the scheduler of a pipeline"):
        generate(pipe)
    pipe.scheduler = IPNDMScheduler()
    with pytest.raises(ConfigError, match="which IPNDMScheduler does not have"):
        pipe.enable_semantic_dialect()
    pipe.scheduler = plain
    pipe.enable_semantic_dialect()
    assert torch.equal(generate(pipe), expected)
    pipe.enable_semantic_dialect(protected_steps="none")
    assert not torch.equal(generate(pipe), expected)
