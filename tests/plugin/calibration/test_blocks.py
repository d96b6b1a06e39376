"""Blocks that run alone compute what they compute inside their model."""

from copy import deepcopy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dialect_plugin.calibration.blocks import DecoderBlocks
from dialect_plugin.checkpoint.layer_choice import choose_layers
from dialect_plugin.checkpoint.reader import CheckpointError, open_checkpoint
from dialect_plugin.experts import expert_of
from tests.support import swept_models
from tests.support.conversions import edit_config, options_of
from tests.support.tiny_models import CONFIGS

HYBRID = ("FalconH1ForCausalLM", "Lfm2ForCausalLM", "NemotronHForCausalLM")
DENSE = sorted(
    {*swept_models.KINDS["Dense"], *HYBRID}
    - CONFIGS.keys()
    - {"GPTBigCodeForCausalLM", "HrmTextForCausalLM"}  # of other tensors than one block's
)
WINDOWS = torch.arange(3, 3 + 2 * 24).view(2, 24) * 7 % 300


MIXTURES = ("DeepseekV3ForCausalLM", "GptOssForCausalLM", "GraniteMoeForCausalLM")


def blocks_of(path, **options):
    checkpoint = open_checkpoint(path)
    choice = choose_layers(checkpoint, options_of(**options))
    return DecoderBlocks(checkpoint, choice.formats, "cpu")


def outputs(blocks):
    """Output of the last block for every window."""
    hidden = blocks.embed(WINDOWS)
    for number in range(len(blocks)):
        with blocks.loaded(number):
            hidden = [blocks.run(number, state) for state in hidden]
    return hidden


def expected_outputs(path, blocks):
    """The same from the whole model in float32, whose embeddings are as they are stored."""
    architecture = open_checkpoint(path).architecture
    model = getattr(transformers, architecture).from_pretrained(path, dtype=torch.float32)
    embedding = model.get_input_embeddings().to(torch.bfloat16)
    embedding.register_forward_hook(lambda module, given, y: y.float())
    found = []
    last = model.get_submodule(f"{blocks._path}.{len(blocks) - 1}")
    last.register_forward_hook(lambda module, given, y: found.append(y))
    decoder = model.get_decoder()
    with torch.no_grad():
        for window in WINDOWS:
            decoder(input_ids=window[None], use_cache=False)
    return [y[0] if isinstance(y, tuple) else y for y in found]


