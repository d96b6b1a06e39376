"""Embeddings and output projections in vLLM: every way in, tied or not, cut by ranks, with LoRA.

What the engine computes with decoded weights in 16-bit layers is right. Activations are in 16 bit,
so that the comparison can be tight.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from dialect_kernels import SEMANTIC_32, quantize
from dialect_kernels.formatbook import LOWEST_EXPONENT
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.scheme import Scheme
from tests.support import swept_models
from tests.support.engine_core import many_engines, serve
from tests.support.engines import STORED, engine, load_model, logprobs, packed_modules, tensors_of
from tests.support.served_models import PROMPT, build, checkpoint_tensors
from tests.support.swept_models import decoded_copy

pytestmark = pytest.mark.slow

EMBEDDINGS, PROJECTION = "model.embed_tokens", "lm_head"
RENAMED = "model.embedding"
"""Embeddings of GPT-OSS in vLLM."""
BOTH = {"embeddings": True, "lm_head": True, "activation_format": "none"}
close = {"rtol": 1e-4, "atol": 1e-3}


def options(**scheme):
    return {
        "quantization": "blockdialect",
        "hf_overrides": {"quantization_config_dict_json": json.dumps(scheme)},
    }


def beside_layers(modules):
    return sorted(name for name in modules if ".layers." not in name)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build("LlamaForCausalLM", tmp_path_factory.mktemp("untied") / "source")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied") / "source"
    return build("LlamaForCausalLM", path, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    destination = tmp_path_factory.mktemp("packed") / "untied"
    convert(source, destination, Scheme(**BOTH))
    return destination


@pytest.fixture(scope="module")
def packed_tied(tied, tmp_path_factory):
    destination = tmp_path_factory.mktemp("packed") / "tied"
    convert(tied, destination, Scheme(embeddings=True))
    return destination


@pytest.mark.parametrize(
    ("architecture", "changes", "beside"),
    [
        ("LlamaForCausalLM", {}, [PROJECTION, EMBEDDINGS]),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, [EMBEDDINGS]),
        # scales its embeddings; vLLM multiplies with them and has no output projection
        ("Gemma2ForCausalLM", {}, [EMBEDDINGS]),
        # vLLM builds both without a quantization config
        ("OPTForCausalLM", {}, [PROJECTION, "model.decoder.embed_tokens"]),
        # its map of names has the weight of the embeddings, and not their packed tensors
        ("GptOssForCausalLM", {}, [PROJECTION, RENAMED]),
        ("PaliGemmaForConditionalGeneration", {}, [f"language_model.{EMBEDDINGS}"]),
    ],
    ids=["untied", "tied", "scaled", "built without a config", "renamed", "beside a tower"],
)
def test_packed_and_online_compute_what_decoded_weights_do(architecture, changes, beside, tmp_path):
    path = swept_models.build(architecture, tmp_path / "source", **changes)
    scheme = BOTH | {"lm_head": PROJECTION in beside}
    convert(path, tmp_path / "packed", Scheme(**scheme))
    needed = swept_models.OPTIONS.get(architecture, {})
    with many_engines():
        found = serve(tmp_path / "packed", **needed)
        online = serve(path, **needed, **options(**scheme))
        right = serve(decoded_copy(path, tmp_path / "packed", tmp_path / "right"), **needed)
        plain = serve(path, **needed)
    assert beside_layers(found.packed) == beside_layers(online.packed) == sorted(beside)
    assert torch.equal(found.output, online.output)
    torch.testing.assert_close(found.output, right.output, **close)
    assert (found.output - plain.output).abs().max() > 0.1


@pytest.mark.usefixtures("one_rank")
def test_bytes_and_padding_are_the_same_packed_and_online(source, packed):
    from_packed = tensors_of(load_model(packed))
    online = tensors_of(load_model(source, **options(**BOTH)))
    assert from_packed.keys() == online.keys()
    for name, value in from_packed.items():
        assert torch.equal(value, online[name]), name
    for module in (EMBEDDINGS, PROJECTION):
        codes, meta, row_exponent = (online[f"{module}.{name}"] for name in STORED)
        expected = quantize(checkpoint_tensors(source)[f"{module}.weight"], SEMANTIC_32)
        assert torch.equal(codes[:500], expected.codes)
        assert torch.equal(meta[:500], expected.meta)
        assert torch.equal(row_exponent[:500], expected.row_exponent)
        assert not codes[500:].any()
        assert not meta[500:].any()
        assert row_exponent[500:].tolist() == 12 * [LOWEST_EXPONENT]


@pytest.mark.usefixtures("one_rank")
def test_bytes_of_embeddings_that_the_loader_renames(tmp_path):
    source = swept_models.build("GptOssForCausalLM", tmp_path / "source")
    convert(source, tmp_path / "packed", Scheme(**BOTH))
    packed, online = load_model(tmp_path / "packed"), load_model(source, **options(**BOTH))
    stored, weights = checkpoint_tensors(tmp_path / "packed"), checkpoint_tensors(source)
    weight = weights[f"{EMBEDDINGS}.weight"]
    new = {f"{EMBEDDINGS}.weight": -weight.flip(0)}
    for values in (None, {n: v for n, v in stored.items() if n.startswith(EMBEDDINGS)}, new):
        if values is not None:  # pushed into the loaded model
            for model in (packed, online):
                model.load_weights(iter(values.items()))
        expected = quantize(new[f"{EMBEDDINGS}.weight"] if values is new else weight, SEMANTIC_32)
        for model in (packed, online):
            found = tensors_of(model)
            for name, tensor in zip(STORED, expected.tensors, strict=True):
                assert torch.equal(found[f"{RENAMED}.{name}"][:500], tensor), name


@pytest.mark.usefixtures("one_rank")
def test_a_tied_matrix_is_there_once(packed_tied):
    model = load_model(packed_tied)
    assert model.lm_head is model.model.embed_tokens
    assert beside_layers(packed_modules(tensors_of(model))) == [EMBEDDINGS]
    assert model.lm_head.quant_method.spec.format.activation_format == "none"
    forced = load_model(packed_tied, quantization="blockdialect_w4a8")
    assert forced.lm_head.quant_method.spec.format.activation_format == "fp8"


@pytest.mark.usefixtures("one_rank")
def test_the_second_of_two_ranks_has_its_rows(source, packed, packed_tied, tied, monkeypatch):
    from vllm.distributed import get_tp_group

    monkeypatch.setattr(get_tp_group(), "world_size", 2)
    monkeypatch.setattr(get_tp_group(), "rank_in_group", 1)
    cases = [
        (source, packed, options(**BOTH), (EMBEDDINGS, PROJECTION)),
        (tied, packed_tied, options(embeddings=True), (EMBEDDINGS,)),
    ]
    for plain, converted, online_options, modules in cases:
        from_packed = tensors_of(load_model(converted))
        online = tensors_of(load_model(plain, **online_options))
        for module in modules:
            expected = quantize(checkpoint_tensors(plain)[f"{module}.weight"][256:], SEMANTIC_32)
            fields = zip(STORED, expected.tensors, (0, 0, LOWEST_EXPONENT), strict=True)
            for name, tensor, padding in fields:
                for found in (from_packed[f"{module}.{name}"], online[f"{module}.{name}"]):
                    assert len(found) == 256
                    assert torch.equal(found[:244], tensor), name
                    assert bool((found[244:] == padding).all()), name


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("mode", ["packed", "online"])
@pytest.mark.parametrize("pushed", ["16 bit", "packed"])
def test_rows_pushed_into_a_loaded_model(mode, pushed, tied, packed_tied, tmp_path):
    other = build("LlamaForCausalLM", tmp_path / "other", seed=1, tie_word_embeddings=True)
    convert(other, tmp_path / "new", Scheme(embeddings=True))
    model = (
        load_model(packed_tied)
        if mode == "packed"
        else load_model(tied, **options(embeddings=True))
    )
    new = checkpoint_tensors(other if pushed == "16 bit" else tmp_path / "new")
    model.load_weights((n, value) for n, value in new.items() if n.startswith(EMBEDDINGS))
    found = tensors_of(model)
    expected = quantize(checkpoint_tensors(other)[f"{EMBEDDINGS}.weight"], SEMANTIC_32)
    for name, tensor in zip(STORED, expected.tensors, strict=True):
        assert torch.equal(found[f"{EMBEDDINGS}.{name}"][:500], tensor)
    exponents = found[f"{EMBEDDINGS}.{STORED[2]}"][500:]
    assert exponents.tolist() == 12 * [LOWEST_EXPONENT]


@pytest.mark.usefixtures("one_rank")
def test_what_is_missing_or_does_not_fit(source, packed, tmp_path):
    tensors = checkpoint_tensors(packed)
    faults = {
        f"{EMBEDDINGS}.weight_meta: the checkpoint does not hold it": lambda t: t.pop(
            f"{EMBEDDINGS}.weight_meta"
        ),
        "has 499 rows where the model needs 500": lambda t: t.update(
            {n: v[:499] for n, v in t.items() if n.startswith(EMBEDDINGS)}
        ),
        f"{PROJECTION}.*the checkpoint holds a 16-bit weight": lambda t: t.update(
            {f"{PROJECTION}.weight": checkpoint_tensors(source)[f"{PROJECTION}.weight"]}
        ),
    }
    for number, (sentence, damage) in enumerate(faults.items()):
        path = tmp_path / str(number)
        path.mkdir()
        (path / "config.json").write_text((packed / "config.json").read_text())
        damaged = dict(tensors)
        damage(damaged)
        save_file(damaged, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=sentence):
            load_model(path)


@pytest.mark.usefixtures("one_rank")
def test_an_output_projection_tied_to_16_bit_embeddings_is_refused(tied):
    from dialect_plugin.scheme import SchemeError
    from dialect_plugin.vllm.config import BlockDialectConfig

    config = BlockDialectConfig(Scheme(serialized=False, lm_head=True))
    with pytest.raises(SchemeError, match="set embeddings to true, which packs the one matrix"):
        config.projection_spec(None, PROJECTION, tied=True)
    with pytest.raises(ValueError, match="set embeddings to true, which packs the one matrix"):
        load_model(tied, **options(lm_head=True))


@pytest.mark.usefixtures("one_rank")
def test_embeddings_whose_columns_no_block_divides_stay_in_16_bit(tmp_path):
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1}
    path = build("LlamaForCausalLM", tmp_path / "source", hidden_size=104, **one_head)
    found = tensors_of(load_model(path, **options(**BOTH)))
    assert f"{EMBEDDINGS}.weight" in found
    assert beside_layers(packed_modules(found)) == []


def adapter_for(modules, tensors, path):
    """A LoRA adapter on embeddings and output projection, and its two factors of each."""
    torch.manual_seed(3)
    rank, scale, factors, stored = 8, 2.0, {}, {}
    for module in modules:
        rows, columns = tensors[f"{module}.weight"].shape
        inputs, outputs = (rows, columns) if module == EMBEDDINGS else (columns, rows)
        down, up = torch.randn(rank, inputs) * 0.1, torch.randn(outputs, rank) * 0.1
        factors[module] = (down, up * scale)
        ends = (
            ("lora_embedding_A", "lora_embedding_B")
            if module == EMBEDDINGS
            else ("lora_A.weight", "lora_B.weight")
        )
        for end, factor in zip(ends, (down, up), strict=True):
            stored[f"base_model.model.{module}.{end}"] = factor
    path.mkdir()
    save_file(stored, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(rank * scale),
        "target_modules": [module.rpartition(".")[2] for module in modules],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return factors


def test_lora_on_both(source, packed, tmp_path):
    """An adapter adds to packed embeddings and projections what it adds to decoded ones."""
    from vllm.lora.request import LoRARequest

    adapter_for((EMBEDDINGS, PROJECTION), checkpoint_tensors(source), tmp_path / "adapter")
    right = decoded_copy(source, packed, tmp_path / "right")
    found = {}
    for path in (packed, right):
        flag = "blockdialect_w4a16" if path == packed else None
        with engine(path, quantization=flag, enable_lora=True, max_lora_rank=8) as llm:
            request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
            found[path] = logprobs(llm, lora_request=request), logprobs(llm)
    torch.testing.assert_close(found[packed][0], found[right][0], **close)
    torch.testing.assert_close(found[packed][1], found[right][1], **close)
    assert (found[right][0] - found[right][1]).abs().max() > 0.05


@pytest.mark.parametrize("ties", [False, True])
def test_reloaded_and_compiled(ties, source, tied, packed, packed_tied, tmp_path):
    from vllm import SamplingParams

    plain, converted = (tied, packed_tied) if ties else (source, packed)
    scheme = {"embeddings": True} if ties else BOTH
    other = build("LlamaForCausalLM", tmp_path / "other", seed=1, tie_word_embeddings=ties)
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)

    def tokens(llm):
        (output,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    with engine(plain, **options(**scheme)) as llm:
        before, generated = logprobs(llm), tokens(llm)
        for path in (other, plain):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            changed = not torch.equal(logprobs(llm), before)
            assert changed == (path == other)
    with engine(converted, enforce_eager=not ties, enable_lora=ties) as llm:
        torch.testing.assert_close(logprobs(llm), before, **close)
        assert tokens(llm) == generated
