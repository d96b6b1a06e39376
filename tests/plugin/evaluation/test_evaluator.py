"""Evaluations of tiny models, against layers that are exchanged by hand."""

import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dialect_kernels import baselines, reference
from dialect_kernels.calibrated import quantize_calibrated_baseline
from dialect_kernels.formatbook import SEMANTIC_32
from dialect_kernels.rotation import rotate_activation, rotate_weight
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.options import ConvertOptions
from dialect_plugin.checkpoint.reader import CheckpointError, open_checkpoint, open_packed
from dialect_plugin.evaluation.calibrated_peers import CalibratedPeers
from dialect_plugin.evaluation.evaluator import evaluate
from dialect_plugin.evaluation.options import EvaluationOptions, FormatName
from dialect_plugin.evaluation.progress import Silent
from dialect_plugin.scheme import Scheme

LENGTH = 64


def options(text, **given):
    settings = {"text": str(text), "windows": 3, "sequence_length": LENGTH, "worst": 4}
    return EvaluationOptions.model_validate(settings | given)


class ByHand:
    """A linear layer that computes `product` of its input."""

    def __init__(self, model, layers, product):
        self.model, self.layers, self.product = model, layers, product

    def __enter__(self):
        for name in self.layers:
            layer = self.model.get_submodule(name)
            layer.forward = partial(self.product, name, layer)
        return self.model

    def __exit__(self, *_):
        for name in self.layers:
            del self.model.get_submodule(name).forward


def windows_of(source, text, count):
    """Windows of the text, evenly spread, each with the begin token."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer(text.read_text(), add_special_tokens=False).input_ids
    step = LENGTH - 1
    found = len(tokens) // step
    starts = [index * found // count * step for index in range(count)]
    return [[tokenizer.bos_token_id, *tokens[start : start + step]] for start in starts]


@torch.inference_mode()
def expected_row(source, text, layers, product):
    """(KL, negative log-probability, same top token) for each window."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    rows = []
    for window in windows_of(source, text, 3):
        tokens = torch.tensor([window])
        exact = model(tokens).logits[0, :-1].double().log_softmax(dim=-1)
        with ByHand(model, layers, product) as changed:
            found = changed(tokens).logits[0, :-1].double().log_softmax(dim=-1)
        kl = (exact.exp() * (exact - found)).sum(dim=-1).mean()
        nll = -found.gather(1, tokens[0, 1:, None]).mean()
        same = (exact.argmax(dim=-1) == found.argmax(dim=-1)).double().mean()
        rows.append((float(kl), float(nll), float(same)))
    return zip(*rows, strict=True)


def agrees(row, source, text, layers, product):
    kl, nll, same = expected_row(source, text, layers, product)
    assert row.divergence == pytest.approx(list(kl), rel=1e-4, abs=1e-7)  # float32 inside
    assert row.nll == pytest.approx(list(nll), rel=1e-5)
    assert row.agreement == pytest.approx(list(same))


@pytest.mark.parametrize("activations", ["dialect", "fp8", "none"])
def test_packed_checkpoints_in_three_activation_formats(tiny_model, packed, text, activations):
    source, directory = tiny_model("Qwen2ForCausalLM"), packed("Qwen2ForCausalLM")
    choice = {"dialect": "own", "fp8": "w4a8", "none": "w4a16"}[activations]
    found = evaluate([directory], source, options(text, activations=choice))
    weights = open_packed(directory)

    def product(name, layer, x):
        y = reference.dialect_linear(x[0], weights[name], layer.bias, activations)
        return y[None]

    [row] = found.rows
    assert (row.name, row.activations) == (
        "packed", {"dialect": "W4A4", "fp8": "W4A8", "none": "W4A16"}[activations]
    )  # fmt: skip
    assert row.ours
    assert row.bits == pytest.approx(4 + 8 / 32 + 8 / 128, abs=0.03)
    agrees(row, source, text, weights.layers, product)


