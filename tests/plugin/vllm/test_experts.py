"""Mixtures of experts in vLLM: loading, refusals, reloads, ranks, torch.compile.

What served experts compute is compared with transformers in test_served_architectures (W4A4) and,
for every architecture, in the sweep.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from dialect_kernels import SEMANTIC_32, quantize
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.export_fp8 import export_fp8
from dialect_plugin.checkpoint.options import ConvertOptions
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import open_packed
from dialect_plugin.scheme import Scheme
from tests.support import swept_models
from tests.support.engines import (
    STORED,
    empty_model,
    engine,
    expected_experts,
    load_model,
    logprobs,
    packed_experts,
    parameters,
    tensors_of,
)
from tests.support.served_models import build, checkpoint_tensors, expected_logprobs

pytestmark = pytest.mark.slow
ARCHITECTURE = "MixtralForCausalLM"
EXPERTS = "model.layers.1.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build(ARCHITECTURE, tmp_path_factory.mktemp("mixtral") / "source")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return build(ARCHITECTURE, tmp_path_factory.mktemp("mixtral") / "other", seed=1)


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    destination = tmp_path_factory.mktemp("mixtral") / "packed"
    convert(source, destination)
    return destination


@pytest.fixture(scope="module")
def of(source, packed):
    """Mode -> the model, and the options that serve it."""
    return {"packed": (packed, {}), "online": (source, {"quantization": "blockdialect"})}


def write(path, like, tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text((like / "config.json").read_text())
    return path


def assert_holds(found, weights):
    modules = packed_experts(found)
    assert len(modules) == 2
    for module in modules:
        for name, value in expected_experts(weights, module).items():
            assert torch.equal(found[name], value), name


@pytest.mark.usefixtures("one_rank")
class TestWithoutAnEngine:
    @pytest.mark.parametrize("mode", ["packed", "online"])
    def test_a_lost_tensor_is_named(self, mode, of, tmp_path):
        origin, options = of[mode]
        leaf = "down_proj.weight_row_exponent" if mode == "packed" else "w2.weight"
        tensors = checkpoint_tensors(origin)
        del tensors[f"{EXPERTS}.3.{leaf}"]
        with pytest.raises(ValueError) as caught:
            load_model(write(tmp_path / "lossy", origin, tensors), **options)
        remedy = {
            "packed": "convert the model again",
            "online": f"complete the checkpoint, or ignore {EXPERTS}",
        }
        field = leaf.rpartition(".")[2]
        assert str(caught.value) == (
            f"{EXPERTS}.3.down_proj.{field}: the checkpoint does not hold it under a name that is "
            f"known; {remedy[mode]}"
        )

    def test_reserved_values_are_named_with_their_expert(self, source, tmp_path):
        packed = tmp_path / "packed"
        convert(source, packed, Scheme(book="dialect_fp4"))  # the other uses every byte
        tensors = checkpoint_tensors(packed)
        tensors[f"{EXPERTS}.2.up_proj.weight_meta"][3, 2] = 0xE0
        # gates are 192 rows
        message = (
            r"experts: gate_proj and up_proj of expert 2\.weight_meta: byte 0xe0 at \[195, 2\]"
        )
        with pytest.raises(ValueError, match=message):
            load_model(write(tmp_path / "damaged", packed, tensors))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t[:-1], "has 191 rows where the model needs 192"),
            (lambda t: t[:, :-1], "has 127 columns where the model"),
            (lambda t: t.to(torch.float64), "the checkpoint holds torch.float64"),
            (lambda t: t[0], "has 192 rows|dimensions|columns|rows where"),
        ],
    )
    def test_a_tensor_of_another_shape_or_dtype(self, change, message, source, tmp_path):
        tensors = checkpoint_tensors(source)
        name = f"{EXPERTS}.1.w3.weight"
        tensors[name] = change(tensors[name]).contiguous()
        path = write(tmp_path / "other", source, tensors)
        with pytest.raises(ValueError, match=message) as caught:
            load_model(path, quantization="blockdialect")
        assert "experts.1" in str(caught.value)

    def test_numbers_that_are_not_finite(self, source, tmp_path):
        tensors = checkpoint_tensors(source)
        tensors[f"{EXPERTS}.1.w2.weight"][5, 7] = float("nan")
        with pytest.raises(ValueError, match=r"experts\.1\.down_proj\.weight: nan at \[5, 7\]"):
            load_model(write(tmp_path / "nan", source, tensors), quantization="blockdialect")

    def test_16_bit_experts_where_the_config_calls_them_packed(self, source, packed, tmp_path):
        tensors = {n: t for n, t in checkpoint_tensors(packed).items() if ".experts." not in n}
        tensors |= {n: t for n, t in checkpoint_tensors(source).items() if ".experts." in n}
        with pytest.raises(ValueError, match=r"16-bit weights of experts .* calls packed; convert"):
            load_model(write(tmp_path / "mixed", packed, tensors))

    def test_packed_experts_where_the_config_calls_them_16_bit(self, source, packed, tmp_path):
        plain = tmp_path / "plain"
        convert(source, plain, ConvertOptions(experts=False))
        with pytest.raises(ValueError, match="packed experts that vLLM builds in 16 bit; convert"):
            load_model(write(tmp_path / "mixed", plain, checkpoint_tensors(packed)))

    @pytest.mark.parametrize("architecture", [ARCHITECTURE, "Qwen3MoeForCausalLM"])
    def test_exported_to_fp8_they_are_what_vllm_s_own_classes_read(self, architecture, tmp_path):
        """Every architecture of the export was tried; running them needs a GPU."""
        convert(swept_models.build(architecture, tmp_path / "source"), tmp_path / "packed")
        packed = open_packed(tmp_path / "packed")
        export_fp8(packed, tmp_path / "fp8", Silent())
        model = empty_model(tmp_path / "fp8")
        model.load_weights(iter(checkpoint_tensors(tmp_path / "fp8").items()))
        found = tensors_of(model)
        modules = [name.removesuffix(".w13_weight") for name in found if name.endswith("13_weight")]
        assert len(modules) == 2
        for module in modules:
            assert "Fp8" in type(model.get_submodule(module).quant_method).__name__
            name = module.partition(".experts")[0] + ".experts"
            for number in range(4):
                for stack, parts in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
                    own = [packed.read(f"{name}.{number}.{part}").to_e4m3() for part in parts]
                    weight, scale = (torch.cat(tensors) for tensors in zip(*own, strict=True))
                    there = found[f"{module}.{stack}_weight"][number]
                    assert torch.equal(there.view(torch.uint8), weight.view(torch.uint8))
                    there = found[f"{module}.{stack}_weight_scale"][number]
                    assert torch.equal(there[:, 0], scale)

    def test_options_for_all_experts_of_a_layer(self, source, tmp_path):
        overrides = {f"{EXPERTS}.down_proj": {"block_size": 64}}
        options = {"overrides": overrides, "ignore": ["re:.*layers.0.*experts"]}
        text = json.dumps(options)
        found = tensors_of(
            load_model(
                source,
                quantization="blockdialect",
                hf_overrides={"quantization_config_dict_json": text},
            )
        )
        [module] = packed_experts(found)
        assert module == f"{EXPERTS}.routed_experts"
        assert found[f"{module}.w2_weight_meta"].shape == (4, 128, 192 // 64)
        assert found[f"{module}.w13_weight_meta"].shape == (4, 2 * 192, 128 // 32)
        assert f"{EXPERTS}.routed_experts.w2_weight".replace("layers.1", "layers.0") in found

    def test_experts_that_disagree(self, source):
        text = json.dumps({"ignore": [f"{EXPERTS}.2.up_proj"]})
        with pytest.raises(ValueError, match=r"the experts of .* disagree .*2\.up_proj 16 bit"):
            load_model(
                source,
                quantization="blockdialect",
                hf_overrides={"quantization_config_dict_json": text},
            )

    def test_dummy_weights_load(self, of):
        for model, options in of.values():
            load_model(model, load_format="dummy", **options)

    @pytest.mark.parametrize(("mode", "pushed"), [("packed", "online"), ("online", "packed")])
    def test_weights_are_pushed_into_a_running_model(self, mode, pushed, of, other, tmp_path):
        """Not into routers: vLLM keeps their weights elsewhere on a CPU."""
        model = load_model(of[mode][0], **of[mode][1])
        addresses = {n: t.data_ptr() for n, t in tensors_of(model).items()}
        weights = checkpoint_tensors(other)
        tensors = weights
        if pushed == "packed":
            convert(other, tmp_path / "packed")
            tensors = checkpoint_tensors(tmp_path / "packed")
        tensors = {n: t for n, t in tensors.items() if "moe.gate" not in n}
        before = {name: value.clone() for name, value in tensors_of(model).items()}
        last = next(n for n in tensors if f"{EXPERTS}.3." in n and n.endswith(("packed", "weight")))
        bad = tensors | {last: tensors[last][:-1]}
        with pytest.raises(ValueError, match="rows where the model needs"):
            model.load_weights(iter(bad.items()))
        for name, value in tensors_of(model).items():
            assert torch.equal(value, before[name]), name
        model.load_weights(iter(tensors.items()))
        found = tensors_of(model)
        assert {n: t.data_ptr() for n, t in found.items()} == addresses
        assert_holds(found, weights)

    def test_the_second_rank_has_its_share(self, source, packed, monkeypatch):
        from vllm.distributed import get_tp_group

        with monkeypatch.context() as patch:
            patch.setattr(get_tp_group(), "world_size", 2)
            patch.setattr(get_tp_group(), "rank_in_group", 1)
            held = {
                "packed": tensors_of(load_model(packed)),
                "online": tensors_of(load_model(source, quantization="blockdialect")),
            }
        weights, half = checkpoint_tensors(source), 192 // 2
        for mode, found in held.items():
            module = f"{EXPERTS}.routed_experts"
            for e in range(4):
                w1, w3, w2 = (weights[f"{EXPERTS}.{e}.w{n}.weight"] for n in (1, 3, 2))
                both = quantize(torch.cat([w1[half:], w3[half:]]), SEMANTIC_32)
                down = quantize(w2[:, half:].contiguous(), SEMANTIC_32)
                whole = quantize(w2, SEMANTIC_32)
                for suffix, value in zip(STORED, both.tensors, strict=True):
                    assert torch.equal(found[f"{module}.w13_{suffix}"][e], value), (mode, suffix)
                if mode == "online":  # a row exponent of its own
                    expected = down.tensors
                else:
                    expected = (whole.codes[:, half // 2 :], whole.meta[:, half // 32 :])
                    expected = (*expected, whole.row_exponent)
                for suffix, value in zip(STORED, expected, strict=True):
                    assert torch.equal(found[f"{module}.w2_{suffix}"][e], value), (mode, suffix)


@pytest.mark.parametrize("mode", ["packed", "online"])
def test_weights_can_be_reloaded(mode, of, other, tmp_path):
    """A faulty checkpoint leaves the old weights; packed engines take 16-bit ones too."""
    model, options = of[mode]
    weights = checkpoint_tensors(other)
    replacement = other
    if mode == "packed":
        replacement = tmp_path / "packed"
        convert(other, replacement)
    faulty = {n: t for n, t in weights.items() if n != f"{EXPERTS}.0.w1.weight"}
    with engine(model, **options) as llm:
        before, original = parameters(llm), logprobs(llm)
        with pytest.raises(ValueError, match=r"experts\.0\.gate_proj\.weight.*does not hold it"):
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(faulty.items())})
        assert all(torch.equal(value, before[name]) for name, value in parameters(llm).items())
        assert torch.equal(logprobs(llm), original)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(replacement)})
        assert_holds(parameters(llm), weights)
        reloaded = logprobs(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})
        assert torch.equal(logprobs(llm), original)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights.items())})
        assert_holds(parameters(llm), weights)
        assert torch.equal(logprobs(llm), reloaded)


def test_torch_compile(packed, source):
    with engine(packed, enforce_eager=False) as llm:
        found = logprobs(llm)
    oracle = expected_logprobs(source, ARCHITECTURE)[:-1]
    torch.testing.assert_close(found, oracle, rtol=1e-4, atol=1e-3)


def test_the_experts_take_little_more_than_a_quarter_of_their_bytes(tmp_path):
    source = swept_models.build("Qwen3MoeForCausalLM", tmp_path / "source")
    convert(source, tmp_path / "packed")
    sizes = [
        sum(t.nbytes for n, t in checkpoint_tensors(path).items() if ".experts." in n)
        for path in (tmp_path / "packed", source)
    ]
    assert sizes[0] <= 0.28 * sizes[1]


@pytest.mark.parametrize(
    ("parallel", "sentence"),
    [
        ({"enable_eplb": True}, r"^--enable-eplb: packed experts \(experts\) cannot be moved"),
        ({"dp_size": 2}, "^--data-parallel-size: 2; vLLM cannot exchange the tokens of a mixture"),
    ],
)
def test_what_ranks_cannot_do_is_one_sentence(parallel, sentence):
    from dialect_plugin.vllm.experts import BlockDialectExpertsMethod, ExpertsSpec

    form = Scheme().layer("experts")
    config = SimpleNamespace(moe_parallel_config=SimpleNamespace(**parallel), is_act_and_mul=True)
    with pytest.raises(ValueError, match=sentence):
        BlockDialectExpertsMethod(
            ExpertsSpec("experts", True, form, form), SimpleNamespace(moe_config=config)
        )


@pytest.mark.parametrize("on_input", [False, True])
def test_ranks_with_whole_experts_add_up_to_all_of_them(on_input):
    """Expert parallel: each rank leaves out the tokens of others; and each product by itself."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from dialect_plugin.vllm.experts import BlockDialectExpertsMethod, ExpertsSpec

    torch.manual_seed(0)
    form = Scheme(activation_format="none").layer("experts")
    gate_up = [quantize(torch.randn(2 * 32, 64), SEMANTIC_32) for _ in range(4)]
    down = [quantize(torch.randn(64, 32), SEMANTIC_32) for _ in range(4)]
    bias = torch.randn(4, 2 * 32)

    def layer(chosen, expert_map):
        config = SimpleNamespace(
            moe_parallel_config=SimpleNamespace(enable_eplb=False), is_act_and_mul=True
        )
        found = SimpleNamespace(
            moe_config=config,
            activation=MoEActivation.SILU,
            expert_map=expert_map,
            apply_router_weight_on_input=on_input,
            w13_bias=bias[chosen],
        )
        for stack, weights in (("w13", gate_up), ("w2", down)):
            for suffix, field in zip(STORED, ("codes", "meta", "row_exponent"), strict=True):
                value = torch.stack([getattr(weights[e], field) for e in chosen])
                setattr(found, f"{stack}_{suffix}", value)
        return found

    def computed(chosen, expert_map=None):
        held = layer(chosen, expert_map)
        method = BlockDialectExpertsMethod(ExpertsSpec("experts", True, form, form), held)
        return method.apply(held, x, weights, ids, None, None)

    x, chosen = torch.randn(7, 64), 1 if on_input else 2
    ids = torch.stack([torch.randperm(4)[:chosen] for _ in range(7)]).int()
    weights = torch.rand(7, chosen)
    whole = computed([0, 1, 2, 3])
    parts = [
        computed([0, 2], torch.tensor([0, -1, 1, -1], dtype=torch.int32)),
        computed([1, 3], torch.tensor([-1, 0, -1, 1], dtype=torch.int32)),
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)
    expected = torch.zeros(7, 64)
    for token in range(7):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            scale = weight if on_input else 1
            both = gate_up[expert].dequantize() @ (x[token] * scale) + bias[expert]
            inner = torch.nn.functional.silu(both[:32]) * both[32:]
            expected[token] += (1 if on_input else weight) * (down[expert].dequantize() @ inner)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-3)
