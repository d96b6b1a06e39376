"""Experts in reports and plans: errors and losses of single experts, plans that engines take."""

import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

from dialect_kernels import quantize
from dialect_kernels.calibrated import quantize_calibrated
from dialect_kernels.formatbook import SEMANTIC_32
from dialect_kernels.rotation import rotate_activation, rotate_weight
from dialect_plugin.analysis import output_error
from dialect_plugin.analysis.output_error import ExpertOutput, LayerOutput, OutputLoss
from dialect_plugin.analysis.output_formats import output_formats
from dialect_plugin.analysis.output_report import OutputReport, render
from dialect_plugin.analysis.precision import plan_precision
from dialect_plugin.calibration.experts import in_groups
from dialect_plugin.calibration.options import CalibrationOptions
from dialect_plugin.calibration.text import read_text
from dialect_plugin.checkpoint.layer_choice import choose_layers
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import open_checkpoint, open_packed
from dialect_plugin.cli import app
from dialect_plugin.experts import PARTS, expert_of
from dialect_plugin.transformers import DialectExperts
from tests.support import swept_models
from tests.support.calibration_cases import moments, varied_text
from tests.support.conversions import options_of
from tests.support.mixtures import MIXTURES, biases_of, maker, weight_of
from tests.support.output_losses import lost_outputs

SMALL = ["--samples", "4", "--sequence-length", "64"]
SPARSE = {"num_experts": 16, "num_experts_per_tok": 1, "num_hidden_layers": 1}
METHODS = ("none", "fp8", "dialect")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return varied_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Architecture, and how its config differs -> a tiny checkpoint; each is made once."""
    return maker(tmp_path_factory.mktemp("models"))


def run(*arguments):
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def measured(source, text, max_rows=None, **given):
    options = CalibrationOptions(
        calibrate=str(text), **({"samples": 8, "sequence_length": 64} | given)
    )
    checkpoint = open_checkpoint(source)
    scheme = options_of(book="semantic_32", rotation="hadamard_32")
    forms = choose_layers(checkpoint, scheme).formats
    formats = output_formats(SEMANTIC_32)
    found = output_error.measure_outputs(checkpoint, forms, formats, options, Silent(), max_rows)
    return {layer.name: layer for layer in found}


class Whole:
    """The experts of a whole model in transformers, on every fourth window and on the others.

    Attributes:
        calibrating: experts' module -> its tokens [T, H], and their experts [T, k].
        measured: the same, the experts' weights [T, k], and the gradient at its output [T, H].
    """

    def __init__(self, source, text, samples=8):
        name = open_checkpoint(source).architecture
        model = getattr(transformers, name).from_pretrained(source, dtype=torch.float32)
        options = CalibrationOptions(calibrate=str(text), samples=samples, sequence_length=64)
        windows = read_text(source, options, swept_models.VOCABULARY).windows
        self._calls, self.calibrating, self.measured = {}, {}, {}
        for path, module in model.named_modules():
            if path.endswith(".experts"):
                module.register_forward_hook(self._keep(path), with_kwargs=True)
        chosen = [index * samples // (samples // 4) for index in range(samples // 4)]
        with torch.no_grad():
            for index in range(samples):
                if index not in chosen:
                    model(windows[index][None])
        self.calibrating = self._taken(2)
        draw = torch.Generator().manual_seed(0)
        for index in chosen:
            logits = model(windows[index][None]).logits[0]
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=draw)
            logits.log_softmax(-1).gather(1, drawn).sum().backward()
        self.measured = self._taken(4)
        self.tokens = len(chosen) * 64

    def _keep(self, path):
        def keep(module, given, named, output):
            if output.requires_grad:
                output.retain_grad()
            x, chosen, weights = (*given, *named.values())[:3]
            self._calls.setdefault(path, []).append((x.detach(), chosen, weights.detach(), output))

        return keep

    def _taken(self, count):
        found = {}
        for path, calls in self._calls.items():
            parts = [(x, chosen, weights, y.grad)[:count] for x, chosen, weights, y in calls]
            flat = [[part.reshape(-1, part.shape[-1]) for part in each] for each in parts]
            found[path] = [torch.cat(column) for column in zip(*flat, strict=True)]
        self._calls.clear()
        return found


def products_of(checkpoint, between, prefix, number, x):
    """Part of an expert -> (its input, its output), with gradients; and the expert's output."""
    names = [part for part in PARTS if f"{prefix}.{number}.{part}" in checkpoint.weights]
    weights = {part: weight_of(checkpoint, f"{prefix}.{number}.{part}") for part in names}
    biases = dict(zip(PARTS, biases_of(checkpoint, prefix, number), strict=False))
    x = x.clone().requires_grad_()
    found = {part: (x, x @ weights[part].T + biases.get(part, 0.0)) for part in names[:-1]}
    inner = between(*(y for _, y in found.values()))
    found[names[-1]] = inner, inner @ weights[names[-1]].T
    for _, y in found.values():
        y.retain_grad()
    return weights, found


