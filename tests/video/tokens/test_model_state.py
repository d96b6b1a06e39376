"""Salient tokens and groups over calls: branches, refreshes, new generations, aborted ones."""

import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import LatteTransformer3DModel
from torch import nn

import diffusers_hook
from diffusers_hook.attention import attention
from diffusers_hook.attention.attention import Attention
from diffusers_hook.config import SemanticDialectConfig
from diffusers_hook.layouts import Block, Blocks, Grid, Stream
from diffusers_hook.layouts.grids import remembered
from diffusers_hook.model.attach import attached
from diffusers_hook.tokens import refresh
from diffusers_hook.tokens.block_state import BlockState
from diffusers_hook.tokens.branch import Context
from diffusers_hook.tokens.branch_state import BranchState
from diffusers_hook.tokens.meter import Meter
from diffusers_hook.tokens.model_state import ModelState
from tests.video.support import tiny_pipelines
from tests.video.support.tiny_video import run, wan

GRID = Grid(1, 5, 4, 4)
OPTIONS = {"seda": True, "progress": False, "salient_refresh": 2, "seda_refresh": 3}


def branches(model):
    return attached(model).state.blocks[0].branches


@pytest.fixture
def model():
    built = wan()
    diffusers_hook.enable(built, **OPTIONS)
    return built


def test_branches_keep_their_own_salient_tokens(model):
    run(model, context="cond", timestep=900, seed=1)
    run(model, context="uncond", timestep=900, seed=2)
    found = branches(model)
    assert found.keys() == {"cond", "uncond"}
    assert not torch.equal(found["cond"].salient, found["uncond"].salient)
    assert {branch.calls for branch in found.values()} == {1}


def test_without_names_the_calls_of_a_timestep_are_numbered(model):
    for timestep in (900, 800):
        run(model, timestep=timestep, seed=1)
        run(model, timestep=timestep, seed=2)
    found = branches(model)
    assert found.keys() == {"call 0", "call 1"}
    assert {branch.calls for branch in found.values()} == {2}


def test_batched_guidance_is_one_branch_with_a_set_per_sample(model):
    for timestep in (900, 800):
        run(model, batch=2, timestep=timestep)
    found = branches(model)
    assert found.keys() == {"call 0"}
    first, second = found["call 0"].salient
    assert len(first) == len(second) == 8  # a tenth of 5 x 4 x 4 tokens
    assert not torch.equal(first, second)


def test_refreshes_happen_when_they_are_due(model, monkeypatch):
    chosen, grouped = [], []
    select, assign = refresh.select_salient, refresh.assign_groups
    monkeypatch.setattr(
        refresh, "select_salient", lambda *a, **k: chosen.append(step) or select(*a, **k)
    )
    monkeypatch.setattr(
        refresh, "assign_groups", lambda *a, **k: grouped.append(step) or assign(*a, **k)
    )
    for step in range(7):
        run(model, context="cond", timestep=900 - step)
    assert chosen == [0, 0, 2, 2, 4, 4, 6, 6]  # every second call, in both blocks
    assert grouped == [0, 0, 3, 3, 6, 6]


def test_scores_come_from_the_log_sum_exp_where_it_is_at_hand(model, monkeypatch):
    """Groups need it anyway; each call computes it once."""
    used = []
    compute, receive = attention._kernel_lse, refresh.received_attention
    monkeypatch.setattr(attention, "_kernel_lse", lambda a: used.append("lse") or compute(a))
    monkeypatch.setattr(
        refresh, "received_attention", lambda a: used.append(a.lse is not None) or receive(a)
    )
    for step in range(4):
        used.append(f"step {step}")
        run(model, context="cond", timestep=900 - step)
    with_lse = ["lse", True] * 2
    assert used == ["step 0", *with_lse, "step 1", "step 2", False, False, "step 3", *with_lse]


def test_an_observed_call_is_checked_once(model, monkeypatch):
    checked, check = [], attention._check_tokens
    monkeypatch.setattr(
        attention, "_check_tokens", lambda *tensors: checked.append(1) or check(*tensors)
    )
    run(model, context="cond")
    assert len(checked) == 2  # one self-attention in each of two blocks


