"""The scheme: its JSON, its patterns and the names of the ways to serve."""

import json

import pytest

from dialect_plugin.scheme import METHODS, QUANT_METHOD, Scheme, SchemeError


def test_scheme_survives_its_own_json():
    scheme = Scheme(ignore=["re:.*gate", "lm_head"], block_size=64, book="semantic_32")
    assert Scheme.parse(json.loads(json.dumps(scheme.to_config()))) == scheme


def test_overrides_prefer_exact_names_then_order():
    scheme = Scheme.parse(
        {
            "overrides": {
                "re:.*proj": {"block_size": 16},
                "re:.*down_proj": {"block_size": 64},
                "a.down_proj": {"block_size": 32},
            },
            "block_size": 64,
        }
    )
    assert scheme.block_size_of("a.down_proj") == 32
    assert scheme.block_size_of("b.down_proj") == 16
    assert scheme.block_size_of("b.fc1") == 64


def test_every_activation_format_has_its_names():
    assert {form: tuple(method) for form, method in METHODS.items()} == {
        "dialect": ("W4A4", "blockdialect"),
        "fp8": ("W4A8", "blockdialect_w4a8"),
        "none": ("W4A16", "blockdialect_w4a16"),
    }
    assert METHODS[Scheme().activation_format].quantization == QUANT_METHOD


def test_an_override_that_is_no_object_is_named_with_its_form():
    with pytest.raises(SchemeError, match=r'overrides.x is 16; it must be an object such as \{"b'):
        Scheme.parse({"overrides": {"x": 16}})
