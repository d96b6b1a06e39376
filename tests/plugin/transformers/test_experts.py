"""Packed experts in transformers: the logits of experts that are computed by hand, one by one."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from dialect_kernels import reference
from dialect_kernels.formatbook import book_by_name
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.options import ConvertOptions
from dialect_plugin.scheme import LayerFormat, Scheme
from dialect_plugin.transformers import BlockDialectConfig, DialectExperts, DialectLinear
from dialect_plugin.transformers.experts import ExpertsPlace, stacked
from tests.support.by_hand import TOKENS, logits_of
from tests.support.swept_models import build

MIXTRAL = "MixtralForCausalLM"


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    return build("GptOssForCausalLM", tmp_path_factory.mktemp("gpt_oss") / "source")


def exact(path, dtype="auto", **options):
    """A packed checkpoint whose products have the bits of the reference."""
    config = BlockDialectConfig(accumulation="exact", **options)
    with pytest.warns(UserWarning, match="loading attributes"):  # transformers' own
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config)


def silu(gate, up):
    return F.silu(gate) * up


def swiglu_oai(gate, up):
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


class ByHand(torch.nn.Module):
    """Experts whose matrices are packed and multiplied one by one, by the reference alone.

    Args:
        parts: gates, ups and downs of all experts in 16 bit, each [E, N, K].
        biases: theirs, each [E, N], or three times None.
        formats: what packs the matrices of each, and the format of its activations.
        between: what lies between the products.
    """

    def __init__(self, parts, biases, formats, between):
        super().__init__()
        self.packed = [
            [pack(weight) for weight in part]
            for part, (pack, _) in zip(parts, formats, strict=True)
        ]
        self.biases, self.between = biases, between
        self.forms = [form for _, form in formats]

    def product(self, part, expert, x):
        bias = None if self.biases[part] is None else self.biases[part][expert]
        return reference.dialect_linear(x, self.packed[part][expert], bias, self.forms[part])

    def forward(self, x, ids, weights):
        outputs = x.new_zeros(*ids.shape, x.shape[1])
        for expert in range(len(self.packed[0])):
            tokens, places = torch.where(ids == expert)
            if not len(tokens):
                continue
            gate, up = (self.product(part, expert, x[tokens]).float() for part in (0, 1))
            inner = self.between(gate, up).to(x.dtype)
            outputs[tokens, places] = self.product(2, expert, inner)
        return (outputs.float() * weights.float()[..., None]).sum(1).to(x.dtype)


def by_hand(source, formats):
    """The 16-bit model in `source` with its experts replaced."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    for parameter in model.parameters():  # files are mapped, and kernels see the alignment
        parameter.data = parameter.data.clone()
    for name, module in list(model.named_modules()):
        if name.endswith("experts"):
            with torch.no_grad():
                model.set_submodule(name, replacement(module, formats))
    return model


def replacement(module, formats):
    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    if hasattr(module, "gate_up_proj_bias"):  # GPT-OSS: transposed, gates and ups by turns
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        bias = module.gate_up_proj_bias
        parts = gate_up[:, ::2], gate_up[:, 1::2], down
        biases = bias[:, ::2], bias[:, 1::2], module.down_proj_bias
        return ByHand([p.contiguous() for p in parts], biases, formats, swiglu_oai)
    return ByHand((*gate_up.chunk(2, 1), down), (None, None, None), formats, silu)


def packer(book="semantic_32", block_size=32, rotation="none"):
    return lambda w: reference.quantize(w, book_by_name(book), block_size, rotation=rotation)


ONLY_EXPERTS = ["re:.*self_attn.*"]


@pytest.mark.parametrize(
    ("architecture", "options", "gate_up", "down"),
    [
        (MIXTRAL, {}, (packer(), "dialect"), (packer(), "dialect")),
        (
            MIXTRAL,
            {
                "rotation": "hadamard_32",
                "book": "dialect_fp4",
                "overrides": {
                    "re:.*experts.*.down_proj": {
                        "rotation": "none",
                        "activation_format": "fp8",
                        "block_size": 16,
                    }
                },
            },
            (packer("dialect_fp4", 32, "hadamard_32"), "dialect"),
            (packer("dialect_fp4", 16), "fp8"),
        ),
        (
            MIXTRAL,
            {"activation_format": "none"},
            (packer(), "none"),
            (packer(), "none"),
        ),
        ("GptOssForCausalLM", {}, (packer(), "dialect"), (packer(), "dialect")),
    ],
)
def test_the_logits_are_those_of_experts_computed_one_by_one(
    tiny_model, gpt_oss, tmp_path, architecture, options, gate_up, down
):
    source = tiny_model(architecture) if architecture == MIXTRAL else gpt_oss
    convert(source, tmp_path / "packed", Scheme(ignore=ONLY_EXPERTS, **options))
    loaded = exact(tmp_path / "packed")
    assert len([m for m in loaded.modules() if isinstance(m, DialectExperts)]) == 2
    assert not any(isinstance(m, DialectLinear) for m in loaded.modules())
    expected = by_hand(source, (gate_up, gate_up, down))
    assert torch.equal(logits_of(loaded), logits_of(expected))
    default = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto")
    torch.testing.assert_close(
        logits_of(default), logits_of(expected), rtol=0, atol=0.05
    )  # one rounding of bfloat16 more or less


