"""Bit budgets: kept, close to the best possible, and with block sizes that engines serve."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dialect_kernels.formatbook import BLOCK_SIZES
from dialect_plugin.analysis.bit_budget import allocate_bits, check_budget, spend
from dialect_plugin.analysis.report import FormatLoss, LayerReport
from dialect_plugin.checkpoint.reader import open_packed
from dialect_plugin.cli import app
from dialect_plugin.scheme import SchemeError


def best_error(points, budget):
    """The least total error of all combinations within the budget."""
    combinations = itertools.product(*(sizes.values() for sizes in points.values()))
    return min(
        sum(error for _, error in combination)
        for combination in combinations
        if sum(bits for bits, _ in combination) <= budget
    )


@st.composite
def point_sets(draw):
    points = {}
    for i in range(draw(st.integers(1, 5))):
        sizes = draw(st.sets(st.sampled_from(BLOCK_SIZES), min_size=1))
        weights = draw(st.integers(1, 40)) * 64
        errors = st.integers(0, 1000).map(float)
        points[f"layer{i}"] = {b: (weights * (4 * b + 8) // b, draw(errors)) for b in sizes}
    return points


@settings(max_examples=150, deadline=None)
@given(points=point_sets(), share=st.floats(0, 1))
def test_an_allocation_is_within_one_step_of_the_best(points, share):
    least = sum(min(bits for bits, _ in sizes.values()) for sizes in points.values())
    most = sum(max(bits for bits, _ in sizes.values()) for sizes in points.values())
    budget = least + share * (most - least)
    chosen = spend(points, budget)
    assert sum(points[name][size][0] for name, size in chosen.items()) <= budget
    error = sum(points[name][size][1] for name, size in chosen.items())
    steps = [
        abs(one[1] - other[1])
        for sizes in points.values()
        for one, other in itertools.combinations(sizes.values(), 2)
    ]
    excess = error - best_error(points, budget)
    assert 0 <= excess <= max(steps, default=0.0)


@settings(max_examples=150, deadline=None)
@given(points=point_sets(), price=st.floats(1e-6, 10))
def test_an_allocation_is_the_best_for_budgets_that_a_price_per_bit_gives(points, price):
    """Every layer alone at the least error + price * bits: nothing of so many bits is better."""
    alone = [
        min(sizes.values(), key=lambda point: (point[1] + price * point[0], point[0]))
        for sizes in points.values()
    ]
    budget = sum(bits for bits, _ in alone)
    chosen = spend(points, budget)
    error = sum(points[name][size][1] for name, size in chosen.items())
    assert error == best_error(points, budget) == sum(error for _, error in alone)


def layer(name, noises, rows=64, columns=64, signal=100.0):
    losses = {
        f"BlockDialect-{b}": FormatLoss(4 + 8 / b + 8 / columns, noise, 20.0, None)
        for b, noise in zip((16, 32, 64), noises, strict=True)
    }
    return LayerReport(name, rows, columns, rows, signal, losses)


def test_layers_that_engines_fuse_take_one_block_size():
    layers = [
        layer("layers.0.self_attn.q_proj", (1.0, 2.0, 3.0)),
        layer("layers.0.self_attn.k_proj", (1.0, 50.0, 99.0)),
        layer("layers.0.self_attn.v_proj", (1.0, 1.1, 1.2)),
        layer("layers.0.mlp.gate_proj", (1.0, 2.0, 4.0)),
        layer("layers.0.mlp.up_proj", (1.0, 2.0, 4.0)),
        layer("layers.1.mlp.up_proj", (1.0, 30.0, 60.0)),
    ]
    sizes = allocate_bits(layers, 4.5).block_sizes
    assert sizes["layers.0.self_attn.q_proj"] == sizes["layers.0.self_attn.k_proj"] == 16
    assert sizes["layers.0.self_attn.v_proj"] == 16
    assert sizes["layers.0.mlp.gate_proj"] == sizes["layers.0.mlp.up_proj"] == 64
    assert sizes["layers.1.mlp.up_proj"] == 16  # gate of another decoder layer is no concern of it


def test_the_objective_decides_between_large_and_small_weights():
    large = layer("large", (8.0, 10.0, 12.0), signal=1000.0)
    small = layer("small", (0.8, 1.6, 2.4), signal=10.0)
    budget = (4.125 + 4.25) / 2 + 0.125
    by_error = allocate_bits([large, small], budget).block_sizes
    assert by_error == {"large": 32, "small": 64}
    relative = allocate_bits([large, small], budget, "relative").block_sizes
    assert relative == {"large": 64, "small": 32}


def test_the_figures_of_an_allocation():
    layers = [layer("a", (1.0, 2.0, 4.0)), layer("b", (1.0, 10.0, 40.0))]
    found = allocate_bits(layers, 4.25 + 0.125)
    assert found.block_sizes == {"a": 32, "b": 32}
    assert (found.bits_per_weight, found.gain_db) == (4.375, 0)
    found = allocate_bits(layers, 9)
    assert found.block_sizes == {"a": 16, "b": 16}
    assert found.bits_per_weight == 4.5 + 8 / 64
    assert found.sqnr_db == pytest.approx(20.0)  # 10 log10(200 / 2)
    assert found.gain_db == pytest.approx(7.781513, abs=1e-6)  # 10 log10(12 / 2)
    assert found.overrides() == {"a": {"block_size": 16}, "b": {"block_size": 16}}
    uniform = allocate_bits([layer("a", (2.0, 2.0, 4.0))], 4.25 + 0.125)
    assert uniform.block_sizes == {"a": 32}
    assert uniform.overrides() == {}
    assert uniform.gain_db == 0


def test_a_budget_below_the_largest_blocks_is_refused():
    with pytest.raises(SchemeError, match=r"--bits: 4\.2; the largest blocks need 4\.2500 bits"):
        allocate_bits([layer("a", (1.0, 2.0, 4.0))], 4.2)


def test_the_command_writes_what_quantize_takes(tiny_model, tmp_path):
    file, packed = tmp_path / "overrides.json", tmp_path / "packed"
    source = str(tiny_model())
    arguments = ["plan", source, "--bits", "4.35", "--output", str(file)]
    planned = CliRunner().invoke(app, arguments)
    assert planned.exit_code == 0, planned.stderr
    assert "gain +" in planned.stdout
    overrides = json.loads(file.read_text())
    assert {"block_size": 16} in overrides.values()
    done = CliRunner().invoke(app, ["quantize", source, str(packed), "--overrides", str(file)])
    assert done.exit_code == 0, done.stderr
    written = open_packed(packed)
    weights = bits = 0
    for name in written.layers:
        weight = written.read(name)
        assert weight.block_size == overrides.get(name, {"block_size": 32})["block_size"]
        weights += weight.shape[0] * weight.shape[1]
        bits += 8 * weight.nbytes
    assert 4.31 < bits / weights <= 4.35
    assert f"{bits / weights:.4f} bits per weight" in " ".join(planned.stdout.split())


def test_the_command_refuses_what_cannot_be_done(tiny_model, tmp_path):
    file = tmp_path / "overrides.json"
    for arguments, sentence in (
        (["--bits", "4.15"], "the largest blocks need 4.1806"),
        (["--bits", "nan"], "--bits: nan; blocks of 64 need more than 4.125 bits"),
        (["--bits", "4.9"], "--bits: 4.9; the smallest blocks need only 4.5556 bits per weight"),
        (["--bits", "4.3", "--targets", "nothing"], "matches no layer"),
        (["--bits", "4.3", "--max-rows", "4", "--all-rows"], "no effect with --all-rows"),
        (["--bits", "4.3", "-o", str(tmp_path)], "is a directory; give the name of a file"),
        (["--bits", "4.3", "-o", str(tmp_path / "no" / "f")], "lies in a directory that is not"),
    ):
        refused = CliRunner().invoke(app, ["plan", str(tiny_model()), "-o", str(file), *arguments])
        assert refused.exit_code == 1
        assert sentence in refused.stderr
    assert not file.exists()


def test_a_budget_without_choice_is_refused_before_a_weight_is_read(tiny_model, tmp_path):
    """The weights hold NaN, which measuring would find."""
    source = Path(shutil.copytree(tiny_model(), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        tensors[name].fill_(float("nan"))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for bits, sentence in (
        ("4.15", "largest blocks"),
        ("4.9", "smallest blocks"),
        ("4.4", "nan at"),
    ):
        refused = CliRunner().invoke(app, ["plan", str(source), "--bits", bits])
        assert refused.exit_code == 1
        assert sentence in refused.stderr


def test_the_bounds_of_a_budget_follow_from_shapes():
    shapes = {"layers.0.mlp.gate_proj": (8, 64), "layers.0.mlp.up_proj": (8, 48), "o": (8, 128)}
    # gate and up take one block size, which only 16 is; o takes 16, 32 or 64
    least = ((64 + 48) * 4.5 + 2 * 8 + 128 * 4.125 + 8) / 240
    most = ((64 + 48 + 128) * 4.5 + 3 * 8) / 240
    for good in (least, (least + most) / 2, most):
        check_budget(shapes, good)
    with pytest.raises(SchemeError, match=rf"the largest blocks need {least:.4f} bits"):
        check_budget(shapes, least - 1e-6)
    with pytest.raises(SchemeError, match=rf"the smallest blocks need only {most:.4f} bits"):
        check_budget(shapes, most + 1e-6)
