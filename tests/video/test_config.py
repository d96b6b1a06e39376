"""Options of SemanticDialect: closed, typed, one clear sentence for each fault."""

import json
import re

import pytest

from diffusers_hook import ConfigError, SemanticDialectConfig


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"salient_fractoin": 0.1}, "salient_fractoin: is not an option of SemanticDialectConfig; "
         "did you mean 'salient_fraction'?"),
        ({"zzz": 1}, "zzz: is not an option of SemanticDialectConfig; known options: "
         "activation_format, block_size, "),
        ({"salient_fraction": 1.5}, "salient_fraction: 1.5 cannot be used: "),
        ({"salient_fraction": -0.1}, "salient_fraction: -0.1 cannot be used: "),
        ({"salient_refresh": 0}, "salient_refresh: 0 cannot be used: "),
        ({"block_size": 48}, "block_size: 48 cannot be used: input should be 16, 32 or 64"),
        ({"book": "fp4"}, "book: 'fp4' cannot be used: input should be 'dialect_fp4' or "
         "'semantic_32'"),
        ({"activation_format": "int8"}, "activation_format: 'int8' cannot be used: "),
        ({"selection": "best"}, "selection: 'best' cannot be used: "),
        ({"seda_window": (4, 0, 4)}, "seda_window: (4, 0, 4) cannot be used: it must be three "
         "whole numbers from 1 on: frames, rows and columns"),
        ({"seda_window": (4, 4)}, "seda_window: (4, 4) cannot be used: it must be three whole "),
        ({"seda_window": 4}, "seda_window: 4 cannot be used: it must be three whole numbers "),
        ({"seda_window": (4, "a", 4)}, "seda_window: (4, 'a', 4) cannot be used: "),
        ({"seda": True, "book": "dialect_fp4"}, "seda: True has no effect with "
         "book='dialect_fp4'; use book='semantic_32' or leave seda out"),
        ({"seda": True, "activation_format": "fp8"}, "seda: True has no effect with "
         "activation_format='fp8'; use activation_format='dialect' or leave seda out"),
        ({"seda": True, "activation_format": "none"}, "seda: True has no effect with "
         "activation_format='none'; "),
        ({"salient_fraction": 0.2, "activation_format": "fp8"}, "salient_fraction: 0.2 has no "
         "effect with activation_format='fp8'; use activation_format='dialect' or leave "
         "salient_fraction out"),
        ({"seda_threshold": 2.0}, "seda_threshold: 2.0 cannot be used: "),
        ({"ignore": ["re:("]}, "ignore: ['re:('] cannot be used: 're:(' is not a regular "
         "expression ("),
        ({"ignore": "blocks"}, "ignore: 'blocks' cannot be used: it must be a list of patterns, "
         "not one string"),
        ({"ignore": ["first:0"]}, "ignore: ['first:0'] cannot be used: 'first:0' must end in a "
         "number of blocks from 1 on, such as 'first:1'"),
        ({"ignore": ["last:one"]}, "ignore: ['last:one'] cannot be used: 'last:one' must end in "),
        ({"ignore": [3]}, "ignore.0: 3 cannot be used: input should be a valid string"),
        ({"activation": "fp8"}, "activation: is not an option of SemanticDialectConfig; did you "
         "mean 'activation_format'?"),
        ({"skip": ["blocks"]}, "skip: is not an option of SemanticDialectConfig; did you mean "
         "'ignore'?"),
        ({"seda": "yes"}, "seda: 'yes' cannot be used: "),
        ({"protected_steps": "last"}, "protected_steps: 'last' cannot be used: it must be 'none', "
         "'auto' or a list of the steps' numbers, which count from 0"),
        ({"protected_steps": [3, -1]}, "protected_steps: [3, -1] cannot be used: it must be "),
        ({"protected_steps": []}, "protected_steps: [] cannot be used: it must be "),
        ({"protected_steps": [True]}, "protected_steps: [True] cannot be used: it must be "),
        ({"protected_steps": 3}, "protected_steps: 3 cannot be used: it must be "),
        ({"protected_steps": "auto", "activation_format": "fp8"}, "protected_steps: 'auto' has no "
         "effect with activation_format='fp8'; use activation_format='dialect' or leave "
         "protected_steps out"),
        ({"protected_steps": [1], "format_version": 1}, "protected_steps: (1,) needs "
         "format_version 2, not 1; save the model again"),
        ({"protected_fraction": 0}, "protected_fraction: 0 cannot be used: "),
        ({"protected_fraction": 1.5}, "protected_fraction: 1.5 cannot be used: "),
        ({"protected_format": "fp4"}, "protected_format: 'fp4' cannot be used: input should be "
         "'decomposed' or 'fp8'"),
        ({"keep_original": "tape"}, "keep_original: 'tape' cannot be used: "),
        ({"format_version": 3}, "format_version: 3 cannot be used: this release reads versions up "
         "to 2; upgrade blockdialect to read it"),
        ({"rotation": "hadamard"}, "rotation: 'hadamard' cannot be used: input should be 'none' "
         "or 'hadamard_32'"),
        ({"rotation": "hadamard_32", "format_version": 1}, "rotation: 'hadamard_32' needs "
         "format_version 2, not 1; save the model again"),
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
        block_size=64, ignore=[r"re:blocks\.0\."], seda_window=(2, 2, 2), selection="bottom"
    )
    read = SemanticDialectConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert read == config
    eight = SemanticDialectConfig(activation_format="fp8")
    assert SemanticDialectConfig.from_dict(eight.to_dict()) == eight
    assert json.loads(config.to_json_string()) == {
        "quant_method": "semantic_dialect",
        "format_version": 2,
        "protected_steps": None,
        "block_size": 64,
        "ignore": [r"re:blocks\.0\."],
        "seda_window": [2, 2, 2],
        "selection": "bottom",
    }


