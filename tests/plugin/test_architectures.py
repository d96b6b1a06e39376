"""The table of architectures, and the rules for names that are not in it."""

from dialect_kernels.layer_names import matches
from dialect_plugin import architectures
from tests.support.tiny_models import CONFIGS


def test_table_covers_what_is_tested():
    untested = set(architectures.ARCHITECTURES) - set(CONFIGS)
    assert untested == {"Gemma3ForConditionalGeneration"}  # the same text layers, in front a tower
    name = "model.language_model.layers.3.mlp.up_proj"
    assert architectures.is_default_layer("Gemma3ForConditionalGeneration", name)
    tower = "model.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj"
    assert not architectures.is_default_layer("Gemma3ForConditionalGeneration", tower)


def test_candidates_are_linear_layers_of_numbered_blocks():
    names = [
        "transformer.wte",
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.ln_1",
        "transformer.h.0.moe.experts.3.w1",
        "transformer.h.0.moe.gate",
        "vision_tower.layers.0.fc1",
        "lm_head",
    ]
    assert architectures.candidate_layers(names) == ["transformer.h.0.attn.c_attn"]
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
    assert [architectures.is_expert(name) for name in names] == [True, True, False, True]