def expected_of(checkpoint, between, prefix, number, whole, path, rotation="hadamard_32"):
    """Part -> (tokens, rare, format of activations -> (noise, nats)) in blocks of 32, by hand."""
    x, chosen = whole.calibrating[path]
    _, seen = products_of(checkpoint, between, prefix, number, x[(chosen == number).any(-1)])
    x, chosen, shares, gradient = whole.measured[path]
    token, place = torch.where(chosen == number)
    weights, products = products_of(checkpoint, between, prefix, number, x[token])
    (*_, (_, output)) = products.values()
    output.backward(gradient[token] * shares[token, place, None])
    found = {}
    for part, (given, y) in products.items():
        tokens = rotate_activation(seen[part][0].detach(), rotation)
        rare = 4 * len(tokens) < tokens.shape[1]
        packed = (
            quantize(weights[part], SEMANTIC_32, 32, rotation=rotation)
            if rare
            else quantize_calibrated(
                weights[part], moments(tokens), SEMANTIC_32, 32, rotation=rotation
            ).packed
        )
        exact = rotate_weight(weights[part], rotation)
        given = rotate_activation(given.detach(), rotation)
        losses = {a: lost_outputs(exact, packed, given, y.grad, a) for a in METHODS}
        found[part] = len(given), rare, losses
    return found


@pytest.mark.parametrize(
    "architecture", ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM"]
)
def test_losses_are_those_of_every_expert_by_itself(architecture, model_of, text):
    """Of experts stored one by one and in one tensor, whose gates and ups alternate."""
    source, (between, _) = model_of(architecture), MIXTURES[architecture]
    checkpoint, whole, found = open_checkpoint(source), Whole(source, text), measured(source, text)
    prefixes = sorted({e.prefix for n in checkpoint.weights if (e := expert_of(n)) is not None})
    for prefix, path in zip(prefixes, whole.measured, strict=True):
        sums = {(part, a): [0.0, 0.0] for part in PARTS for a in METHODS}
        for number in range(4):
            expected = expected_of(checkpoint, between, prefix, number, whole, path)
            for part, (tokens, rare, losses) in expected.items():
                expert = found[f"{prefix}.{part}"].experts[number]
                assert (expert.number, expert.tokens, expert.rare) == (number, tokens, rare)
                for a, (noise, nats) in losses.items():
                    got = expert.nats["BlockDialect-32"][a]
                    # a few codes at a midpoint differ, because the sums of the moments do
                    assert got == pytest.approx(nats / whole.tokens, rel=0.05)
                    sums[part, a][0] += noise / whole.tokens
                    sums[part, a][1] += nats / whole.tokens
        for (part, a), (noise, nats) in sums.items():
            layer = found[f"{prefix}.{part}"]
            loss = layer.losses["BlockDialect-32"]
            assert loss.noise[a] == pytest.approx(noise, rel=0.03)
            assert loss.nats[a] == pytest.approx(nats, rel=0.03)
            shape = checkpoint.weights[f"{prefix}.0.{part}"].shape
            assert (layer.rows, layer.columns, layer.weights) == (*shape, 4 * shape[0] * shape[1])
    assert sum(len(layer.experts) for layer in found.values()) == 2 * 3 * 4


