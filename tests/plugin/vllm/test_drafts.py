"""Packed embeddings and output projections of models that a draft helps.

With greedy sampling a draft changes no token, whatever it proposes; a draft that computes what its
target does saves most of the steps.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.scheme import Scheme
from tests.support import swept_models
from tests.support.engine_core import generate, many_engines

pytestmark = pytest.mark.slow

BOTH = Scheme(embeddings=True, lm_head=True, activation_format="none")
AHEAD = 3
COUNT = 1 + 3 * (1 + AHEAD)


def converted(architecture, path, **overrides):
    source = swept_models.build(architecture, path / "source", **overrides)
    convert(source, path / "packed", BOTH)
    return path / "packed"


def eagle_head(target, path):
    """A head of one layer, whose embeddings and output projection are its target's."""
    path.mkdir()
    config = json.loads((target / "config.json").read_text()) | {"num_hidden_layers": 1}
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    source = load_file(target.parent / "source" / "model.safetensors")
    first, skipped = "model.layers.0.", "input_layernorm"
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in source.items()
        if name.startswith(first) and skipped not in name
    }
    torch.manual_seed(1)
    tensors["fc.weight"] = torch.randn(128, 256, dtype=torch.bfloat16) * 0.1
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def with_draft_layer(source):
    """The checkpoint with a third layer, for multi-token prediction."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    last, new = "model.layers.1.", "model.layers.2."
    tensors |= {
        name.replace(last, new): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    torch.manual_seed(1)
    tensors[f"{new}eh_proj.weight"] = torch.randn(128, 256, dtype=torch.bfloat16) * 0.1
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{new}{norm}.weight"] = torch.ones(128, dtype=torch.bfloat16)
    save_file(tensors, file, {"format": "pt"})


def draft(method, **options):
    return {"method": method, "num_speculative_tokens": AHEAD, **options}


def test_a_draft_of_its_own_and_heads(tmp_path):
    target = converted("LlamaForCausalLM", tmp_path)
    head = eagle_head(target, tmp_path / "head")
    convert(head, tmp_path / "packed_head", Scheme(activation_format="none"))
    with many_engines():
        alone = generate(target, COUNT)
        twin = generate(target, COUNT, speculative_config=draft("draft_model", model=str(target)))
        plain, packed = (
            generate(target, COUNT, speculative_config=draft("eagle", model=str(path)))
            for path in (head, tmp_path / "packed_head")
        )
    assert alone.tokens == twin.tokens == plain.tokens == packed.tokens
    assert alone.steps == COUNT
    assert twin.steps == 1 + 3  # the prompt's, and those with drafts
    assert twin.shared == []
    assert {"model.embed_tokens", "lm_head"} < set(twin.packed)
    for eagle in (plain, packed):
        assert eagle.shared == ["embed_tokens", "lm_head"]
    inside = [name for name in packed.packed if ".layers." in name]
    assert len(inside) == 4
    assert not any(".layers." in name for name in plain.packed)


@pytest.mark.parametrize("mode", ["packed", "online"])
def test_a_head_in_the_checkpoint_of_its_target(mode, tmp_path):
    source = swept_models.build("Glm4MoeForCausalLM", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (source / "config.json").write_text(json.dumps(config))
    with_draft_layer(source)
    options = {}
    if mode == "packed":
        convert(source, tmp_path / "packed", BOTH)
        source = tmp_path / "packed"
    else:
        text = json.dumps({"embeddings": True, "lm_head": True, "activation_format": "none"})
        options = {
            "quantization": "blockdialect",
            "hf_overrides": {"quantization_config_dict_json": text},
        }
    with many_engines():
        alone = generate(source, COUNT, **options)
        found = generate(source, COUNT, speculative_config=draft("mtp"), **options)
    assert found.tokens == alone.tokens
    assert found.shared == ["embed_tokens", "lm_head"]
    assert any("mtp_block" in name for name in found.packed) == (mode == "online")
