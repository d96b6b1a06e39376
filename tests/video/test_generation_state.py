"""Salient tokens and groups over calls: branches, refreshes, new generations, aborted ones."""

import pytest
import torch
from tiny_video import run, wan

import diffusers_hook
from diffusers_hook import state
from diffusers_hook.attach import attached
from diffusers_hook.branch import Context
from diffusers_hook.config import SemanticDialectConfig
from diffusers_hook.layouts import Grid

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
    select, assign = state.select_salient, state.assign_groups
    monkeypatch.setattr(
        state, "select_salient", lambda *a, **k: chosen.append(step) or select(*a, **k)
    )
    monkeypatch.setattr(
        state, "assign_groups", lambda *a, **k: grouped.append(step) or assign(*a, **k)
    )
    for step in range(7):
        run(model, context="cond", timestep=900 - step)
    assert chosen == [0, 0, 2, 2, 4, 4, 6, 6]  # every second call, in both blocks
    assert grouped == [0, 0, 3, 3, 6, 6]


def test_a_set_serves_its_block_until_the_next_refresh(model, monkeypatch):
    """Queries, keys and values of the first call have no set yet; those of the next one have."""
    seen = []
    rows = state.BlockState.rows

    def record(self, stream, count, device):
        found = rows(self, stream, count, device)
        salient = None if found.salient is None else found.salient.shape[1]
        seen.append((self.index, stream.value, salient))
        return found

    monkeypatch.setattr(state.BlockState, "rows", record)
    first = (
        [("video", None)] * 3 + [("video", 8)] * 2 + [("context", None)] * 2 + [("video", 8)] * 3
    )
    later = [("video", 8)] * 5 + [("context", None)] * 2 + [("video", 8)] * 3
    for expected, timestep in ((first, 900), (later, 800)):
        seen.clear()
        run(model, context="cond", timestep=timestep)
        for block in range(2):
            assert [entry[1:] for entry in seen if entry[0] == block] == expected


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


def fresh():
    found = state.ModelState(SemanticDialectConfig())
    found.resets = 0
    reset = found.reset

    def counted():
        found.resets += 1
        reset()

    found.reset = counted
    return found


@pytest.mark.parametrize(
    ("calls", "resets"),
    [
        # (timestep, branch, step) of each call
        ([(9, "c", None), (9, "u", None), (8, "c", None), (8, "u", None)], 1),
        ([(9, "c", None), (8, "c", None), (9, "c", None)], 2),
        ([(9, "c", None), (9, "c", None)], 2),  # one step, twice
        ([(9, "c", 0), (9, "u", 0), (9, "c", 1), (9, "u", 1)], 1),  # a timestep met twice
        ([(9, None, None), (9, None, None), (8, None, None)], 1),
        ([(9, "c", 0), (9, "c", 0)], 2),
    ],
)
def test_where_a_generation_begins(calls, resets):
    found = fresh()
    for timestep, branch, step in calls:
        found.begin(GRID, timestep, Context(branch, step))
        found.end()
    assert found.resets == resets


def test_rows_that_do_not_fit_the_grid_are_refused(model):
    block = attached(model).state.blocks[0]
    attached(model).state.begin(GRID, 9.0, Context("c"))
    from diffusers_hook import LayoutError, Stream

    with pytest.raises(LayoutError, match="got 81 rows for 1 samples of 80 video tokens"):
        block.rows(Stream.VIDEO, 81, torch.device("cpu"))