def test_the_formats_of_others(tiny_model, packed, text):
    """Rounded operands in float32, one rounding at the end."""
    source = tiny_model()
    names = ["fp8", "mxfp4-32", "nvfp4-16+rotation", "semantic_32-16+rotation"]
    found = evaluate([packed()], source, options(text, formats=",".join(names)))
    layers = open_packed(packed()).layers

    def fp8(x):
        values, scale = baselines.quantize_fp8(x)
        return values.float() * scale[:, None]

    def product_of(round_weight, round_tokens, rotated):
        def product(name, layer, x):
            weight = layer.weight.float()
            tokens = x[0].float()
            if rotated:
                weight, tokens = rotate_weight(weight), rotate_activation(tokens)
            return (round_tokens(tokens) @ round_weight(weight).T).to(x.dtype)[None]

        return product

    def ours(name, layer, x):
        weight = reference.quantize(layer.weight, SEMANTIC_32, 16, rotation="hadamard_32")
        return reference.dialect_linear(x[0], weight)[None]

    products = [
        product_of(fp8, fp8, False),
        product_of(baselines.quantize_mxfp4, baselines.quantize_mxfp4, False),
        product_of(baselines.quantize_nvfp4, baselines.quantize_nvfp4, True),
        ours,
    ]
    rows = found.rows[1:]
    assert [row.name for row in rows] == names
    assert [row.activations for row in rows] == ["W8A8", "W4A4", "W4A4", "W4A4"]
    assert [row.ours for row in rows] == [False, False, False, True]
    assert [row.bits for row in rows[1:3]] == [4.25, 4.5]
    assert rows[0].bits == pytest.approx(8 + 32 / 128, abs=0.1)
    for row, product in zip(rows, products, strict=True):
        agrees(row, source, text, layers, product)


def test_all_kinds_of_activations_share_the_weights(tiny_model, packed, text):
    chosen = options(text, activations="own,w4a8,w4a16", formats="mxfp4-32")
    found = evaluate([packed()], tiny_model(), chosen)
    assert [(row.name, row.activations) for row in found.rows] == [
        (name, label) for name in ("packed", "mxfp4-32") for label in ("W4A4", "W4A8", "W4A16")
    ]
    for name in ("packed", "mxfp4-32"):
        kl = [found.row(name, label).mean_divergence for label in ("W4A4", "W4A8", "W4A16")]
        assert kl[0] > kl[1] > kl[2] > 0
    assert found.layers == 14
    assert found.dtype == "bfloat16"


def test_layers_with_different_activations_are_one_row(tiny_model, packed, text):
    mixed = {"re:.*down_proj": {"activation_format": "fp8"}}
    directory = packed(overrides=mixed)
    found = evaluate([directory], tiny_model(), options(text, activations="own,w4a4"))
    assert [row.activations for row in found.rows] == ["mixed", "W4A4"]
    assert found.rows[0].divergence != found.rows[1].divergence


