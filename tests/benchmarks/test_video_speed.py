"""Bytes at published shapes, by hand, and the goals they must meet; how times are taken."""

import math

import pytest
import torch
from torch import nn

import diffusers_hook
from benchmarks.lib.render import markdown
from benchmarks.video import bench_video_speed as speed
from benchmarks.video import instruments
from benchmarks.video.models import Place, Shape, generation, shapes
from tests.video.support.tiny_video import wan, wan_inputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

LARGEST = {"Wan 2.1 1.3B": 0.30, "Wan 2.1 14B": 0.30, "Open-Sora 2.0": 0.40}


@pytest.fixture(scope="module")
def counted():
    return {name: speed.count_bytes(shape) for name, shape in shapes().items()}


def test_goals(counted):
    for name, largest in LARGEST.items():
        size = counted[name]
        assert size["after"] <= largest * size["before"]
        assert size["layers_after"] <= 0.28 * size["layers_before"]


def test_wan_by_hand(counted):
    """1.3B: 30 blocks of two attentions (4 x 1536 x 1536) and a feed-forward layer (2 x 8960)."""
    width, hidden = 1536, 8960
    weights = 30 * (8 * width * width + 2 * width * hidden)
    rows = 30 * (8 * width + hidden + width)
    size = counted["Wan 2.1 1.3B"]
    assert size["quantized_weights"] == weights
    assert size["layers_before"] == 2 * weights
    assert size["layers_after"] == weights // 2 + weights // 32 + rows
    assert size["before"] - size["after"] == size["layers_before"] - size["layers_after"]
    assert size["fp8_layers"] == 0


def test_open_soras_modulation_is_fp8(counted):
    """19 double blocks with two modulations each, 38 single blocks, the final layer."""
    assert counted["Open-Sora 2.0"]["fp8_layers"] == 19 * 2 + 38 + 1


def tiny_call(place, dtype):
    frames, rows, _ = place.grid
    given = wan_inputs(frames=frames, size=2 * rows, dtype=dtype)
    return {name: value for name, value in given.items() if name != "timestep"}


TINY = Shape(
    lambda layers: wan(layers=layers),
    (30,),
    tiny_call,
    ("timestep", -10.0, 999.0),
    cpu=Place((2, 4, 4), 7, (2,)),
    gpu=Place((9, 9, 9), 7, (3,)),
)


def test_the_whole_way_on_a_tiny_model(monkeypatch, capsys):
    monkeypatch.setattr(speed, "shapes", lambda: {"tiny": TINY})
    figures = speed.measure("cpu", ["tiny"])
    taken = figures["models"]["tiny"]["time"]
    assert list(taken) == ["float32", "bfloat16", "quantized"]
    for kind in taken.values():
        assert min(kind.values()) > 0
    assert {"rounding_s", "saliency_s", "seda_s"} < taken["quantized"].keys()
    assert "tiny, 2 of 30 blocks, 32 tokens" in capsys.readouterr().out
    tables = speed.tables(figures)
    assert list(tables) == ["bytes", "time", "step", "memory"]
    assert all("tiny" in markdown(table) for table in tables.values())
    ours = taken["quantized"]
    assert tables["step"][1][2] == f"{15 * ours['call_s']:.1f} s"
    share = (ours["saliency_s"] + ours["seda_s"]) / ours["call_in_parts_s"]
    assert tables["step"][1][4] == f"{share:.1%}"


def enabled():
    model = wan()
    diffusers_hook.enable(model, progress=False, seda=True)
    return model


@torch.no_grad()
def test_calls_that_are_not_one_generation_give_no_figure():
    model = enabled()

    def watched(calls):
        with instruments.refreshed_in_time(model, speed.CALLS, speed.REFRESHES):
            for call in calls:
                call()

    call = generation(model, TINY, torch.float32, CPU)
    call()
    watched([call] * speed.CALLS)
    first_calls = [generation(model, TINY, torch.float32, CPU) for _ in range(speed.CALLS)]
    with pytest.raises(SystemExit, match="not those of one generation"):
        watched(first_calls)


def test_a_gpu_gets_a_videos_tokens():
    places = {name: shape.place(CUDA) for name, shape in shapes().items()}
    tokens = {name: math.prod(place.grid) for name, place in places.items()}
    assert tokens == {
        "Wan 2.1 1.3B": 32_760, "Wan 2.1 14B": 75_600, "Open-Sora 2.0": 76_032,
    }  # fmt: skip
    for shape in shapes().values():
        assert math.prod(shape.place(CPU).grid) == 780
        for device in (CPU, CUDA):  # a step is the call times one factor
            pairs = zip(shape.place(device).blocks, shape.blocks, strict=True)
            assert len({whole / built for built, whole in pairs}) == 1


def test_every_part_waits_for_the_device(monkeypatch):
    """A GPU that is not there: its peak, and what waits for it."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77)
    with instruments.peak_memory(CUDA) as peak:
        pass
    assert peak == [77]
    assert instruments.wait(CUDA) is torch.cuda.synchronize
    events = []
    layer = nn.Identity()
    with instruments.clocked([layer], lambda: events.append("wait")) as seconds:
        layer.register_forward_hook(lambda *_: events.append("work"))
        layer(torch.ones(1))
    assert events == ["wait", "wait", "work"]
    assert seconds[0] > 0
    layer(torch.ones(1))
    assert events == ["wait", "wait", "work", "work"]


@torch.no_grad()
def test_rounding_is_that_of_the_call_in_progress(monkeypatch):
    """The layers with few outputs get the same tokens, salient rows and groups."""
    from diffusers_hook.layers.dialect import DialectLinear
    from diffusers_hook.tokens import ops

    model = enabled()
    call = generation(model, TINY, torch.float32, CPU)
    call()
    seen = []
    semantic = ops.semantic_op

    def noted(*arguments):
        seen.append(arguments)
        return semantic(*arguments)

    monkeypatch.setattr(ops, "semantic_op", noted)
    layers = [layer for layer in model.modules() if isinstance(layer, DialectLinear)]
    with instruments.rounding_apart(layers, lambda: None) as seconds:
        call()
    assert seconds[0] > 0
    assert len(seen) == 2 * 2 * 8  # the text's projections have no salient rows
    for layer, few in zip(seen[::2], seen[1::2], strict=True):
        assert few[0] is layer[0] or torch.equal(few[0], layer[0])
        assert len(few[1]) == instruments.ROWS
        assert torch.equal(few[1], layer[1][: instruments.ROWS])
        assert all(torch.equal(a, b) for a, b in zip(few[-3:-1], layer[-3:-1], strict=True))
        assert few[-1] == layer[-1] == "none"  # the rotation


def test_the_gate_knows_decomposed_and_grouped_tokens(monkeypatch):
    assert not speed.semantic_faults(CPU)
    exact = speed.semantic_linear

    def lossy(x, p, bias, **rows):
        return exact(x, p, bias, **rows) + 1e-3

    monkeypatch.setattr(speed, "semantic_linear", lossy)
    assert len(speed.semantic_faults(CPU)) == 2
