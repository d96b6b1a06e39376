"""vLLM's engine on one tiny Llama: formats, options, LoRA, reload, torch.compile.

Everything is compared with transformers' model with decoded weights and rounded inputs
(served_models.expected_logprobs). See test_served_architectures for the tolerance.
"""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from dialect_kernels.formatbook import SEMANTIC_32
from dialect_plugin.checkpoint.convert import convert
from tests.support.engines import (
    STORED,
    engine,
    expected_bytes,
    logprobs,
    packed_modules,
    parameters,
)
from tests.support.served_models import PROMPT, build, checkpoint_tensors, expected_logprobs

pytestmark = pytest.mark.slow

ARCHITECTURE = "LlamaForCausalLM"
TOLERANCE = 1e-3
assert_logprobs = partial(torch.testing.assert_close, rtol=1e-4, atol=TOLERANCE)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    # the seed: no activation may lie on the edge between two codes, or sums in another order show
    return build(ARCHITECTURE, tmp_path_factory.mktemp("model") / "source", seed=2)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return build(ARCHITECTURE, tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    destination = tmp_path_factory.mktemp("model") / "packed"
    convert(source, destination)
    return destination


def test_one_packed_checkpoint_serves_three_formats(source, packed):
    oracles = {
        name: expected_logprobs(source, ARCHITECTURE, name)[:-1]
        for name in ("dialect", "fp8", "none")
    }
    for name, oracle in oracles.items():
        for another in oracles.keys() - {name}:  # so that the tolerance can tell them apart
            assert (oracle - oracles[another]).abs().max() > 50 * TOLERANCE
    stored = checkpoint_tensors(packed)
    flags = {"dialect": None, "fp8": "blockdialect_w4a8", "none": "blockdialect_w4a16"}
    for name, flag in flags.items():
        with engine(packed, quantization=flag) as llm:
            found = parameters(llm)
            assert_logprobs(logprobs(llm), oracles[name])
        down = "model.layers.0.mlp.down_proj"
        for suffix in STORED:
            assert torch.equal(found[f"{down}.{suffix}"], stored[f"{down}.{suffix}"])
    with engine(source, quantization="blockdialect_w4a16") as llm:
        assert_logprobs(logprobs(llm), oracles["none"])


def test_options_through_hf_overrides(source):
    options = {
        "quant_method": "blockdialect",
        "serialized": False,
        "book": "semantic_32",
        "activation_format": "fp8",
        "block_size": 64,
        "overrides": {"re:.*down_proj": {"block_size": 16}},
        "ignore": ["re:.*\\.o_proj"],
    }

    def block_size(name):
        if name.endswith("o_proj"):
            return None
        return 16 if name.endswith("down_proj") else 64

    oracle = expected_logprobs(source, ARCHITECTURE, "fp8", SEMANTIC_32, block_size)[:-1]
    with engine(source, hf_overrides={"quantization_config": options}) as llm:
        assert_logprobs(logprobs(llm), oracle)
    text = json.dumps({k: v for k, v in options.items() if k not in {"quant_method", "serialized"}})
    overrides = {"quantization_config_dict_json": text}
    with engine(source, quantization="blockdialect", hf_overrides=overrides) as llm:
        assert_logprobs(logprobs(llm), oracle)


def test_output_projection_on_request(source):
    plain = expected_logprobs(source, ARCHITECTURE)[:-1]
    sizes = expected_logprobs(
        source, ARCHITECTURE, block_size=lambda name: 64 if name == "lm_head" else 32, lm_head=True
    )[:-1]
    assert (plain - sizes).abs().max() > 50 * TOLERANCE
    text = json.dumps({"lm_head": True, "overrides": {"lm_head": {"block_size": 64}}})
    overrides = {"quantization_config_dict_json": text}
    with engine(source, quantization="blockdialect", hf_overrides=overrides) as llm:
        assert_logprobs(logprobs(llm), sizes)


@pytest.mark.parametrize("mode", ["packed", "online"])
def test_weights_can_be_reloaded(mode, source, packed, other, tmp_path):
    replacement, options = other, {"quantization": "blockdialect"}
    if mode == "packed":
        replacement, options = tmp_path / "packed", {}
        convert(other, replacement)
    model = packed if mode == "packed" else source
    with engine(model, **options) as llm:
        before = parameters(llm)
        original = logprobs(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(replacement)})
        after = parameters(llm)
        assert_logprobs(logprobs(llm), expected_logprobs(other, ARCHITECTURE)[:-1])
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})
        again = parameters(llm)
        restored = logprobs(llm)
    weights = checkpoint_tensors(other)
    for module in packed_modules(after):
        for name, value in expected_bytes(weights, module).items():
            assert torch.equal(after[name], value), name
            assert torch.equal(again[name], before[name]), name
    assert torch.equal(restored, original)