PLAIN = SemanticDialectConfig(protected_steps="none")


def test_a_rotation_makes_it_version_2():
    rotated = SemanticDialectConfig(rotation="hadamard_32", protected_steps="none")
    assert rotated.to_dict()["format_version"] == 2
    assert SemanticDialectConfig.from_dict(rotated.to_dict()) == rotated
    assert rotated.to_diff_dict() == {
        "quant_method": "semantic_dialect",
        "format_version": 2,
        "rotation": "hadamard_32",
        "protected_steps": "none",
    }
    plain = rotated.replaced(rotation="none")
    assert plain.to_dict() == PLAIN.to_dict()
    assert plain.to_dict()["format_version"] == 1
    assert "rotation" not in plain.to_dict()
    assert plain.replaced(rotation="hadamard_32").to_dict() == rotated.to_dict()
    read = SemanticDialectConfig.from_dict(plain.to_dict() | {"format_version": 2})
    assert read.to_dict() == plain.to_dict()


def test_protected_steps_make_it_version_2():
    config = SemanticDialectConfig(protected_steps=[7, 2, 7], protected_format="fp8")
    assert config.protected_steps == (2, 7)
    assert SemanticDialectConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_diff_dict() == {
        "quant_method": "semantic_dialect",
        "format_version": 2,
        "protected_steps": [2, 7],
        "protected_format": "fp8",
    }
    plain = config.replaced(protected_steps="none", protected_format="decomposed")
    assert plain == PLAIN
    assert plain.to_dict() == PLAIN.to_dict()
    assert not any(name.startswith("protected") for name in plain.to_dict())


@pytest.mark.parametrize("options", [{}, {"rotation": "hadamard_32"}, {"activation_format": "fp8"}])
@pytest.mark.parametrize("steps", [None, "none", "auto", (3,)])
def test_a_file_says_which_steps_are_protected(options, steps):
    if steps in ("auto", (3,)) and "activation_format" in options:
        return  # refused
    config = SemanticDialectConfig(protected_steps=steps, **options)
    assert config == SemanticDialectConfig(**options).replaced(protected_steps=steps)
    for saved in (config.to_dict(), config.to_diff_dict()):
        read = SemanticDialectConfig.from_dict(json.loads(json.dumps(saved)))
        assert read == config
        assert read.protected_steps == steps
    version = 1 if steps == "none" and "rotation" not in options else 2
    assert config.format_version == version
    assert config.to_dict()["format_version"] == version
    assert ("protected_steps" in config.to_dict()) == (version == 2)


@pytest.mark.parametrize("saved", [{"format_version": 1}, {"format_version": 2}])
def test_files_from_before_the_default_protect_no_step(saved):
    config = SemanticDialectConfig.from_dict({"quant_method": "semantic_dialect", **saved})
    assert config.protected_steps == "none"
    assert not config.protects
    assert config.replaced(block_size=16).protected_steps == "none"
    assert config.replaced(protected_steps=None) == SemanticDialectConfig()
    assert SemanticDialectConfig().protects


OLD_NAMES = {"activation": "fp8", "skip": [r"blocks\.0\..*", "proj"], "salient_fraction": 0.0}


def test_files_with_the_old_names_of_options_are_read(recwarn):
    config = SemanticDialectConfig.from_dict(OLD_NAMES)
    assert config.activation_format == "fp8"
    assert config.model_fields_set == {"activation_format", "ignore", "salient_fraction"}
    assert SemanticDialectConfig.from_dict({"activation": "none", "skip": []}).ignore == ()
    assert not recwarn
    for name, ignored in (
        ("blocks.0.attn1.to_q", True),
        ("blocks.01.attn1.to_q", False),
        ("proj", True),
        ("proj_out", False),
        ("a.proj", False),
    ):
        assert config.is_ignored(name) == ignored
    saved = json.loads(json.dumps(config.to_dict()))
    assert not {"activation", "skip"} & saved.keys()
    assert SemanticDialectConfig.from_dict(saved) == config


@pytest.mark.parametrize(
    "expression",
    ["a", "a|ab", "(?i)A.*", "(?i)(?s)A.", "(?x) a  b # a comment", "a$", "(a)\\1|b", "(?m)a$", ""],
)
def test_old_expressions_match_whole_names_as_before(expression):
    config = SemanticDialectConfig.from_dict({"skip": [expression]})
    for name in ("", "a", "ab", "aa", "b", "abc", "A", "A\n", "a\n", "a\nb"):
        assert config.is_ignored(name) == (re.fullmatch(expression, name) is not None)


@pytest.mark.parametrize(
    ("old", "value", "new", "other"),
    [("activation", "fp8", "activation_format", "none"), ("skip", ["a"], "ignore", ["b"])],
)
def test_an_option_under_both_names_is_refused(old, value, new, other):
    with pytest.raises(ConfigError, match=f"^{old}: is the old name of {new}, which is given too"):
        SemanticDialectConfig.from_dict({old: value, new: other})


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
        ({"activation_format": "fp8"}, False, False),
        ({"activation_format": "none"}, False, False),
        ({"activation_format": "none", "salient_fraction": 0.0}, False, False),
    ],
)
def test_which_mechanisms_an_activation_format_has(options, decomposes, groups):
    config = SemanticDialectConfig(**options)
    assert (config.decomposes, config.groups) == (decomposes, groups)