def test_the_16_bit_model_stands_for_itself(tiny_model, packed, text):
    found = evaluate([packed()], tiny_model(), options(text))
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.bfloat16).eval()
    for number, window in enumerate(windows_of(tiny_model(), text, 3)):
        tokens = torch.tensor([window])
        with torch.inference_mode():
            logits = model(tokens).logits[0, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
        assert found.reference[number] == pytest.approx(float(nll), rel=1e-5)


def test_the_worst_positions(tiny_model, packed, text):
    found = evaluate([packed()], tiny_model(), options(text))
    [row] = found.rows
    kl = [position.divergence for position in row.worst]
    assert len(kl) == 4
    assert kl == sorted(kl, reverse=True)
    assert kl[0] > row.mean_divergence
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    windows = windows_of(tiny_model(), text, 3)
    for position in row.worst:
        window = windows[position.window]
        assert position.token == tokenizer.decode(window[position.position])
        assert tokenizer.decode(window[: position.position]).endswith(position.context)
    assert evaluate([packed()], tiny_model(), options(text, worst=0)).rows[0].worst == ()


def test_several_checkpoints_in_one_evaluation(tiny_model, packed, text, tmp_path):
    other = tmp_path / "other"
    convert(tiny_model(), other, Scheme(activation_format="fp8"))
    found = evaluate([packed(), other], tiny_model(), options(text, ratio_to="packed"))
    assert [row.name for row in found.rows] == ["packed", "other"]
    assert found.rows[1].ratio(found.rows[0])[0] < 1
    with pytest.raises(CheckpointError, match=r"another checkpoint has the name other, too"):
        evaluate([other, other], tiny_model(), options(text))
    convert(tiny_model(), tmp_path / "less", Scheme(ignore=["model.layers.0.mlp.down_proj"]))
    with pytest.raises(
        CheckpointError, match=r"less: model\.layers\.0\.mlp\.down_proj is packed in"
    ):
        evaluate([packed(), tmp_path / "less"], tiny_model(), options(text))


def test_without_a_checkpoint_the_usual_layers_are_emulated(tiny_model, text):
    found = evaluate([], tiny_model(), options(text, formats="mxfp4-32"))
    assert found.layers == 14
    assert [row.name for row in found.rows] == ["mxfp4-32"]


def mixture_of(multiply):
    """What linear layers and experts compute if `multiply` computes all products."""

    def product(name, layer, x, ids=None, weights=None):
        if ids is None:
            return multiply(layer.weight, x[0])[None]
        outputs = x.new_zeros(*ids.shape, x.shape[1])
        for expert in range(4):
            tokens, places = torch.where(ids == expert)
            if len(tokens):
                gate, up = layer.gate_up_proj[expert].chunk(2)
                own = x[tokens]
                gate, up = (multiply(weight, own).float() for weight in (gate, up))
                inner = (torch.nn.functional.silu(gate) * up).to(x.dtype)
                outputs[tokens, places] = multiply(layer.down_proj[expert], inner)
        return (outputs.float() * weights.float()[..., None]).sum(1).to(x.dtype)

    return product


@pytest.mark.parametrize("given", [True, False])
def test_experts_are_evaluated_in_every_format(tiny_model, packed, text, given):
    mixture = tiny_model("MixtralForCausalLM")
    directories = [packed("MixtralForCausalLM")] if given else []
    found = evaluate(directories, mixture, options(text, formats="mxfp4-32"))
    assert found.layers == 2 * (4 + 4 * 3)
    paths = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qkvo"]
    paths += [f"model.layers.{n}.mlp.experts" for n in range(2)]

    def ours(weight, x):
        return reference.dialect_linear(x, reference.quantize(weight, SEMANTIC_32, 32))

    def mxfp4(weight, x):
        weight, x = (baselines.quantize_mxfp4(t.float(), 32) for t in (weight, x))
        return (x @ weight.T).to(torch.bfloat16)

    products = [ours, mxfp4] if given else [mxfp4]
    for row, multiply in zip(found.rows, products, strict=True):
        agrees(row, mixture, text, paths, mixture_of(multiply))
    assert found.rows[-1].bits == 4.25


def test_experts_stay_in_16_bit_where_they_are_not_packed(tiny_model, text, tmp_path):
    mixture = tiny_model("MixtralForCausalLM")
    convert(mixture, tmp_path / "packed", ConvertOptions(experts=False))
    found = evaluate([tmp_path / "packed"], mixture, options(text, formats="nvfp4-16"))
    assert found.layers == 2 * 4


def test_attention_is_rounded_too(tiny_model, packed, text):
    linear, whole = (
        evaluate([packed()], tiny_model(), options(text, formats="mxfp4-32", scope=scope))
        for scope in ("linear", "all")
    )
    for one, both in zip(linear.rows, whole.rows, strict=True):
        assert both.divergence != one.divergence
    assert linear.reference == whole.reference
    fp8 = packed(activation_format="fp8")
    with pytest.raises(CheckpointError, match=r"its activations are fp8, and --scope all"):
        evaluate([fp8], tiny_model(), options(text, scope="all"))


def test_calibrated_peers_are_those_of_the_moments(tiny_model, text):
    """Against moments that plain hooks collect in transformers' float32 model."""
    source = tiny_model()
    names = [FormatName.parse(n) for n in ("mxfp4-32+gptq", "nvfp4-16+rotation+gptq")]
    chosen = options(text, formats=names, calibrate=str(text.with_name("other.txt")))
    text.with_name("other.txt").write_text("some words of another kind\n" * 300)
    calibration = chosen.calibration.model_copy(update={"samples": 4})
    checkpoint = open_checkpoint(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)][:-1]
    inputs = {layer: [] for layer in layers}
    for layer in layers:
        model.get_submodule(layer).register_forward_pre_hook(
            lambda module, arguments, layer=layer: inputs[layer].append(arguments[0][0])
        )
    for window in windows_of(source, text.with_name("other.txt"), 4):
        with torch.no_grad():
            model(torch.tensor([window]))
    with CalibratedPeers(checkpoint, layers, names, calibration) as peers:
        peers.run(Silent())
        for name in names:
            found = peers.read(name)
            assert sorted(found) == sorted(layers)
            for layer in layers:
                x = rotate_activation(torch.cat(inputs[layer]), name.rotation)
                weight = model.get_submodule(layer).weight.detach()
                expected = quantize_calibrated_baseline(
                    weight, x.T @ x / len(x), name.format, name.block_size, rotation=name.rotation
                ).values
                same = (found[layer] == expected).double().mean()
                assert same > 0.99, (name, layer)  # sums in another order move few values