def test_a_set_serves_its_block_until_the_next_refresh(model, monkeypatch):
    """Queries, keys and values of the first call have no set yet; those of the next one have."""
    seen = []
    rows = BlockState.rows

    def record(self, stream, count, device):
        found = rows(self, stream, count, device)
        salient = None if found.salient is None else found.salient.shape[1]
        seen.append((self.index, stream.value, salient))
        return found

    monkeypatch.setattr(BlockState, "rows", record)
    first = (
        [("video", None)] * 3 + [("video", 8)] * 2 + [("context", None)] * 2 + [("video", 8)] * 3
    )
    later = [("video", 8)] * 5 + [("context", None)] * 2 + [("video", 8)] * 3
    for expected, timestep in ((first, 900), (later, 800)):
        seen.clear()
        run(model, context="cond", timestep=timestep)
        for block in range(2):
            assert [entry[1:] for entry in seen if entry[0] == block] == expected


def test_rows_that_do_not_fit_say_what_may_have_split_them(model):
    model.blocks[0].attn1.to_q.register_forward_pre_hook(lambda layer, args: args[0][:, :40])
    with pytest.raises(diffusers_hook.LayoutError, match="got 40 rows for 1 samples") as caught:
        run(model)
    assert "context parallelism and inputs split inside the model need sal" in str(caught.value)


def test_groups_are_the_mean_of_the_samples(model):
    run(model, batch=2)
    for record in (branches(model)["call 0"], BranchState()):
        record.group = torch.tensor([[0, 0, 1, -1], [-1, 2, -1, -1]], dtype=torch.int32)
        assert record.group_sizes() == (1.5, 0.5)


def outputs(model, timesteps=(900, 800, 700), **options):
    return [
        run(model, context=context, timestep=timestep, **options)
        for timestep in timesteps
        for context in ("cond", "uncond")
    ]


@pytest.mark.parametrize("timesteps", [(900, 800, 700), (900,)])
def test_generations_in_a_row_are_the_same(model, timesteps):
    first = outputs(model, timesteps)
    second = outputs(model, timesteps)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_resolutions_frame_counts_and_batches_in_a_row(model):
    alone = {}
    sizes = ({"size": 8}, {"size": 12}, {"frames": 3}, {"batch": 2}, {"size": 8})
    for options in sizes:
        fresh = wan()
        diffusers_hook.enable(fresh, **OPTIONS)
        alone[str(options)] = outputs(fresh, **options)
    for options in sizes:
        for a, b in zip(outputs(model, **options), alone[str(options)], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_the_model_usable(model, error):
    expected = outputs(model)
    run(model, context="cond", timestep=900, seed=5)

    def stop(*_):
        raise error("stop")

    handle = model.blocks[1].ffn.register_forward_pre_hook(stop)
    with pytest.raises(error):
        run(model, context="uncond", timestep=900, seed=5)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), expected, strict=True))
    diffusers_hook.disable(model)


def test_a_block_called_alone_rounds_its_rows_alone(model):
    layer = model.blocks[0].attn1.to_q
    x = torch.randn(1, 80, 64, generator=torch.Generator().manual_seed(0))
    before = layer(x)
    run(model, context="cond")
    assert torch.equal(layer(x), before)


def test_random_selection_is_drawn_anew_and_the_same_in_every_run():
    sets = []
    for seed in (0, 0, 1):
        model = wan()
        diffusers_hook.enable(model, **OPTIONS, selection="random", seed=seed)
        drawn = []
        for step in range(3):
            run(model, context="cond", timestep=900 - step)
            drawn.append(branches(model)["cond"].salient)
        sets.append(drawn)
    assert all(torch.equal(a, b) for a, b in zip(sets[0], sets[1], strict=True))
    assert not torch.equal(sets[0][0], sets[2][0])
    assert not torch.equal(sets[0][0], sets[0][2])
    assert torch.equal(sets[0][0], sets[0][1])  # refreshed every second call


class Counted(ModelState):
    """Counts the beginnings of generations."""

    resets = 0

    def begin(self, *arguments):
        known = self.generation.records
        known[-1] = {}  # of no block; forgotten with the others
        super().begin(*arguments)
        self.resets += -1 not in known


