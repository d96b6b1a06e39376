"""vLLM loads what save_pretrained of transformers wrote: the same tensors as from the original."""

import pytest
import torch
import transformers

import dialect_plugin.transformers  # noqa: F401 - adds the method to transformers' tables
from dialect_plugin.checkpoint.convert import convert
from tests.support.conversions import options_of
from tests.support.engines import load_model
from tests.support.served_models import build


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_the_same_model_is_loaded(architecture, one_rank, tmp_path):
    source, packed, saved = (tmp_path / name for name in ("source", "packed", "saved"))
    build(architecture, source)
    down = {"re:.*down_proj": {"rotation": "none", "activation_format": "fp8"}}
    options = options_of(book="semantic_32", rotation="hadamard_32", overrides=down)
    convert(source, packed, options)
    model = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype="auto")
    model.save_pretrained(saved)
    expected = load_model(packed).state_dict()
    found = load_model(saved).state_dict()
    assert found.keys() == expected.keys()
    assert any(name.endswith("qkv_proj.weight_packed") for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