def test_experts_of_calibrated_peers_are_those_of_their_own_tokens(tiny_model, text):
    source, name = tiny_model("MixtralForCausalLM"), FormatName.parse("mxfp4-32+gptq")
    other = text.with_name("of_experts.txt")
    other.write_text("some words of another kind\n" * 300)
    chosen = options(text, formats=[name], calibrate=str(other))
    calibration = chosen.calibration.model_copy(update={"samples": 4})
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    experts = model.model.layers[1].mlp.experts
    seen = []
    experts.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[:2]))
    for window in windows_of(source, other, 4):
        with torch.no_grad():
            model(torch.tensor([window]))
    x, ids = (torch.cat(tensors) for tensors in zip(*seen, strict=True))
    checkpoint = open_checkpoint(source)
    layers = [layer for layer in checkpoint.linear_layers() if ".layers." in layer]
    layers = [layer for layer in layers if not layer.endswith(".gate")]
    with CalibratedPeers(checkpoint, layers, [name], calibration) as peers:
        peers.run(Silent())
        found = peers.read(name)
    number = int(ids.flatten().bincount().argmax())
    own = x[(ids == number).any(dim=1)]
    gate, up = experts.gate_up_proj[number].detach().chunk(2)
    inner = torch.nn.functional.silu(own @ gate.T) * (own @ up.T)
    parts = {"gate_proj": (gate, own), "up_proj": (up, own)}
    parts["down_proj"] = (experts.down_proj[number].detach(), inner)
    for part, (weight, tokens) in parts.items():
        expected = quantize_calibrated_baseline(
            weight, tokens.T @ tokens / len(tokens), "mxfp4", 32
        ).values
        layer = f"model.layers.1.block_sparse_moe.experts.{number}.{part}"
        assert (found[layer] == expected).double().mean() > 0.99, layer


def test_calibration_helps_the_peers(tiny_model, text):
    names = "mxfp4-32,mxfp4-32+gptq"
    text.with_name("more.txt").write_text(text.read_text()[::-1])
    chosen = options(text, formats=names, calibrate=str(text.with_name("more.txt")),
                     activations="w4a16", ratio_to="mxfp4-32")  # fmt: skip
    found = evaluate([], tiny_model(), chosen)
    plain, calibrated = found.rows
    assert calibrated.ratio(plain)[0] < 0.9


def refused(match, packed, source, chosen):
    with pytest.raises(ValueError, match=match) as caught:
        evaluate(packed, source, chosen)
    assert "\n" not in str(caught.value)


def test_bad_input_is_one_sentence_before_the_model_is_loaded(
    tiny_model, packed, text, tmp_path, monkeypatch
):
    monkeypatch.setattr("dialect_plugin.evaluation.evaluator.EvaluatedModel", None)
    source, short = tiny_model(), tmp_path / "short.txt"
    short.write_text("few words")
    refused(r"--text: absent is not a file", [packed()], source, options("absent"))
    refused(r"--text: .*short.txt holds \d+ tokens", [packed()], source, options(short))
    refused(
        r"--sequence-length: 300; the model takes at most 256",
        [packed()], source, options(text, sequence_length=300),
    )  # fmt: skip
    refused(
        r"--ratio-to: 'x'; it must be a row of the table: packed, fp8",
        [packed()], source, options(text, formats="fp8", ratio_to="x"),
    )  # fmt: skip
    refused(r"has no quantization_config", [source], source, options(text))
    wider = tiny_model(intermediate_size=320)
    refused(r"down_proj: is \[128, 256\] in .*packed, and", [packed()], wider, options(text))
    fewer = tiny_model(num_hidden_layers=1)
    refused(r"model\.layers\.1\..* has no such layer", [packed()], fewer, options(text))


def test_a_format_that_gives_nan_is_named(tiny_model, packed, text, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_model().iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["rms_norm_eps"] = -1.0
    (source / "config.json").write_text(json.dumps(config))
    refused(r"packed W4A4: its predictions hold NaN or Inf in window 0", [packed()], source,
            options(text))  # fmt: skip