def resets(calls, **options):
    """How many generations begin in calls of (timestep, branch, step)."""
    found = Counted(SemanticDialectConfig(), **options)
    for timestep, branch, step in calls:
        found.begin(GRID, timestep, Context(branch, step))
        found.end()
    return found.resets


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        # (timestep, branch, step) of each call
        ([(9, "c", None), (9, "u", None), (8, "c", None), (8, "u", None)], 1),
        ([(9, "c", None), (8, "c", None), (9, "c", None)], 2),
        ([(9, "c", None), (9, "c", None)], 2),  # one step, twice
        ([(9, "c", 0), (9, "u", 0), (9, "c", 1), (9, "u", 1)], 1),  # a timestep met twice
        ([(9, None, None), (9, None, None), (8, None, None)], 1),
        ([(9, "c", 0), (9, "c", 0)], 2),
        ([(9, "c", 0), (9, "u", 0), (8, "c", 1), (9, "c", 0)], 2),
        # schedulers of second order repeat every timestep but the first
        ([(t, branch, None) for t in (9, 8, 8, 7, 7) for branch in "cu"], 1),
        ([(t, branch, None) for t in (9, 8, 8, 9, 8, 8) for branch in "cu"], 2),
        # frame after frame, then the next part of the video
        ([((9, 9, 9), "c", None), ((8, 9, 9), "c", None), ((8, 8, 9), "c", None)], 1),
        ([((9, 9, 9), "c", None), ((4, 4, 4), "c", None), ((1, 1, 9), "c", None)], 2),
        ([(None, "c", None)], 1),
    ],
)
def test_where_a_generation_begins(calls, expected):
    def tensors(convert):
        return [(None if t is None else convert(t), branch, step) for t, branch, step in calls]

    assert resets(calls) == expected
    assert resets(tensors(torch.tensor)) == expected
    assert resets(tensors(lambda t: -torch.tensor(t)), timestep_rises=True) == expected


def test_a_branch_may_have_samples_of_its_own():
    """LTX-2: two samples with guidance by the text, one for each of the other branches."""
    found = Counted(SemanticDialectConfig())
    for timestep in (9.0, 8.0, 7.0):
        for branch, batch in (("cond_uncond", 2), ("uncond_stg", 1), ("uncond_modality", 1)):
            found.begin(Grid(batch, 5, 4, 4), torch.full((batch,), timestep), Context(branch))
            found.end()
    assert found.resets == 1
    found.begin(Grid(1, 5, 4, 4), torch.tensor([6.0]), Context("cond_uncond"))
    assert found.resets == 2


PIPELINES = {
    # (pipeline, options, transformer calls of a generation, generations in it)
    "Latte": (tiny_pipelines.latte, {}, 4, 1),
    "LTX-2": (tiny_pipelines.ltx2, {}, 12, 1),
    "Mochi": (tiny_pipelines.mochi, {}, 4, 1),
    "SkyReels-V2": (tiny_pipelines.skyreels, {}, 16, 1),
    "SkyReels-V2, frame after frame": (
        tiny_pipelines.skyreels, {"ar_step": 2, "causal_block_size": 1}, 32, 1,
    ),
    "SkyReels-V2, three parts": (
        tiny_pipelines.skyreels, {"base_num_frames": 9, "overlap_history": 5}, 48, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "transformer"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_generation_of_a_real_pipeline_begins_once(name, whole):
    """Whether the hook knows the pipeline or its transformer only."""
    make, options, calls, generations = PIPELINES[name]
    pipe, generate = make()
    diffusers_hook.enable(pipe if whole else pipe.transformer, progress=False, salient_refresh=100)
    found = attached(pipe.transformer).state
    found.__class__ = Counted
    first = generate(**options)
    assert found.meter.counts["calls"] == calls
    assert found.resets == generations
    assert torch.equal(generate(**options), first)
    assert found.resets == 2 * generations
    branches = sum(len(block.branches) for block in found.blocks)
    assert found.meter.counts["salient refreshes"] == 2 * generations * branches


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize(
    "make", [tiny_pipelines.latte, tiny_pipelines.ltx2], ids=["Latte", "LTX-2"]
)
def test_a_callback_that_aborts_leaves_nothing_behind(make, step, error):
    """Latte does not name its branches; its next first call looks like another one of the step."""
    pipe, generate = make()
    pipe.enable_semantic_dialect(progress=False, seda=True)
    expected = generate()

    def stop(pipe, index, timestep, tensors):
        if index == step:
            raise error("stop")
        return tensors

    with pytest.raises(error):
        generate(seed=1, callback_on_step_end=stop)
    assert torch.equal(generate(), expected)


@pytest.mark.parametrize("options", [{}, {"salient_refresh": 3}])
def test_a_pipeline_loaded_quantized_is_followed_once_it_is_enabled(tmp_path, options):
    """And stays so where its transformer is given other options later."""
    pipe, generate = tiny_pipelines.latte()
    diffusers_hook.enable(pipe.transformer, progress=False)
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = LatteTransformer3DModel.from_pretrained(tmp_path)
    assert pipe.enable_semantic_dialect() is pipe
    diffusers_hook.enable(pipe.transformer, **options)
    expected = generate()

    def stop(pipe, index, timestep, tensors):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(seed=1, callback_on_step_end=stop)
    assert torch.equal(generate(), expected)


def pipeline(timesteps):
    """What the hook looks at of a pipeline."""

    class Pipeline:
        scheduler = SimpleNamespace(timesteps=timesteps)

    return Pipeline()


def test_a_pipeline_is_not_kept_alive_and_not_missed():
    model = wan()
    diffusers_hook.enable(model, **OPTIONS)
    expected = outputs(model)
    pipe = pipeline(torch.arange(3))
    attached(model).state.follow(pipe)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), expected, strict=True))
    seen = weakref.ref(pipe)
    del pipe
    assert seen() is None
    attached(model).state.follow(SimpleNamespace())  # cannot be referred to weakly
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), expected, strict=True))