def test_experts_without_tokens_count_nothing_and_are_listed(model_of, text):
    """Some of 16 experts see too few tokens, or none."""
    source = model_of("Qwen3MoeForCausalLM", **SPARSE)
    whole = Whole(source, text, samples=4)
    found = measured(source, text, samples=4)
    ((path, (_, chosen, *_)),) = whole.measured.items()
    layer = found[f"{path}.gate_proj"]
    counts = torch.bincount(chosen.flatten(), minlength=16).tolist()
    assert [expert.tokens for expert in layer.experts] == counts
    before = torch.bincount(whole.calibrating[path][1].flatten(), minlength=16)
    assert [expert.rare for expert in layer.experts] == (4 * before < layer.columns).tolist()
    idle = [expert for expert in layer.experts if not expert.tokens]
    assert idle
    assert any(expert.rare for expert in layer.experts)
    assert not all(expert.rare for expert in layer.experts)
    for expert in layer.experts:
        nats = expert.nats["BlockDialect-32"]["dialect"]
        assert (nats == 0) == (expert.tokens == 0)
    total = sum(expert.nats["BlockDialect-32"]["dialect"] for expert in layer.experts)
    assert layer.losses["BlockDialect-32"].nats["dialect"] == pytest.approx(total)


def test_groups_of_experts_give_the_same_figures(model_of, text, monkeypatch):
    """Moments of few inputs in memory together: the decoder layer runs several times."""
    source = model_of("MixtralForCausalLM")
    whole = measured(source, text, max_rows=32)
    split = []

    def in_small_groups(inputs, block):
        split.append(in_groups(inputs, 3 * max(entry.nbytes for entry in inputs)))
        return split[-1]

    monkeypatch.setattr(output_error, "groups_of", in_small_groups)
    assert measured(source, text, max_rows=32) == whole
    assert min(map(len, split)) > 1


def test_experts_that_transformers_does_not_show_are_left_out(model_of, text):
    source = model_of("Llama4ForCausalLM")
    found = measured(source, text, samples=4, max_rows=16)
    assert found
    assert not any(layer.experts for layer in found.values())
    shown = run("report", source, "--calibrate", text, *SMALL, "--max-rows", 16)
    assert "feed_forward.experts: not measured, because transformers does not show" in shown


def test_the_report_shows_the_experts(model_of, text, tmp_path):
    source, page = model_of("Qwen3MoeForCausalLM", **SPARSE), tmp_path / "page.html"
    text_options = ["--calibrate", text, *SMALL, "--max-rows", 16]
    found = json.loads(run("report", source, *text_options, "--json", "--html", page))
    layers = {layer["name"]: layer for layer in found["layers"]}
    name = "model.layers.0.mlp.experts.down_proj"
    experts = layers[name]["experts"]
    assert len(experts["tokens"]) == len(experts["nats"]["BlockDialect-32"]) == 16
    nats = experts["nats"]["BlockDialect-32"]
    assert experts["worst"] == nats.index(max(nats))
    assert sum(nats) == pytest.approx(layers[name]["losses"]["BlockDialect-32"]["nats"]["W4A4"])
    assert all(not lost for lost, tokens in zip(nats, experts["tokens"], strict=True) if not tokens)
    assert "experts" not in layers["model.layers.0.self_attn.q_proj"]
    shown = page.read_text(encoding="utf-8")
    assert f"<td>{name}</td><td>16</td><td>{experts['worst']}</td>" in shown
    assert "saw no measured token and count no error" in shown


def expert_layer(name, nats, experts):
    losses = {f"BlockDialect-{b}": OutputLoss(4 + 8 / b, nats, nats) for b in (16, 32, 64)}
    return LayerOutput(name, 64, 64, 64, 1.0, losses, experts)


def test_the_table_names_the_worst_expert():
    nats = dict.fromkeys(METHODS, 0.004)
    names = [f"BlockDialect-{b}" for b in (16, 32, 64)]
    parts = [
        ExpertOutput(number, tokens, rare, dict.fromkeys(names, dict.fromkeys(METHODS, lost)))
        for number, tokens, rare, lost in [
            (0, 9, False, 0.001),
            (1, 4, True, 0.003),
            (2, 0, True, 0),
        ]
    ]
    layer = expert_layer("model.layers.0.mlp.experts.up_proj", nats, tuple(parts))
    report = OutputReport("m", "t", tuple(names), (layer,), "semantic_32", "none")
    assert layer.weights == 3 * 64 * 64
    lines = [line.split() for line in render(report).splitlines()]
    assert [layer.name, "3", "1", "75.0", "2", "1"] in lines
    assert "of 3 matrices of experts, 2 saw too few tokens" in render(report)


