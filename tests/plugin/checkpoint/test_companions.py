"""Files beside the weights: what a packed checkpoint keeps, and that the rest is named."""

import json

import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from dialect_plugin.checkpoint.convert import convert, render
from dialect_plugin.checkpoint.reader import _HUB_FILES, _HUB_LEFT_OUT
from tests.support.conversions import edit_config, refused


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def files(path):
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def sentence_model(source):
    """A sentence-transformers model: pooling and a projection with weights of its own."""
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    write(source / "modules.json", modules)
    write(source / "sentence_bert_config.json", {"max_seq_length": 64})
    write(source / "1_Pooling" / "config.json", {"pooling_mode_lasttoken": True})
    write(source / "2_Dense" / "config.json", {"in_features": 128})
    norm = load_file(source / "model.safetensors")["model.norm.weight"]
    save_file({"linear.weight": norm[None].contiguous()}, source / "2_Dense" / "model.safetensors")
    return source


def test_modules_of_sentence_transformers_are_copied_with_their_weights(sentence_model, tmp_path):
    convert(sentence_model, tmp_path / "packed")
    for name in (
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    ):
        assert (tmp_path / "packed" / name).read_bytes() == (sentence_model / name).read_bytes()


def test_a_module_that_is_a_pickle_only_is_refused(sentence_model, tmp_path):
    """An engine would leave the projection out without a word."""
    folder = sentence_model / "2_Dense"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(sentence_model, tmp_path / "packed", r"2_Dense: .*pytorch_model.bin only, a pickle")


def test_overwriting_replaces_the_folders_of_a_conversion(sentence_model, tmp_path):
    destination = tmp_path / "packed"
    convert(sentence_model, destination)
    before = files(destination)
    (sentence_model / "1_Pooling" / "config.json").write_text("{}")
    convert(sentence_model, destination, overwrite=True)
    assert files(destination) == before
    assert (destination / "1_Pooling" / "config.json").read_text() == "{}"
    write(destination / "1_Pooling" / "mine.txt", "mine")
    with pytest.raises(ValueError, match="holds the directory 1_Pooling"):
        convert(sentence_model, destination, overwrite=True)
    assert (destination / "1_Pooling" / "mine.txt").exists()


def test_folders_that_json_files_refer_to_and_folders_of_templates(source, tmp_path):
    write(source / "additional_chat_templates" / "tools.jinja", "{{ tools }}")
    write(source / "chat_template.jinja", "{{ messages }}")
    write(source / "processor_config.json", {"tokenizer": {"file": "text/vocab.txt"}})
    write(source / "text" / "vocab.txt", "a")
    write(source / "text" / "other.txt", "b")
    write(source / "samples" / "hello.txt", "not referred to")
    result = convert(source, tmp_path / "packed")
    assert {
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "text/vocab.txt",
    } < files(tmp_path / "packed")
    assert set(result.companions.left_out) == {"samples/", "text/other.txt"}
    assert "not copied: " in render(result)


@pytest.mark.parametrize("reference", ["../secret", "/etc", ".", "", "a/../../secret"])
def test_references_stay_inside_the_checkpoint(source, tmp_path, reference):
    write(tmp_path / "secret" / "config.json", "{}")
    write(source / "modules.json", [{"idx": 0, "path": reference, "type": "x"}])
    before = {p.name for p in source.iterdir()}
    convert(source, tmp_path / "packed")
    assert files(tmp_path / "packed") == before | {"README.md"}


def test_code_and_pickles_are_named_and_not_copied(source, tmp_path):
    write(source / "modeling_new.py", "raise SystemExit")
    write(source / "scripts" / "run.py", "raise SystemExit")
    write(source / "optimizer.pt", "pickle")
    result = convert(source, tmp_path / "packed")
    assert not [name for name in files(tmp_path / "packed") if name.endswith((".py", ".pt"))]
    assert set(result.companions.left_out) == {"modeling_new.py", "scripts/", "optimizer.pt"}


def test_auto_map_never_points_to_files_that_are_not_there(source, tmp_path):
    """In any file; what points to the hub stays."""
    write(source / "modeling_new.py", "raise SystemExit")
    hub = {"AutoConfig": "organisation/model--configuration_new.NewConfig"}
    edit_config(source, auto_map=hub | {"AutoModelForCausalLM": "modeling_new.NewModel"})
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_new.NewTokenizer", None]}
    write(source / "tokenizer_config.json", tokenizer)
    result = convert(source, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["auto_map"] == hub
    copied = json.loads((tmp_path / "packed" / "tokenizer_config.json").read_text())
    assert copied == {key: value for key, value in tokenizer.items() if key != "auto_map"}
    line = "config.json (AutoModelForCausalLM), tokenizer_config.json (AutoTokenizer)"
    assert line in render(result)
    assert "--trust-remote-code" in render(result)


def test_of_two_formats_one_is_packed_and_the_other_named(source, tmp_path):
    """vLLM prefers Mistral's format wherever its files lie."""
    weights = load_file(source / "model.safetensors")
    save_file({"layers.0.attention.wq.weight": weights["lm_head.weight"]}, source / "other")
    (source / "other").rename(source / "consolidated.safetensors")
    write(source / "params.json", {"dim": 128})
    write(source / "tekken.json", {})
    result = convert(source, tmp_path / "packed")
    assert result.companions.left_out == ("consolidated.safetensors", "params.json")
    written = files(tmp_path / "packed")
    assert "tekken.json" in written
    assert not written & {"consolidated.safetensors", "params.json"}
    assert len(result.layers) == 14
    (source / "model.safetensors").unlink()
    refused(source, tmp_path / "x", "consolidated.safetensors, Mistral's own format")


def test_params_json_of_another_kind_is_kept(source, tmp_path):
    write(source / "params.json", {"dim": 128})
    convert(source, tmp_path / "packed")
    assert (tmp_path / "packed" / "params.json").exists()


def test_of_a_repository_of_the_hub_the_same_files_are_downloaded():
    """The hub's client filters by patterns; in folders only those with a number hold weights."""
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "LICENSE.txt",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "additional_chat_templates/tools.jinja",
    ]
    others = [
        "modeling_new.py",
        "scripts/run.py",
        "pytorch_model.bin",
        "2_Dense/pytorch_model.bin",
        "onnx/model.safetensors",
        "original/consolidated.00.safetensors",
        "consolidated.safetensors",
    ]
    found = filter_repo_objects(
        [*wanted, *others], allow_patterns=_HUB_FILES, ignore_patterns=_HUB_LEFT_OUT
    )
    assert list(found) == wanted
