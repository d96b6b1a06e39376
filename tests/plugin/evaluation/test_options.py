"""The options of an evaluation: names of formats, lists, and what has no effect."""

import pytest
from pydantic import ValidationError

from dialect_plugin.evaluation.options import EvaluationOptions, FormatName


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp8", FormatName("fp8", 0)),
        ("fp8+rotation", FormatName("fp8", 0, "hadamard_32")),
        ("mxfp4-32", FormatName("mxfp4", 32)),
        ("mxfp4-16+gptq", FormatName("mxfp4", 16, gptq=True)),
        ("nvfp4-16+rotation+gptq", FormatName("nvfp4", 16, "hadamard_32", True)),
        ("dialect_fp4-64", FormatName("dialect_fp4", 64)),
        ("semantic_32-16+rotation", FormatName("semantic_32", 16, "hadamard_32")),
    ],
)
def test_names_of_formats(name, expected):
    assert FormatName.parse(name) == expected
    assert str(expected) == name
    assert FormatName.parse(f" {name} ") == expected


def test_additions_may_stand_in_any_order():
    assert str(FormatName.parse("mxfp4-32+gptq+rotation")) == "mxfp4-32+rotation+gptq"


@pytest.mark.parametrize(
    "name",
    ["", "bf16", "mxfp4", "nvfp4-32", "mxfp4-32+hadamard", "mxfp4-32+gptq+gptq", "mxfp4-32+",
     "semantic_32-32+gptq", "fp8+gptq"],
)  # fmt: skip
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"format|calibrated|gptq"):
        FormatName.parse(name)


def test_a_rotation_needs_groups_of_32_columns():
    name = FormatName.parse("mxfp4-16+rotation")
    assert name.rotation_for(96) == "hadamard_32"
    assert name.rotation_for(48) == "none"


def test_lists_are_read_once_each():
    options = EvaluationOptions.model_validate(
        {"text": "t", "activations": "own, w4a8,own", "formats": "fp8,mxfp4-32,fp8"}
    )
    assert options.activations == ("own", "w4a8")
    assert [str(name) for name in options.formats] == ["fp8", "mxfp4-32"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"text": "default"}, "models are calibrated on that text"),
        ({"query_key_block_size": 16}, "Q and K are rounded with --scope all only"),
        ({"scope": "all", "query_key_block_size": 8}, "16, 32 or 64"),
        ({"activations": "w8a8"}, "it must be some of own, w4a4, w4a8, w4a16"),
        ({"activations": ""}, "it must be some of"),
        ({"scope": "all", "activations": "own,w4a8"}, "--scope all rounds attention to 4 bits"),
        ({"scope": "all", "formats": "fp8"}, "--scope all rounds attention to 4 bits: leave fp8"),
        ({"formats": "mxfp4-32+gptq"}, r"mxfp4-32\+gptq needs text: give a file or default"),
        ({"formats": "mxfp4-32", "calibrate": "default"}, "it has no effect without a format"),
        ({"calibrate": "default"}, "it has no effect without a format"),
        ({"formats": "mxfp4-32+gptq", "calibrate": "t"}, "the formats are evaluated on that text"),
        ({"windows": 0}, "greater than or equal to 1"),
        ({"sequence_length": 1}, "greater than or equal to 2"),
        ({"worst": -1}, "greater than or equal to 0"),
    ],
)
def test_options_that_do_not_fit_together(given, reason):
    with pytest.raises(ValidationError, match=reason):
        EvaluationOptions.model_validate({"text": "t"} | given)


def test_calibration_takes_windows_of_the_same_length():
    options = EvaluationOptions.model_validate(
        {"text": "t", "formats": "mxfp4-32+gptq", "calibrate": "c", "sequence_length": 64}
    )
    calibration = options.calibration
    assert (calibration.calibrate, calibration.sequence_length) == ("c", 64)