@pytest.mark.parametrize("context", [None, "cond"])
def test_branches_do_not_pile_up(model, context):
    for _ in range(100):
        run(model, context=context, timestep=500)
        assert len(branches(model)) <= 16


def test_no_value_is_read_where_the_step_is_known():
    """Tensors without values stand for those of a GPU that is not done yet."""
    timesteps = torch.arange(3, device="meta")
    found = Counted(SemanticDialectConfig())
    pipe = pipeline(timesteps)
    found.follow(pipe)
    for timestep in timesteps:
        for branch in ("cond", "uncond", None, None):
            found.begin(GRID, timestep[None].expand(2), Context(branch))
            found.end()
    assert found.resets == 1
    assert found.generation._last.keys() == {"cond", "uncond", "call 2", "call 3"}
    pipe.scheduler.timesteps = torch.arange(3, device="meta")
    found.begin(GRID, pipe.scheduler.timesteps[0], Context("cond"))
    assert found.resets == 2

    found = Counted(SemanticDialectConfig())
    found.begin(GRID, torch.empty(2, device="meta"), Context("cond", 0))
    alone = ModelState(SemanticDialectConfig(salient_fraction=0.0))
    alone.begin(GRID, torch.empty(2, device="meta"), Context("cond"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        found.begin(GRID, torch.empty(2, device="meta"), Context("cond"))


@pytest.mark.parametrize("attends", ["all", "frame", "time"])
@pytest.mark.parametrize("text", ["first", "last", None])
def test_choosing_and_grouping_read_no_value(monkeypatch, attends, text):
    """Data-dependent sizes and conditions make a GPU wait; without values they are errors."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())  # knows no such device
    block = Block("block", nn.Identity(), Blocks("blocks", (), "", text=text, attends=attends))
    found = ModelState(SemanticDialectConfig(seda=True), [block])
    [block] = found.blocks
    grid = Grid(2, 5, 4, 6)
    rows = {"all": (2, 120 + 7 * (text is not None)), "frame": (10, 24), "time": (48, 5)}[attends]
    query = torch.empty(rows[0], 4, rows[1], 32, device="meta", dtype=torch.bfloat16)
    for step in range(2):
        found.begin(grid, None, Context("cond", step))
        block.observe(Attention.checked(query, query))
        for stream, count in ((Stream.VIDEO, 240), (Stream.JOINT, 254), (Stream.TEXT, 14)):
            block.rows(stream, count, query.device)
        found.end()
    assert found.meter.counts["group refreshes"] == 1


def test_values_are_read_once_from_each_tensor():
    read = []
    sizes = remembered(lambda tensor: read.append(tensor.shape) or len(tensor))
    first, second = torch.zeros(3), torch.zeros(4)
    assert [sizes(first), sizes(second), sizes(first)] == [3, 4, 3]
    assert len(read) == 2


def test_the_clock_waits_where_it_is_told_to():
    events = []
    found = Meter()
    found.wait = lambda: events.append("wait")
    with found.clock("part"):
        events.append("work")
    assert events == ["wait", "work", "wait"]
    assert found.seconds["part"] > 0


def test_rows_that_do_not_fit_the_grid_are_refused(model):
    block = attached(model).state.blocks[0]
    attached(model).state.begin(GRID, 9.0, Context("c"))
    from diffusers_hook import LayoutError, Stream

    with pytest.raises(LayoutError, match="got 81 rows for 1 samples of 80 video tokens"):
        block.rows(Stream.VIDEO, 81, torch.device("cpu"))