def assert_alike(path):
    blocks = blocks_of(path)
    assert len(blocks) >= 2
    for found, expected in zip(outputs(blocks), expected_outputs(path, blocks), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert float(expected.std()) > 1e-3


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_a_block_alone(architecture, tiny_model):
    assert_alike(tiny_model(architecture))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", DENSE)
def test_a_block_of_any_dense_architecture_alone(architecture, tmp_path):
    path = swept_models.build(architecture, tmp_path / "model")
    if architecture == "Gemma3nForCausalLM":  # every block is given embeddings of the tokens
        with pytest.raises(CheckpointError, match="depends on the text"):
            blocks_of(path).embed(WINDOWS)
        return
    assert_alike(path)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_block_whose_experts_run_one_by_one(architecture, tmp_path):
    path = swept_models.build(architecture, tmp_path / "model")
    blocks = blocks_of(path)
    assert set(blocks.experts) == {n for n in open_checkpoint(path).weights if expert_of(n)}
    (name,) = {m.config._experts_implementation for m in blocks.experts_in(1).values()}
    assert name not in ("eager", "grouped_mm", "batched_mm")
    assert_alike(path)


def test_only_one_block_is_in_memory(tiny_model):
    blocks = blocks_of(tiny_model(shard="200KB", num_hidden_layers=3))

    def held():
        parameters = blocks._model.named_parameters()
        return {name for name, tensor in parameters if not tensor.is_meta}

    assert not held()
    hidden = blocks.embed(WINDOWS)
    assert not held()
    for number in range(3):
        with blocks.loaded(number) as modules:
            front = f"model.layers.{number}."
            assert held()
            assert all(name.startswith(front) for name in held())
            assert {name for name in modules if not name.startswith(front)} == set()
            assert len(modules) == 7
            assert all(m.weight.dtype == torch.float32 for m in modules.values())
            hidden = [blocks.run(number, state) for state in hidden]
    assert not held()


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM", "OPTForCausalLM"]
)
def test_gradients_are_those_of_the_whole_model(architecture, tiny_model):
    """Untied, tied with capped logits, and with blocks that return tuples."""
    path = tiny_model(architecture)
    blocks = blocks_of(path)
    inputs, hidden = [], blocks.embed(WINDOWS)
    for number in range(len(blocks)):
        inputs.append(hidden)
        with blocks.loaded(number):
            hidden = [blocks.run(number, state) for state in hidden]
    gradients = blocks.scores(WINDOWS, hidden)
    assert all(tensor.is_meta for tensor in blocks._model.parameters())
    for number in reversed(range(len(blocks))):
        with blocks.loaded(number):
            gradients = [
                blocks.differentiate(number, state, gradient)
                for state, gradient in zip(inputs[number], gradients, strict=True)
            ]
    model = getattr(transformers, architecture).from_pretrained(path, dtype=torch.float32)
    stored = deepcopy(model.get_input_embeddings()).to(torch.bfloat16)
    model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, y: stored(arguments[0]).float().requires_grad_()
    )
    given = []

    def keep(module, arguments, keywords):
        given.append(keywords["hidden_states"] if not arguments else arguments[0])
        given[-1].retain_grad()

    model.get_submodule(f"{blocks._path}.0").register_forward_pre_hook(keep, with_kwargs=True)
    draw = torch.Generator().manual_seed(0)
    for window, found in zip(WINDOWS, gradients, strict=True):
        logits = model(window[None]).logits[0]
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=draw)
        logits.log_softmax(-1).gather(1, drawn).sum().backward()
        torch.testing.assert_close(found, given[-1].grad, rtol=1e-3, atol=1e-5)
        assert float(found.std()) > 1e-3


def test_a_model_without_predictions_has_no_scores(tiny_model, tmp_path):
    path = tiny_model()
    model = transformers.AutoModel.from_pretrained(path)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["LlamaModel"])
    blocks = blocks_of(tmp_path)
    with pytest.raises(CheckpointError, match="LlamaModel: has no output projection"):
        blocks.scores(WINDOWS, blocks.embed(WINDOWS))


def test_weights_are_the_stored_ones(tiny_model):
    path = tiny_model("Gemma2ForCausalLM")
    stored = load_file(path / "model.safetensors")
    blocks = blocks_of(path)
    blocks.embed(WINDOWS)
    with blocks.loaded(1) as modules:
        assert modules
        for name, module in modules.items():
            assert torch.equal(module.weight, stored[f"{name}.weight"].float())


def test_layers_outside_the_blocks_are_not_reached(tiny_model):
    blocks = blocks_of(tiny_model(), lm_head=True)
    assert "lm_head" not in blocks.linear
    assert len(blocks.linear) == 14


def refused(path, match, **options):
    with pytest.raises(CheckpointError, match=match) as caught:
        outputs(blocks_of(path, **options))
    assert "\n" not in str(caught.value)


def test_an_architecture_that_transformers_lacks(source):
    edit_config(source, architectures=["NewForCausalLM"])
    refused(
        source,
        "NewForCausalLM: transformers .* does not have this architecture.*leave --calibrate out",
        targets=["re:.*mlp.*"],
    )


def test_a_config_that_transformers_refuses(source):
    edit_config(source, num_attention_heads="many")
    refused(source, "transformers cannot build LlamaForCausalLM .*leave --calibrate out")


def test_a_weight_that_is_missing(source):
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.input_layernorm.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    refused(source, "no tensor for model.layers.1.input_layernorm.weight")


def test_a_layer_of_another_shape(source):
    edit_config(source, intermediate_size=128)
    refused(source, r"model.layers.0.mlp.down_proj: transformers has no linear layer of \[128, 256")


def test_layers_outside_repeated_blocks_only(tiny_model):
    with pytest.raises(CheckpointError, match="no repeated blocks are found around lm_head"):
        DecoderBlocks(open_checkpoint(tiny_model()), ["lm_head"], "cpu")
