"""The scheme: its JSON, its patterns and the names of the ways to serve."""

import json

import pytest

from dialect_plugin.scheme import (
    METHODS,
    QUANT_METHOD,
    Scheme,
    SchemeError,
    disagreement,
    fitted,
)


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
    assert scheme.layer("a.down_proj").block_size == 32
    assert scheme.layer("b.down_proj").block_size == 16
    assert scheme.layer("b.fc1").block_size == 64


def test_each_key_of_a_layer_comes_from_the_first_override_that_has_it():
    scheme = Scheme.parse(
        {
            "overrides": {
                "re:.*layers.0": {"rotation": "none", "book": "dialect_fp4"},
                "re:.*down_proj": {"activation_format": "fp8", "book": "semantic_32"},
                "layers.0.down_proj": {"block_size": 16},
                "model.layers.0.q_proj": {"block_size": 64, "rotation": "hadamard_32"},
            },
            "rotation": "hadamard_32",
        }
    )
    down = ("dialect_fp4", 16, "fp8", "none")
    assert scheme.layer("layers.0.down_proj") == down
    assert scheme.layer("model.layers.0.down_proj", "layers.0.down_proj") == down
    assert scheme.layer("layers.1.down_proj") == ("semantic_32", 32, "fp8", "hadamard_32")
    assert scheme.layer("layers.0.q_proj") == ("dialect_fp4", 32, "dialect", "none")
    both = ("layers.0.q_proj", "model.layers.0.q_proj")
    assert scheme.layer(*both) == ("dialect_fp4", 64, "dialect", "hadamard_32")
    assert scheme.layer("layers.1.q_proj") == ("semantic_32", 32, "dialect", "hadamard_32")
    forced = scheme.with_activation_format("none")
    assert {forced.layer(n).activation_format for n in ("layers.0.down_proj", "x")} == {"none"}
    assert forced.layer("layers.0.down_proj").book == "dialect_fp4"


VERSION_1 = {
    "quant_method": "blockdialect",
    "format_version": 1,
    "serialized": True,
    "book": "dialect_fp4",
    "block_size": 32,
    "activation_format": "dialect",
    "ignore": [],
    "overrides": {"a": {"block_size": 16}},
    "lm_head": False,
}


@pytest.mark.parametrize(
    ("keys", "version"),
    [
        ({}, 1),
        ({"rotation": "none"}, 1),
        ({"rotation": "hadamard_32"}, 2),
        ({"embeddings": False}, 1),
        ({"embeddings": True}, 2),
        ({"kv_cache": "none"}, 1),
        ({"kv_cache": "dialect"}, 2),
        ({"attention": "none"}, 1),
        ({"kv_cache": "dialect", "attention": "dialect"}, 2),
        ({"overrides": {"a": {"rotation": "none"}}}, 2),
        ({"overrides": {"a": {"book": "semantic_32"}}}, 2),
        ({"overrides": {"a": {"block_size": 16, "activation_format": "fp8"}}}, 2),
    ],
)
def test_keys_that_version_1_lacks_are_written_only_where_they_are_needed(keys, version):
    scheme = Scheme.parse({"overrides": {"a": {"block_size": 16}}} | keys)
    defaults = {"rotation": "none", "embeddings": False, "kv_cache": "none"}
    defaults |= {"attention": "none"}
    written = {k: v for k, v in keys.items() if (k, v) not in defaults.items()}
    expected = VERSION_1 | {"book": "semantic_32", "format_version": version} | written
    assert list(scheme.to_config().items()) == list(expected.items())
    assert scheme.format_version == version
    assert Scheme.parse(scheme.to_config()) == scheme
    if version == 2:
        with pytest.raises(
            SchemeError,
            match=r"^x: format_version is 1; rotation, embeddings, kv_cache, atten",
        ):
            Scheme.parse(expected | {"format_version": 1}, "x")


def test_attention_without_a_cache_is_refused():
    with pytest.raises(
        SchemeError, match=r"^x: attention is 'dialect', which needs .* set kv_cache"
    ):
        Scheme.parse({"attention": "dialect"}, "x")
    with pytest.raises(SchemeError, match=r"^x: attention is 'fp8'; it must be 'none' or 'd"):
        Scheme.parse({"attention": "fp8", "kv_cache": "dialect"}, "x")


def test_a_packed_checkpoint_without_a_book_has_the_first_one():
    """New conversions name their book; what they get by default says nothing about files."""
    unnamed = {key: value for key, value in VERSION_1.items() if key != "book"}
    assert Scheme.parse(unnamed).to_config() == VERSION_1
    assert Scheme.parse({"serialized": False}).book == Scheme().book == "semantic_32"


def test_a_file_of_version_2_may_lack_its_keys():
    scheme = Scheme.parse(VERSION_1 | {"format_version": 2})
    assert scheme.to_config() == VERSION_1


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ({}, "overrides.x: it must set one of block_size, book, activation_format, rotation"),
        ({"rotation": None}, "overrides.x.rotation is None; leave the key out to have the scheme"),
        ({"rotation": "hadamard"}, "overrides.x.rotation is 'hadamard'; it must be 'none' or"),
        ({"window": 7}, "the key 'overrides.x.window' is not known; allowed are block_size, book"),
    ],
)
def test_a_faulty_override_is_one_sentence(override, sentence):
    with pytest.raises(SchemeError) as caught:
        Scheme.parse({"overrides": {"x": override}})
    assert str(caught.value).startswith(f"quantization_config: {sentence}")


@pytest.mark.parametrize(
    ("columns", "block_size", "rotation"),
    [(64, 64, "hadamard_32"), (96, 32, "hadamard_32"), (48, 16, "none"), (80, 16, "none")],
)
def test_a_format_is_fitted_to_the_columns(columns, block_size, rotation):
    wanted = Scheme(block_size=64, rotation="hadamard_32").layer("x")
    assert fitted(wanted, columns) == ("semantic_32", block_size, "dialect", rotation)
    assert fitted(wanted, 40) is None


def test_how_parts_of_a_matrix_disagree():
    plain = Scheme().layer("x")
    parts = {"q": plain, "k": plain._replace(rotation="hadamard_32", book="dialect_fp4"), "v": None}
    assert disagreement({"q": plain, "k": plain}) is None
    assert disagreement({"q": None, "k": None}) is None
    assert disagreement(parts) == (
        "q book semantic_32, rotation none, k book dialect_fp4, rotation hadamard_32, v 16 bit",
        "book and rotation",
    )
    assert disagreement({"q": plain, "v": None}) == ("q block size 32, v 16 bit", "block size")


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


def test_embeddings_are_never_rotated_and_tied_ones_are_multiplied_with_16_bit_activations():
    scheme = Scheme(rotation="hadamard_32", overrides={"re:.*wte": {"block_size": 16}})
    assert scheme.embedding("wte", tied=False) == ("semantic_32", 16, "dialect", "none")
    assert scheme.embedding("wte", tied=True) == ("semantic_32", 16, "none", "none")
    asked = {"wte": {"activation_format": "fp8", "rotation": "hadamard_32"}}
    other = Scheme.parse({"overrides": asked})
    assert other.embedding("wte", tied=True) == ("semantic_32", 32, "fp8", "none")
