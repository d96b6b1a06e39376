"""Plans on text: budgets, the layer that needs precision, what `quantize` makes of them."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dialect_kernels import quantize
from dialect_kernels.formatbook import SEMANTIC_32
from dialect_kernels.ops import dequantize
from dialect_plugin.analysis.output_error import LayerOutput, OutputLoss
from dialect_plugin.analysis.precision import Form, plan_precision, render
from dialect_plugin.checkpoint.reader import open_packed
from dialect_plugin.cli import app
from dialect_plugin.scheme import SchemeError

SMALL = ["--samples", "4", "--sequence-length", "64"]
DOWN = "model.layers.1.mlp.down_proj"


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])


def layer(name, weights, activations, rows=64, columns=64):
    """A layer of which blocks of 16, 32 and 64 lose these nats; FP8 activations add 0.1."""
    losses = {}
    for block, ours, theirs in zip((16, 32, 64), weights, activations, strict=True):
        nats = {"none": ours, "fp8": ours + 0.1, "dialect": ours + theirs}
        losses[f"BlockDialect-{block}"] = OutputLoss(4 + 8 / block + 8 / columns, nats, nats)
    return LayerOutput(name, rows, columns, rows, 1.0, losses)


LAYERS = [
    layer("layers.0.self_attn.q_proj", (1, 2, 3), (1, 2, 3)),
    layer("layers.0.self_attn.k_proj", (1, 20, 40), (1, 2, 3), rows=32),
    layer("layers.0.mlp.down_proj", (1, 2, 4), (70, 90, 95)),
    layer("layers.0.self_attn.o_proj", (1, 1.5, 9), (1, 1.2, 2)),
]


def test_the_plan_is_the_best_of_all_where_a_price_gives_it():
    """Both budgets are what one price per bit and one per weight would spend."""
    bits, share = 4.125 + 8 / 64 + 0.2, 0.3
    plan = plan_precision(LAYERS, bits, share)
    assert plan.bits_per_weight <= bits
    assert plan.fp8_share <= share
    assert plan.activations[LAYERS[2].name] == "fp8"
    assert plan.block_sizes[LAYERS[0].name] == plan.block_sizes[LAYERS[1].name] == 16
    best = min(
        found.nats
        for found in every_plan()
        if found.bits_per_weight <= bits and found.fp8_share <= share
    )
    assert plan.nats == pytest.approx(best)
    assert plan.nats < plan.uniform.nats


def every_plan():
    empty = plan_precision(LAYERS, None, None)
    for sizes in itertools.product((16, 32, 64), repeat=3):
        for formats in itertools.product(("dialect", "fp8"), repeat=3):
            places = (0, 0, 1, 2)
            yield type(empty)(
                tuple(LAYERS),
                {x.name: sizes[i] for x, i in zip(LAYERS, places, strict=True)},
                {x.name: formats[i] for x, i in zip(LAYERS, places, strict=True)},
            )


def test_without_budgets_of_its_own_a_plan_is_uniform():
    plan = plan_precision(LAYERS, None, None)
    assert plan == plan.uniform
    assert plan.overrides() == {}
    only_fp8 = plan_precision(LAYERS, None, 0.3)
    assert only_fp8.block_sizes == plan.block_sizes
    assert only_fp8.overrides() == {LAYERS[2].name: {"activation_format": "fp8"}}
    only_bits = plan_precision(LAYERS, 9, None)
    assert set(only_bits.block_sizes.values()) == {16}
    assert only_bits.fp8_share == 0
    assert plan_precision(LAYERS, None, 1).fp8_share == 1


def test_a_budget_below_the_largest_blocks_is_refused():
    with pytest.raises(SchemeError, match=r"--bits: 4\.2; the largest blocks need 4\.2500 bits"):
        plan_precision(LAYERS, 4.2, 0.5)


def test_the_table_says_what_is_saved():
    shown = " ".join(render(plan_precision(LAYERS, None, 0.3)).split())
    assert "FP8 activations in 28.6 % of the weights" in shown
    assert "0.mlp.down_proj 64 x 64 32 W4A8 2100.000 92000.000 76.2" in shown


UNROTATED, SMALL_BOOK = Form(rotation="none"), Form("dialect_fp4")


def also(layer, form, times):
    """The layer measured in another form, too, which loses so many times as much."""
    losses = dict(layer.losses)
    for block in (16, 32, 64):
        loss = losses[f"BlockDialect-{block}"]
        nats = {activations: times * value for activations, value in loss.nats.items()}
        losses[form.name(block)] = dataclasses.replace(loss, nats=nats)
    return dataclasses.replace(layer, losses=losses)


def test_a_layer_takes_the_book_and_rotation_that_lose_clearly_less():
    q, k, down, o = LAYERS
    measured = [
        also(also(q, UNROTATED, 1.5), SMALL_BOOK, 2.0),  # k loses more than that gains
        also(also(k, UNROTATED, 0.5), SMALL_BOOK, 2.0),
        also(also(down, UNROTATED, 0.9), SMALL_BOOK, 0.8),
        also(also(o, UNROTATED, 0.97), SMALL_BOOK, 1.0),  # hardly less
    ]
    plan = plan_precision(measured, None, None, [UNROTATED, SMALL_BOOK])
    assert plan.overrides() == {
        q.name: {"rotation": "none"},
        k.name: {"rotation": "none"},
        down.name: {"book": "dialect_fp4"},
    }
    before = plan_precision(LAYERS, None, None)
    assert plan.uniform.nats == pytest.approx(before.nats)
    nats = [before.nats_of(layer) for layer in LAYERS]
    saved = -0.5 * nats[0] + 0.5 * nats[1] + 0.2 * nats[2]
    assert before.nats - plan.nats == pytest.approx(saved)
    shown = " ".join(render(plan).split())
    assert "0.mlp.down_proj 64 x 64 32 W4A4 dialect_fp4" in shown
    assert "W4A4 rotation none" in shown
    without = plan_precision(measured, None, None)
    assert without.overrides() == {}


def test_the_form_is_chosen_for_the_blocks_and_activations_that_a_layer_gets():
    """Unrotated, only blocks of 16 with FP8 activations lose less."""
    layers = [also(layer, UNROTATED, 2.0) for layer in LAYERS]
    losses = dict(layers[2].losses)
    name = UNROTATED.name(16)
    nats = losses[name].nats | {"fp8": 0.1}
    losses[name] = dataclasses.replace(losses[name], nats=nats)
    layers[2] = dataclasses.replace(layers[2], losses=losses)
    assert plan_precision(layers, 9, None, [UNROTATED]).forms == {}
    assert plan_precision(layers, None, 0.3, [UNROTATED]).forms == {}
    plan = plan_precision(layers, 9, 0.3, [UNROTATED])
    wanted = {"block_size": 16, "activation_format": "fp8", "rotation": "none"}
    assert plan.overrides()[LAYERS[2].name] == wanted
    assert plan.nats_of(layers[2]) == pytest.approx(0.1)


@pytest.fixture(scope="module")
def with_outliers(tiny_model, tmp_path_factory):
    """A model in which few of the inputs of one layer are large."""
    source = Path(shutil.copytree(tiny_model(), tmp_path_factory.mktemp("outliers") / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][::32] *= 30
    tensors[f"{DOWN}.weight"] *= 5
    tensors[f"{DOWN}.weight"][:, ::32] /= 30
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


def test_the_layer_with_large_inputs_gets_fp8(with_outliers, tmp_path):
    file, packed = tmp_path / "overrides.json", tmp_path / "packed"
    text = ["--calibrate", "default", *SMALL, "--rotation", "none"]
    planned = run("plan", with_outliers, "--fp8-share", 0.12, *text, "--output", file)
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(file.read_text()) == {DOWN: {"activation_format": "fp8"}}
    last = planned.stdout.splitlines()[-1]
    assert last.endswith(
        f"quantize {with_outliers} DST --calibrate default --overrides {file} --rotation none"
    )
    done = run("quantize", with_outliers, packed, *text, "--overrides", file)
    assert done.exit_code == 0, done.stderr
    scheme = open_packed(packed).scheme
    assert (scheme.book, scheme.rotation) == ("semantic_32", "none")
    formats = {name: scheme.layer(name).activation_format for name in open_packed(packed).layers}
    assert {name for name, found in formats.items() if found == "fp8"} == {DOWN}


def test_a_layer_that_was_rounded_before_is_planned_unrotated(tiny_model, tmp_path):
    """Its weights are numbers of the book as they are, and no longer when they are rotated."""
    source = Path(shutil.copytree(tiny_model(), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    weight = tensors[f"{DOWN}.weight"]
    rounded = dequantize(quantize(weight, SEMANTIC_32)).to(weight.dtype)
    save_file(tensors | {f"{DOWN}.weight": rounded}, source / "model.safetensors", {"format": "pt"})
    file, packed = tmp_path / "overrides.json", tmp_path / "packed"
    text = ["--calibrate", "default", *SMALL]
    planned = run("plan", source, "--fp8-share", 1, *text, "--output", file)
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(file.read_text())[DOWN]["rotation"] == "none"
    done = run("quantize", source, packed, *text, "--overrides", file)
    assert done.exit_code == 0, done.stderr
    scheme = open_packed(packed).scheme
    assert scheme.rotation == "hadamard_32"
    assert scheme.layer(DOWN).rotation == "none"
    fixed = ["--rotation", "hadamard_32", "--book", "semantic_32"]
    planned = run("plan", source, "--fp8-share", 1, *text, *fixed, "--output", file)
    assert planned.exit_code == 0, planned.stderr
    keys = {key for override in json.loads(file.read_text()).values() for key in override}
    assert keys == {"activation_format"}


def test_both_budgets_are_kept_in_the_packed_model(tiny_model, tmp_path):
    file, packed = tmp_path / "overrides.json", tmp_path / "packed"
    budgets = ["--bits", 4.4, "--fp8-share", 0.2]
    text = ["--calibrate", "default", *SMALL]
    planned = run("plan", tiny_model(), *budgets, *text, "-o", file)
    assert planned.exit_code == 0, planned.stderr
    done = run("quantize", tiny_model(), packed, *text, "--overrides", file)
    assert done.exit_code == 0, done.stderr
    written = open_packed(packed)
    weights = {name: written[name].shape[0] * written[name].shape[1] for name in written.layers}
    bits = sum(8 * written[name].nbytes for name in written.layers) / sum(weights.values())
    forms = {name: written.scheme.layer(name) for name in written.layers}
    share = sum(weights[n] for n, form in forms.items() if form.activation_format == "fp8")
    share /= sum(weights.values())
    assert 4.36 < bits <= 4.4
    assert 0.1 < share <= 0.2
    assert f"{bits:.4f} bits per weight" in planned.stdout
    assert f"FP8 activations in {100 * share:.1f} % of the weights" in planned.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--calibrate", "default"], "--bits: is missing; give a budget in bits per weight"),
        ([], "--bits: is missing"),
        (["--fp8-share", "0.1"], "--fp8-share: 0.1 has no effect without --calibrate"),
        (["--bits", "4.4", "--samples", "4"], "--samples: 4 has no effect without --calibrate"),
        (["--calibrate", "default", "--fp8-share", "15"], "--fp8-share: 15; it must be above 0"),
        (["--calibrate", "default", "--fp8-share", "nan"], "--fp8-share: nan; it must be above"),
        (
            ["--calibrate", "default", "--bits", "4.4", "--objective", "error"],
            "--objective: error has no effect with --calibrate",
        ),
        (["--calibrate", "absent.txt", "--bits", "4.4"], "--calibrate: absent.txt is not a file"),
        (
            ["--calibrate", __file__, "--bits", "4.4", "--sequence-length", "100000"],
            "--sequence-length: 100000; the model takes at most 256 tokens",
        ),
        (["--calibrate", "default", "--bits", "4.15"], "the largest blocks need 4.1806"),
        (["--calibrate", "default", "--bits", "4.4", "--lm-head"], "lm_head: lies outside of the"),
    ],
)
def test_what_cannot_be_done_is_refused(tiny_model, tmp_path, arguments, sentence):
    file = tmp_path / "overrides.json"
    short = ["--sequence-length", "64"] if "--calibrate" in arguments else []
    refused = run("plan", tiny_model(), "-o", file, *short, *arguments)
    assert refused.exit_code == 1
    assert sentence in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not file.exists()
