"""Layers that keep their weights decoded: whatever writes the packed ones, the others follow.

What a GPU would decode is decoded by plain torch here; everything else is vLLM's and the plugin's.
"""

from types import SimpleNamespace

import pytest
import torch

from dialect_kernels.backend import Decoded
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.scheme import SchemeError
from tests.support.engines import load_model
from tests.support.served_models import build, checkpoint_tensors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank")]

KEEP = {"additional_config": {"blockdialect": {"keep_decoded": True}}}
LAYERS = 2 * 4


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    return [build("LlamaForCausalLM", root / f"{seed}", seed=seed) for seed in (0, 1)]


@pytest.fixture
def decodes(monkeypatch):
    """Have layers decode on the CPU, into the same memory again."""
    from dialect_plugin.vllm import linear

    def decode_ahead(p, activation_format, dtype, into=None):
        new = Decoded(*p.to_e4m3())
        if into is None:
            return new
        for old, tensor in zip(into, new, strict=True):
            old.copy_(tensor)
        return into

    monkeypatch.setattr(linear, "decode_ahead", decode_ahead)


def decoded(model):
    """Each layer's decoded weight, after checking it against the packed one."""
    found = {}
    for name, layer in model.named_modules():
        if not hasattr(layer, "weight_packed"):
            continue
        want, scale = layer.quant_method._packed(layer).to_e4m3()
        assert torch.equal(layer.weight_decoded.view(torch.uint8), want.view(torch.uint8)), name
        assert torch.equal(layer.weight_decoded_scale, scale), name
        found[name] = layer.weight_decoded
    assert len(found) == LAYERS
    return found


@pytest.mark.parametrize("mode", ["packed", "online"])
def test_what_is_decoded_follows_what_is_packed(mode, sources, decodes, tmp_path):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import reload

    served, options = sources[0], {"quantization": "blockdialect"}
    if mode == "packed":
        served, options = tmp_path / "packed", {}
        convert(sources[0], served)
    model = load_model(served, **options, **KEEP)
    first = {name: weight.clone() for name, weight in decoded(model).items()}
    places = {name: weight.data_ptr() for name, weight in decoded(model).items()}
    buffers = dict(model.named_buffers())
    assert all(f"{name}.weight_decoded" in buffers for name in first), "a sleep saves buffers"
    assert not any("decoded" in name for name in model.state_dict()), "no part of a checkpoint"

    def changed():
        found = decoded(model)
        assert {name: weight.data_ptr() for name, weight in found.items()} == places
        return {name for name, weight in found.items() if not torch.equal(weight, first[name])}

    new, old = checkpoint_tensors(sources[1]), checkpoint_tensors(sources[0])
    model.load_weights(iter(new.items()))
    assert changed() == set(first)
    last = "model.layers.1.mlp.down_proj.weight"
    faulty = {name: value for name, value in old.items() if name != last}
    faulty[last] = old[last][:, :-1]
    with pytest.raises(ValueError, match="columns where the model"):
        model.load_weights(iter(faulty.items()))
    assert changed() == set(first)

    config = EngineArgs(str(served), skip_tokenizer_init=True, dtype="float32")
    for tensors, different in ((old, set()), (new, set(first))):
        reload.initialize_layerwise_reload(model)
        model.load_weights(iter(tensors.items()))
        reload.finalize_layerwise_reload(model, config.create_model_config())
        assert changed() == different
    reload.initialize_layerwise_reload(model)
    with pytest.raises(ValueError, match="columns where the model"):
        model.load_weights(iter(faulty.items()))
    assert changed() == set(first)


def test_a_cpu_keeps_nothing_and_says_so_once(sources, monkeypatch):
    from dialect_plugin.vllm import linear

    said = []
    monkeypatch.setattr(linear.logger, "info_once", said.append)
    model = load_model(sources[0], quantization="blockdialect", **KEEP)
    assert not any("decoded" in name for name, _ in model.named_buffers())
    assert said == [linear._NOT_DECODED] * LAYERS


def test_options_of_an_engine():
    from dialect_plugin.vllm.options import EngineOptions, engine_options

    def options(**given):
        return engine_options(SimpleNamespace(additional_config={"blockdialect": given}))

    assert engine_options(None) == options() == EngineOptions(keep_decoded=False)
    assert options(keep_decoded=True) == EngineOptions(keep_decoded=True)
    for wrong in (1, "true", None):
        with pytest.raises(SchemeError, match=r"keep_decoded of .*; allowed are False and True"):
            options(keep_decoded=wrong)
