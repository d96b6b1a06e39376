"""The table of architectures, and the rules for names that are not in it."""

import pytest

from dialect_kernels.layer_names import matches
from dialect_plugin import architectures
from dialect_plugin.checkpoint.reader import open_checkpoint
from dialect_plugin.experts import expert_of
from tests.support import swept_models
from tests.support.tiny_models import CONFIGS

GATES = [
    "model.layers.0.mlp.shared_expert_gate",
    "model.layers.0.altup.modality_router",
    "model.layers.0.block_sparse_moe.router.layer",
    "model.layers.0.mlp.gate.wg",
    "model.layers.0.per_layer_input_gate",
    "model.layers.0.feed_forward.gate",
]
TOWERS = [
    "vpm.encoder.layers.0.self_attn.q_proj",
    "apm.layers.0.fc1",
    "resampler.layers.0.attn.in_proj",
    "whisper_encoder.layers.0.fc1",
    "model.vision_backbone.image_vit.transformer.resblocks.0.attention.wq",
    "model.sam_model.blocks.0.attn.qkv",
    "model.qwen2_model.model.layers.0.mlp.up_proj",
    "talker.model.layers.0.self_attn.q_proj",
    "code2wav.pre_transformer.layers.0.mlp.up_proj",
    "speech_encoder.layers.0.fc1",
    "sound_encoder.encoder.layers.0.fc1",
    "model.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj",
    "visual.blocks.0.mlp.fc1",
    "img_processor.layers.0.mlp.fc1",
    "vision_model.encoder.layers.0.mlp.fc1",
    "multi_modal_projector.layers.0.linear_1",
]
OTHERS_IN_16_BIT = [
    "model.mtp.layers.0.self_attn.q_proj",
    "mtp.layers.0.mlp.up_proj",
    "model.layers.61.eh_proj",
    "model.layers.0.self_attn.indexer.wq_b",
    "model.layers.0.mixer.conv1d",
    "model.layers.0.conv.conv",
    "model.layers.0.self_attn.q_conv1d",
]


@pytest.mark.parametrize("name", [*GATES, *TOWERS, *OTHERS_IN_16_BIT])
def test_never_a_candidate(name):
    """What vLLM builds without a quantization config, or outside of the text model."""
    assert not architectures.is_candidate(name)


def test_encoders_beside_a_decoder_and_mamba_1_mixers_are_no_candidates():
    text = ["language_model.model.layers.0.mlp.up_proj"]
    speech = ["encoder.layers.0.attn.to_q"]
    assert architectures.candidate_layers([*text, *speech]) == text
    assert architectures.candidate_layers(speech) == speech  # an embedding model's own layers
    mamba = [f"model.layers.0.mixer.{leaf}" for leaf in ("in_proj", "x_proj", "out_proj")]
    assert architectures.candidate_layers(mamba) == []
    assert architectures.candidate_layers([mamba[0], mamba[2]]) == [mamba[0], mamba[2]]


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_the_table_is_what_engines_quantize_while_loading(architecture, tiny_model):
    """The converter takes the table, vLLM's plugin the rule for names."""
    linear = open_checkpoint(tiny_model(architecture)).linear_layers()
    table = architectures.default_layers(architecture, linear)
    assert table == architectures.candidate_layers(linear)
    assert table
    inside = {
        name.partition(".layers.0.")[2]
        for name in table
        if ".layers.0." in name and expert_of(name) is None  # which every table has
    }
    assert inside <= set(architectures.ARCHITECTURES[architecture])


def test_table_is_what_is_swept():
    untested = set(architectures.ARCHITECTURES) - set(swept_models.CONFIGS)
    assert untested == {
        "Gemma3ForConditionalGeneration",  # test_weight_loading has it
        "Qwen3_5ForCausalLM",  # vLLM's module needs torchvision, of which there is no CPU build
        "Qwen3_5ForConditionalGeneration",
    }
    assert untested <= set(swept_models.UNSERVED)
    assert set(swept_models.CONFIGS) <= set(architectures.ARCHITECTURES)
    name = "model.language_model.layers.3.mlp.up_proj"
    tower = "model.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj"
    found = architectures.default_layers("Gemma3ForConditionalGeneration", [name, tower])
    assert found == [name]


def test_candidates_are_linear_layers_of_numbered_blocks():
    names = [
        "transformer.wte",
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.ln_1",
        "transformer.h.0.moe.experts.3.w1",
        "transformer.h.0.moe.experts.mlp",
        "transformer.h.0.moe.gate",
        "vision_tower.layers.0.fc1",
        "lm_head",
    ]
    assert architectures.candidate_layers(names) == [names[1], names[3]]
    pattern = architectures.decoder_layer_pattern("transformer.h.0.attn.c_attn")
    assert pattern == r"re:transformer.h.\d+.attn.c_attn"
    assert matches(pattern, "transformer.h.17.attn.c_attn")


def test_one_pattern_stands_for_the_routed_experts_and_for_nothing_else():
    names = [
        "model.layers.0.mlp.experts.0.up_proj",
        "model.layers.0.mlp.shared_expert.up_proj",
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.experts.7.up_proj",
    ]
    pattern = "re:.*\\.experts\\..*"  # as in config.json
    assert architectures.collapse_experts(names) == [names[1], names[2], pattern]
    assert architectures.collapse_experts(names[1:3]) == names[1:3]
    assert [architectures.holds_experts(name) for name in names] == [True, False, False, True]


def test_where_some_experts_are_packed_each_module_of_the_others_is_named():
    names = [
        f"model.layers.0.mlp.experts.{e}.{part}_proj" for e in (0, 1) for part in ("gate", "up")
    ]
    packed = ["model.layers.1.mlp.experts.0.up_proj"]
    others = ["model.layers.0.mlp.gate", "model.layers.0.mlp.experts.0.bottleneck"]
    found = architectures.collapse_experts([*names, *others], packed)
    assert found == [*others, "model.layers.0.mlp.experts"]
    dense = ["model.layers.0.mlp.up_proj"]
    assert architectures.collapse_experts(names, dense) == ["re:.*\\.experts\\..*"]
