"""Converting mixtures of experts: names, bytes, options, refusals.

The experts of every source are written out here a second time, tensor by tensor.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from dialect_kernels import SEMANTIC_32, reference
from dialect_plugin.checkpoint.convert import convert, render
from dialect_plugin.checkpoint.inspection import inspect_checkpoint
from dialect_plugin.checkpoint.inspection import render as render_inspection
from dialect_plugin.checkpoint.options import ConvertOptions
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import open_packed
from dialect_plugin.experts import ExpertTensor, Layout, names_of
from dialect_plugin.scheme import SchemeError
from tests.support.conversions import edit_config, hashes, options_of, refused

E, HIDDEN, INNER = 3, 64, 32
PARTS = ("gate_proj", "up_proj", "down_proj")
MLP = "model.layers.0.mlp"
EXPERTS = f"{MLP}.experts"


@pytest.fixture
def matrices():
    """Expert -> part -> 16-bit matrix."""
    torch.manual_seed(0)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return [
        {part: torch.randn(shape).bfloat16() for part, shape in zip(PARTS, shapes, strict=True)}
        for _ in range(E)
    ]


def one_by_one(matrices, names=PARTS):
    return {
        f"{EXPERTS}.{e}.{name}.weight": expert[part]
        for e, expert in enumerate(matrices)
        for part, name in zip(PARTS, names, strict=True)
    }


def stacked(matrices, transposed=False, by_turns=False):
    def both(expert):
        pair = torch.stack([expert["gate_proj"], expert["up_proj"]], dim=1 if by_turns else 0)
        return pair.flatten(0, 1)

    tensors = [torch.stack([both(expert) for expert in matrices])]
    tensors.append(torch.stack([expert["down_proj"] for expert in matrices]))
    if transposed:
        tensors = [tensor.transpose(1, 2) for tensor in tensors]
    return [tensor.contiguous() for tensor in tensors]


def in_two(matrices, **layout):
    both, down = stacked(matrices, **layout)
    return {f"{EXPERTS}.gate_up_proj": both, f"{EXPERTS}.down_proj": down}


def granite(matrices):
    prefix = "model.layers.0.block_sparse_moe"
    names = (f"{prefix}.input_linear.weight", f"{prefix}.output_linear.weight")
    return dict(zip(names, stacked(matrices), strict=True))


def gpt_oss(matrices):
    biases = {f"{EXPERTS}.gate_up_proj_bias": torch.randn(E, 2 * INNER).bfloat16()}
    return in_two(matrices, transposed=True, by_turns=True) | biases


MIXTRAL = ("w1", "w3", "w2")
SOURCES = {
    "Qwen3MoeForCausalLM": (one_by_one, EXPERTS),
    "MixtralForCausalLM": (lambda m: one_by_one(m, names=MIXTRAL), EXPERTS),
    "GraniteMoeForCausalLM": (granite, "model.layers.0.block_sparse_moe.experts"),
    "GraniteMoeSWAForCausalLM": (in_two, EXPERTS),
    "Llama4ForCausalLM": (lambda m: in_two(m, transposed=True), EXPERTS),
    "GptOssForCausalLM": (gpt_oss, EXPERTS),
}


@pytest.fixture
def source(tmp_path):
    """A function that writes a checkpoint of a mixture and returns its directory."""

    def write(experts, architecture="Qwen3MoeForCausalLM"):
        path = tmp_path / "source"
        path.mkdir()
        others = {
            "model.layers.0.self_attn.q_proj.weight": torch.randn(32, HIDDEN).bfloat16(),
            f"{MLP}.gate.weight": torch.randn(E, HIDDEN).bfloat16(),
        }
        save_file(others | experts, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        return path

    return write


@pytest.mark.parametrize("architecture", SOURCES)
def test_each_matrix_of_each_expert_is_a_layer_of_its_own(architecture, source, matrices, tmp_path):
    tensors_of, prefix = SOURCES[architecture]
    tensors = tensors_of(matrices)
    path = source(tensors, architecture)
    result = convert(path, tmp_path / "packed")
    packed = open_packed(tmp_path / "packed")
    wanted = {
        f"{prefix}.{e}.{part}": value
        for e, expert in enumerate(matrices)
        for part, value in expert.items()
    }
    assert set(packed) == {*wanted, "model.layers.0.self_attn.q_proj"}
    for layer, weight in wanted.items():
        expected = reference.quantize(weight, SEMANTIC_32)
        for found, right in zip(packed[layer].tensors, expected.tensors, strict=True):
            assert torch.equal(found, right), layer
    assert packed.scheme.ignore == [f"{MLP}.gate"]
    assert not result.choice.has_plain_experts
    losses = {layer.name: layer.noise for layer in result.layers}
    for layer, weight in wanted.items():
        error = weight.double() - packed[layer].dequantize().double()
        assert losses[layer] == pytest.approx(float(error.square().sum()), rel=1e-6)
    # biases stay as the source has them
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    for name in tensors:
        assert (name in stored) == name.endswith("_bias")
    assert convert(path, tmp_path / "packed").finished_before


def test_layouts_are_told_apart():
    """A mistake in rows, order or transposition would keep all shapes."""
    tensor = torch.arange(2 * 6 * 4).view(2, 6, 4)
    held = ExpertTensor.of(f"{EXPERTS}.gate_up_proj")
    plain = {m.layer: m.cut(tensor) for m in held.matrices(tensor.shape, Layout(False, False))}
    assert torch.equal(plain[f"{EXPERTS}.1.up_proj"], tensor[1, 3:])
    turned = {m.layer: m.cut(tensor) for m in held.matrices(tensor.shape, Layout(True, True))}
    assert torch.equal(turned[f"{EXPERTS}.0.gate_proj"], tensor[0, :, 0::2].T)
    assert torch.equal(turned[f"{EXPERTS}.1.up_proj"], tensor[1, :, 1::2].T)
    held = ExpertTensor.of(f"{EXPERTS}.gate_up_proj_bias")
    bias = torch.arange(12).view(2, 6)
    turned = {m.layer: m.cut(bias) for m in held.matrices(bias.shape, Layout(True, True))}
    assert torch.equal(turned[f"{EXPERTS}.1.up_proj"], bias[1, 1::2])


@pytest.mark.parametrize(
    "name",
    [
        f"{MLP}.shared_experts.gate_proj.weight",
        f"{EXPERTS}.gate_up_proj_blocks",
        f"{EXPERTS}.0.gate_proj.weight_scale",
        f"{MLP}.gate.weight",
        "model.layers.0.shared_mlp.input_linear.weight",
    ],
)
def test_what_is_no_tensor_of_routed_experts(name):
    assert ExpertTensor.of(name) is None


def test_experts_that_stay_in_16_bit(source, matrices, tmp_path):
    tensors = in_two(matrices)
    path = source(tensors, "GraniteMoeSWAForCausalLM")
    result = convert(path, tmp_path / "plain", ConvertOptions(experts=False))
    assert result.choice.has_plain_experts
    assert "experts stay in 16 bit\n" in render(result)
    assert "Experts are in 16 bit." in (tmp_path / "plain" / "README.md").read_text()
    assert list(open_packed(tmp_path / "plain")) == ["model.layers.0.self_attn.q_proj"]
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor)
    assert open_packed(tmp_path / "plain").scheme.ignore[-1] == "re:.*\\.experts\\..*"
    for number, ignore in enumerate(
        ([EXPERTS], ["re:.*experts"], [f"{EXPERTS}.[a-z_]*".join(["re:", ""])])
    ):
        convert(path, tmp_path / str(number), options_of(ignore=ignore))
        assert hashes(tmp_path / str(number)) == hashes(tmp_path / "plain")


def test_the_experts_of_one_decoder_layer_stay_in_16_bit(source, matrices, tmp_path):
    second = {
        name.replace("layers.0", "layers.1"): value.clone()
        for name, value in one_by_one(matrices).items()
    }
    path = source(one_by_one(matrices) | second)
    convert(path, tmp_path / "packed", options_of(ignore=["model.layers.1.mlp.experts"]))
    packed = open_packed(tmp_path / "packed")
    assert packed.scheme.ignore == [f"{MLP}.gate", "model.layers.1.mlp.experts"]
    assert f"{EXPERTS}.2.up_proj" in packed
    assert not [layer for layer in packed if "layers.1" in layer]


def test_what_all_experts_of_a_layer_have_instead(source, matrices, tmp_path):
    path = source(one_by_one(matrices))
    for number, name in enumerate((f"{EXPERTS}.down_proj", "re:.*experts.*down_proj")):
        options = options_of(overrides={name: {"block_size": 16}})
        convert(path, tmp_path / str(number), options)
        packed = open_packed(tmp_path / str(number))
        overrides = packed.scheme.to_config()["overrides"]
        assert overrides == {f"{EXPERTS}.down_proj": {"block_size": 16}}
        assert packed[f"{EXPERTS}.1.down_proj"].block_size == 16
        assert packed[f"{EXPERTS}.1.up_proj"].block_size == 32
    assert names_of(f"{EXPERTS}.1.down_proj")[1:] == (f"{EXPERTS}.down_proj", EXPERTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": [f"{EXPERTS}.1.up_proj"]}, "experts.1.up_proj 16 bit: engines run all experts"),
        ({"ignore": ["re:.*experts.*down_proj"]}, "experts.0.down_proj 16 bit: engines run all"),
        (
            {"overrides": {f"{EXPERTS}.2.gate_proj": {"block_size": 16}}},
            "experts.2.gate_proj block size 16: engines run all experts of a layer as one; give",
        ),
        ({"ignore": [f"{MLP}.expert"]}, "matches no layer"),
    ],
)
def test_experts_that_would_differ_are_refused(options, message, source, matrices, tmp_path):
    path = source(one_by_one(matrices))
    refused(path, tmp_path / "packed", re.escape(message), SchemeError, **options)


def test_incomplete_experts_are_refused(source, matrices, tmp_path):
    tensors = one_by_one(matrices)
    del tensors[f"{EXPERTS}.1.up_proj.weight"]
    refused(source(tensors), tmp_path / "x", r"experts\.1\.up_proj: the checkpoint does not hold")


def test_a_transposed_stack_that_the_architecture_does_not_have_is_refused(
    source, matrices, tmp_path
):
    path = source(in_two(matrices, transposed=True), "GraniteMoeSWAForCausalLM")
    refused(path, tmp_path / "x", r"experts: its experts have \[32\] rows before and 64 columns")


def test_a_number_that_is_not_finite_is_named_with_its_expert(source, matrices, tmp_path):
    matrices[2]["up_proj"][3, 17] = float("nan")
    path = source(gpt_oss(matrices), "GptOssForCausalLM")
    refused(path, tmp_path / "x", rf"{EXPERTS}\.2\.up_proj\.weight .*: nan at \[3, 17\]")


def test_experts_whose_columns_do_not_fit_stay_in_16_bit_together(source, matrices, tmp_path):
    narrow = [
        {
            "gate_proj": expert["gate_proj"][:24],
            "up_proj": expert["up_proj"][:24],
            "down_proj": expert["down_proj"][:, :24].contiguous(),
        }
        for expert in matrices
    ]
    path = source(one_by_one(narrow))
    result = convert(path, tmp_path / "packed")
    assert "which stay in 16 bit: model.layers.0.mlp.experts.*.down_proj" in render(result)
    assert list(open_packed(tmp_path / "packed")) == ["model.layers.0.self_attn.q_proj"]
    refused(path, tmp_path / "strict", "24 columns are not a multiple", SchemeError, strict=True)


def test_packed_mxfp4_experts_are_refused_by_name(source, matrices, tmp_path):
    blocks = {f"{EXPERTS}.gate_up_proj_blocks": torch.zeros(4, 4, dtype=torch.uint8)}
    path = source(one_by_one(matrices) | blocks, "GptOssForCausalLM")
    edit_config(path, quantization_config={"quant_method": "mxfp4"})
    refused(path, tmp_path / "x", r"is quantized already \(mxfp4\); give the 16-bit checkpoint")


def test_a_table_has_one_line_for_the_experts_of_a_layer(source, matrices, tmp_path):
    result = convert(source(one_by_one(matrices)), tmp_path / "packed")
    card = (tmp_path / "packed" / "README.md").read_text()
    [line] = [line for line in card.splitlines() if ".up_proj" in line]
    assert line.startswith(f"| {EXPERTS}.*.up_proj | 3 x 32 x 64 | 32 | ")
    ups = [layer for layer in result.layers if layer.name.endswith("up_proj")]
    signal, noise = (sum(getattr(layer, key) for layer in ups) for key in ("signal", "noise"))
    assert line.endswith(f"{10 * torch.tensor(signal / noise).log10():.2f} |")
    shown = render_inspection(inspect_checkpoint(tmp_path / "packed", Silent()))
    assert "10 packed layers" in shown
    assert ".1.up_proj" not in shown
    assert "mlp.experts.*.up_proj" in shown
