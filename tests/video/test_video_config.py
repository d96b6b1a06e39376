"""Options of SemanticDialect: closed, typed, one clear sentence for each fault."""

import json

import pytest

from diffusers_hook import ConfigError, SemanticDialectConfig


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"salient_fractoin": 0.1}, "salient_fractoin: is not an option of SemanticDialectConfig; "
         "did you mean 'salient_fraction'?"),
        ({"zzz": 1}, "zzz: is not an option of SemanticDialectConfig; known options: activation, "),
        ({"salient_fraction": 1.5}, "salient_fraction: 1.5 cannot be used: "),
        ({"salient_fraction": -0.1}, "salient_fraction: -0.1 cannot be used: "),
        ({"salient_refresh": 0}, "salient_refresh: 0 cannot be used: "),
        ({"block_size": 48}, "block_size: 48 cannot be used: input should be 16, 32 or 64"),
        ({"book": "fp4"}, "book: 'fp4' cannot be used: input should be 'semantic_32' or "
         "'dialect_fp4'"),
        ({"activation": "int8"}, "activation: 'int8' cannot be used: "),
        ({"selection": "best"}, "selection: 'best' cannot be used: "),
        ({"seda_window": (4, 0, 4)}, "seda_window: (4, 0, 4) cannot be used: it must be three "
         "whole numbers from 1 on: frames, rows and columns"),
        ({"seda_window": (4, 4)}, "seda_window: (4, 4) cannot be used: it must be three whole "),
        ({"seda_window": 4}, "seda_window: 4 cannot be used: it must be three whole numbers "),
        ({"seda_window": (4, "a", 4)}, "seda_window: (4, 'a', 4) cannot be used: "),
        ({"seda": True, "book": "dialect_fp4"}, "seda: True has no effect with "
         "book='dialect_fp4'; use book='semantic_32' or leave seda out"),
        ({"seda": True, "activation": "fp8"}, "seda: True has no effect with activation='fp8'; use "
         "activation='dialect' or leave seda out"),
        ({"seda": True, "activation": "none"}, "seda: True has no effect with activation='none'; "),
        ({"salient_fraction": 0.2, "activation": "fp8"}, "salient_fraction: 0.2 has no effect with "
         "activation='fp8'; use activation='dialect' or leave salient_fraction out"),
        ({"seda_threshold": 2.0}, "seda_threshold: 2.0 cannot be used: "),
        ({"skip": ["("]}, "skip: ['('] cannot be used: '(' is no regular expression: "),
        ({"skip": "blocks"}, "skip: 'blocks' cannot be used: must be a list of regular "
         "expressions, not one string"),
        ({"seda": "yes"}, "seda: 'yes' cannot be used: "),
        ({"keep_original": "tape"}, "keep_original: 'tape' cannot be used: "),
        ({"format_version": 2}, "format_version: 2 cannot be used: this release reads version 1; "
         "upgrade blockdialect to read it"),
        ({"format_version": 0}, "format_version: 0 cannot be used: versions begin at 1; "),
    ],
)  # fmt: skip
def test_a_bad_option_gets_one_sentence(options, sentence):
    with pytest.raises(ConfigError) as caught:
        SemanticDialectConfig(**options)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_it_survives_json():
    config = SemanticDialectConfig(
        block_size=64, skip=[r"blocks\.0\..*"], seda_window=(2, 2, 2), selection="bottom"
    )
    read = SemanticDialectConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert read == config
    assert SemanticDialectConfig.from_dict(SemanticDialectConfig(activation="fp8").to_dict())
    assert json.loads(config.to_json_string()) == {
        "quant_method": "semantic_dialect",
        "format_version": 1,
        "block_size": 64,
        "skip": [r"blocks\.0\..*"],
        "seda_window": [2, 2, 2],
        "selection": "bottom",
    }


def test_options_replace_single_fields_and_are_checked():
    config = SemanticDialectConfig(block_size=16)
    assert config.replaced(seda=False).block_size == 16
    assert config.replaced(seda=True).model_fields_set == {"block_size", "seda"}
    with pytest.raises(ConfigError, match="salient_fraction: 7"):
        config.replaced(salient_fraction=7)


@pytest.mark.parametrize(
    ("options", "decomposes", "groups"),
    [
        ({"seda": True}, True, True),
        ({"salient_fraction": 0.0, "seda": True}, False, True),
        ({"seda": False}, True, False),
        ({"book": "dialect_fp4"}, True, False),
        ({"activation": "fp8"}, False, False),
        ({"activation": "none"}, False, False),
        ({"activation": "none", "salient_fraction": 0.0}, False, False),
    ],
)
def test_which_mechanisms_an_activation_format_has(options, decomposes, groups):
    config = SemanticDialectConfig(**options)
    assert (config.decomposes, config.groups) == (decomposes, groups)