def test_experts_without_gates():
    """Nemotron-H's, whose activation is the square of what is positive."""
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(
        hidden_size=64, moe_intermediate_size=96, n_routed_experts=3, moe_latent_size=None
    )
    plain = NemotronHExperts(config)
    for weight in plain.parameters():
        weight.data.normal_(std=0.2)
    place = ExpertsPlace.of("experts", plain)
    form = LayerFormat("semantic_32", 32, "dialect", "none")
    packed = {
        stack: [packer()(weight) for weight in plain.get_parameter(stack).detach()]
        for stack in ("up_proj", "down_proj")
    }
    stacks = {stack: (stacked(place.layout, [own]), form) for stack, own in packed.items()}
    experts = DialectExperts(place, stacks, "exact", torch.float32)
    x, weights = torch.randn(7, 64), torch.rand(7, 2)
    ids = torch.stack([torch.randperm(3)[:2] for _ in range(7)])
    expected = torch.zeros(7, 2, 64)
    for token, place_of_choice in torch.cartesian_prod(torch.arange(7), torch.arange(2)).tolist():
        expert = int(ids[token, place_of_choice])
        inner = reference.dialect_linear(x[token, None], packed["up_proj"][expert]).relu().square()
        outer = reference.dialect_linear(inner, packed["down_proj"][expert])
        expected[token, place_of_choice] = outer[0]
    expected = (expected * weights[..., None]).sum(1)
    assert torch.equal(experts(x, ids, weights), expected)


def test_an_option_chooses_the_format_of_activations(packed):
    loaded = exact(packed(MIXTRAL), activation_format="fp8")
    forms = {
        module.get_submodule(stack).format.activation_format
        for module in loaded.modules()
        if isinstance(module, DialectExperts)
        for stack in ("gate_up_proj", "down_proj")
    }
    assert forms == {"fp8"}


def test_a_dequantized_mixture_is_stored_as_the_source_was(tiny_model, packed, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(packed(MIXTRAL), dtype="auto").dequantize()
    plain.save_pretrained(tmp_path)
    found, source = (load_file(p / "model.safetensors") for p in (tmp_path, tiny_model(MIXTRAL)))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in source.items()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(logits_of(again), logits_of(plain))


def test_the_gradient_passes_straight_through_the_rounding(packed):
    """That of transformers' own experts with the decoded weights, which add in another order."""
    loaded = AutoModelForCausalLM.from_pretrained(packed(MIXTRAL), dtype=torch.float32)
    experts = next(m for m in loaded.modules() if isinstance(m, DialectExperts))
    torch.manual_seed(0)
    x, upstream = torch.randn(9, 128), torch.randn(9, 128)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    for rounded in (experts, experts.decoded()):
        rounded.x = x.clone().requires_grad_()
        rounded(rounded.x, ids, weights).backward(upstream)
    # the product in front of the activation is rounded, and with it what the activation's slope is
    close = F.cosine_similarity(experts.x.grad.flatten(), rounded.x.grad.flatten(), dim=0)
    assert close > 0.98
    for stack in ("gate_up_proj", "down_proj"):
        module = experts.get_submodule(stack)
        module.format = module.format._replace(activation_format="none")
    experts.x.grad = None
    experts(experts.x, ids, weights).backward(upstream)
    torch.testing.assert_close(experts.x.grad, rounded.x.grad, rtol=1e-4, atol=1e-5)


def test_an_adapter_beside_packed_experts_learns(packed):
    model = AutoModelForCausalLM.from_pretrained(packed(MIXTRAL), dtype=torch.float32)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_a_bias_of_experts_has_a_gradient(gpt_oss, tmp_path):
    convert(gpt_oss, tmp_path / "packed", ConvertOptions(scheme=Scheme(activation_format="none")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    experts = next(m for m in model.modules() if isinstance(m, DialectExperts))
    decoded = experts.decoded()
    torch.manual_seed(0)
    x, upstream = torch.randn(6, 128), torch.randn(6, 128)
    ids, weights = torch.tensor([[0, 1]] * 4 + [[1, 3]] * 2), torch.rand(6, 2)
    grads = []
    for module in (experts, decoded):
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            bias = torch.nn.Parameter(getattr(module, name).detach().clone())
            module._parameters[name] = bias
        module(x, ids, weights).backward(upstream)
        grads.append([module.gate_up_proj_bias.grad, module.down_proj_bias.grad])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert bool((found[2] == 0).all())  # nobody chose it