def test_gate_and_up_of_all_experts_are_one_choice():
    """Down is another, as engines allow."""

    def layer(part, gains):
        losses = {}
        for block, lost in zip((16, 32, 64), gains, strict=True):
            nats = dict.fromkeys(METHODS, lost)
            losses[f"BlockDialect-{block}"] = OutputLoss(4 + 8 / block, nats, nats)
        experts = (ExpertOutput(0, 1, False, {}), ExpertOutput(1, 1, False, {}))
        return LayerOutput(f"layers.0.mlp.experts.{part}", 64, 64, 64, 1.0, losses, experts)

    layers = [
        layer("gate_proj", (1, 2, 3)), layer("up_proj", (1, 90, 99)), layer("down_proj", (1, 2, 3))
    ]  # fmt: skip
    plan = plan_precision(layers, (4.5 * 2 + 4.125) / 3 + 0.01, None)
    assert list(plan.block_sizes.values()) == [16, 16, 64]
    assert plan.overrides() == {
        "layers.0.mlp.experts.gate_proj": {"block_size": 16},
        "layers.0.mlp.experts.up_proj": {"block_size": 16},
        "layers.0.mlp.experts.down_proj": {"block_size": 64},
    }


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_a_plan_is_what_converter_and_engine_make_of_it(architecture, model_of, text, tmp_path):
    source, file, packed = model_of(architecture), tmp_path / "plan.json", tmp_path / "packed"
    options = ["--calibrate", text, *SMALL]
    budgets = ["--bits", 4.45, "--fp8-share", 0.8]
    shown = run("plan", source, *budgets, *options, "--max-rows", 32, "-o", file)
    overrides = json.loads(file.read_text())
    planned = {name: entry for name, entry in overrides.items() if ".experts." in name}
    assert {key for entry in planned.values() for key in entry} >= {"activation_format"}
    run("quantize", source, packed, *options, "--overrides", file)
    run("inspect", packed)
    written = open_packed(packed)
    forms = {name: written.scheme.layer(name) for name in written.layers}
    weights = {name: written[name].shape[0] * written[name].shape[1] for name in written.layers}
    bits = sum(8 * written[name].nbytes for name in written.layers) / sum(weights.values())
    share = sum(weights[n] for n, form in forms.items() if form.activation_format == "fp8")
    assert f"{bits:.4f} bits per weight" in shown
    assert f"in {100 * share / sum(weights.values()):.1f} % of the weights" in shown
    uniform = written.scheme.model_copy(update={"overrides": {}}).layer("none")
    for name, form in forms.items():
        expert = expert_of(name)
        named = name if expert is None else f"{expert.prefix}.{expert.part}"
        assert form == uniform._replace(**overrides.get(named, {}))
    model = transformers.AutoModelForCausalLM.from_pretrained(packed)
    modules = [m for m in model.modules() if isinstance(m, DialectExperts)]
    prefixes = sorted({e.prefix for name in forms if (e := expert_of(name)) is not None})
    for prefix, module in zip(prefixes, modules, strict=True):
        assert module.gate_up_proj.format == forms[f"{prefix}.0.up_proj"]
        assert module.down_proj.format == forms[f"{prefix}.3.down_proj"]


def test_a_plan_by_weights_counts_experts(model_of, tmp_path):
    source, file, packed = model_of("MixtralForCausalLM"), tmp_path / "plan.json", tmp_path / "out"
    shown = run("plan", source, "--bits", 4.4, "--output", file)
    overrides = json.loads(file.read_text())
    assert any(".experts." in name for name in overrides)
    run("quantize", source, packed, "--overrides", file)
    written = open_packed(packed)
    weights = sum(written[name].shape[0] * written[name].shape[1] for name in written.layers)
    bits = sum(8 * written[name].nbytes for name in written.layers) / weights
    assert f"{bits:.4f} bits per weight" in shown