def test_16_bit_weights_are_quantized_when_a_packed_engine_reloads(packed, other):
    """Trainers hand new weights over as 16-bit tensors; a reload that fails leaves the old ones."""
    weights = checkpoint_tensors(other)
    down, query = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    midway = [item for item in weights.items() if item[0] != down]  # all other layers are complete
    refused = {
        "64 columns where the model": [*midway, (down, torch.zeros(128, 64))],
        "does not hold all of its parts": [(query, weights[query])],
    }
    with engine(packed) as llm:
        before, original = parameters(llm), logprobs(llm)
        for message, tensors in refused.items():
            with pytest.raises(ValueError, match=message):
                llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
            after = parameters(llm)
            assert after.keys() == before.keys()
            for name, value in before.items():
                assert torch.equal(after[name], value), name
            assert torch.equal(logprobs(llm), original)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights.items())})
        found = parameters(llm)
        assert_logprobs(logprobs(llm), expected_logprobs(other, ARCHITECTURE)[:-1])
    for module in packed_modules(found):
        for name, value in expected_bytes(weights, module).items():
            assert torch.equal(found[name], value), name


def test_the_state_of_an_online_engine_loads_with_the_flag_that_made_it(source, tmp_path):
    from vllm.model_executor.model_loader import ShardedStateLoader

    with engine(source, quantization="blockdialect") as llm:
        expected = logprobs(llm)
        llm.apply_model(lambda model: ShardedStateLoader.save_model(model, str(tmp_path)))
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with engine(tmp_path, quantization="blockdialect", load_format="sharded_state") as llm:
        assert torch.equal(logprobs(llm), expected)


def test_lora_on_all_seven_projections(packed, source, tmp_path):
    from vllm.lora.request import LoRARequest

    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rank, scale = 8, 2.0
    torch.manual_seed(3)
    weights = checkpoint_tensors(source)
    adapter = {}
    for name in weights:
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in projections:
            continue
        rows, columns = weights[name].shape
        prefix = f"base_model.model.{module}"
        adapter[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns) * 0.1
        adapter[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank) * 0.1
    assert len(adapter) == 2 * 2 * 7
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(rank * scale),
        "target_modules": projections,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    with engine(packed, enable_lora=True, max_lora_rank=rank) as llm:
        adapted = logprobs(llm, lora_request=LoRARequest("adapter", 1, str(tmp_path)))
        base = logprobs(llm)
    assert_logprobs(base, expected_logprobs(source, ARCHITECTURE)[:-1])
    oracle = expected_logprobs(source, ARCHITECTURE, adapter=adapter, adapter_scale=scale)[:-1]
    assert (oracle - base).abs().max() > 50 * TOLERANCE
    assert_logprobs(adapted, oracle)


def test_torch_compile(packed, source):
    with engine(packed, enforce_eager=False) as llm:
        assert_logprobs(logprobs(llm), expected_logprobs(source, ARCHITECTURE)[:-1])


def test_bfloat16_generates_the_same_tokens_packed_and_online(packed, source):
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, detokenize=False)
    tokens = []
    for model, flag in ((packed, None), (source, "blockdialect")):
        with engine(model, quantization=flag, dtype="bfloat16") as llm:
            (output,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
            tokens.append(list(output.outputs[0].token_ids))
    assert len(tokens[0]) == 12
    assert tokens[0] == tokens[1]
