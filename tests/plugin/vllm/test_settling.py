"""Layers whose names are known only when vLLM has built the whole model."""

import json

import pytest
import torch

from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.scheme import Scheme
from tests.support.engines import load_model, tensors_of
from tests.support.served_models import checkpoint_tensors
from tests.support.swept_models import build

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank")]

ARCHITECTURE = "MiniCPM3ForCausalLM"
UNNAMED = "model.layers.{}.self_attn.q_a_proj"  # vLLM builds it without a name


def online(source, **options):
    text = json.dumps(options)
    overrides = {"quantization_config_dict_json": text}
    return load_model(source, quantization="blockdialect", hf_overrides=overrides)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_options_of_a_layer_without_a_name(tmp_path):
    source = build(ARCHITECTURE, tmp_path / "source")
    fused_elsewhere = "model.layers.{}.self_attn.kv_a_proj_with_mqa"  # so treated alike
    options = {
        "ignore": [UNNAMED.format(0), fused_elsewhere.format(0)],
        "overrides": {
            UNNAMED.format(1): {"block_size": 16},
            fused_elsewhere.format(1): {"block_size": 16},
        },
    }
    convert(source, tmp_path / "packed", Scheme.parse(options))
    packed = tensors_of(load_model(tmp_path / "packed"))
    assert_equal(packed, tensors_of(online(source, **options)))
    assert f"{UNNAMED.format(0)}.weight" in packed
    assert packed[f"{UNNAMED.format(1)}.weight_meta"].shape == (64, 128 // 16)
    assert packed["model.layers.1.self_attn.q_b_proj.weight_meta"].shape[1] == 64 // 32


def test_an_unknown_name_is_still_refused(tmp_path):
    source = build(ARCHITECTURE, tmp_path / "source")
    with pytest.raises(
        ValueError, match=r"'self_attn\.q_a_proj' in ignore or overrides is no layer"
    ):
        online(source, ignore=["self_attn.q_a_proj"])


@pytest.mark.parametrize("mode", ["packed", "online"])
def test_a_layer_without_a_name_is_reloaded(mode, tmp_path):
    """vLLM makes the parameters of a reload from what it has noted when it built the model."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import reload

    source = build(ARCHITECTURE, tmp_path / "source")
    convert(source, tmp_path / "packed")
    served = tmp_path / "packed" if mode == "packed" else source
    model = online(source) if mode == "online" else load_model(served)
    new = {
        name: value + 0.125 if value.dim() > 1 else value
        for name, value in checkpoint_tensors(source).items()
    }
    config = EngineArgs(
        str(served), skip_tokenizer_init=True, dtype="float32"
    ).create_model_config()
    reload.initialize_layerwise_reload(model)
    model.load_weights(iter(new.items()))
    reload.finalize_layerwise_reload(model, config)
    found = tensors_of(model)

    from safetensors.torch import save_file

    save_file(new, source / "model.safetensors", metadata={"format": "pt"})
    assert_equal(found, tensors_of(online(source)))


def test_the_saved_state_of_layers_without_a_name(tmp_path):
    from vllm.model_executor.model_loader import ShardedStateLoader

    source = build(ARCHITECTURE, tmp_path / "source")
    model = load_model(source, quantization="blockdialect")
    state = tmp_path / "state"
    state.mkdir()
    ShardedStateLoader.save_model(model, str(state))
    (state / "config.json").write_text((source / "config.json").read_text())
    found = load_model(state, quantization="blockdialect", load_format="sharded_state")
    assert_equal(tensors_of(found), tensors_of(model))
    assert f"{UNNAMED.format(0)}.weight_packed" in tensors_of(found)
