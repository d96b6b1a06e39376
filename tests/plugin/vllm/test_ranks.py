"""What the second of two ranks holds of packed layers, compared with vLLM's share of the weights.

It does not compute here, so that no first rank is needed.
"""

import pytest
import torch

from dialect_kernels import SEMANTIC_32, PackedTensor, quantize
from dialect_plugin.checkpoint.convert import convert
from tests.support.engines import STORED, load_model, packed_modules, tensors_of
from tests.support.served_models import checkpoint_tensors
from tests.support.swept_models import OPTIONS, build, decoded_copy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank", "_second_rank")]


@pytest.fixture
def _second_rank(monkeypatch):
    from vllm.distributed import get_tp_group
    from vllm.model_executor.models.transformers.base import Base

    group = get_tp_group()
    # it changes transformers' own class, which then cannot be built outside of vLLM
    monkeypatch.setattr(Base, "_decorate_for_torch_compile", lambda self: None)
    monkeypatch.setattr(group, "world_size", 2)
    monkeypatch.setattr(group, "rank_in_group", 1)


def shares(path, architecture, monkeypatch):
    """vLLM's share of every parameter, before it prepares weights for its own kernels."""
    from vllm.model_executor.model_loader import base_loader

    with monkeypatch.context() as patch:
        patch.setattr(base_loader, "process_weights_after_loading", lambda *_: None)
        model = load_model(path, **OPTIONS.get(architecture, {}))
    return tensors_of(model)


def packed_at(found, module):
    codes, meta, row_exponent = (found[f"{module}.{name}"] for name in STORED)
    shape = (codes.shape[0], codes.shape[1] * 2)
    block_size = shape[1] // meta.shape[1]
    return PackedTensor(codes, meta, row_exponent, shape, SEMANTIC_32, block_size)


@pytest.mark.parametrize(
    "architecture",
    [
        "Phi3ForCausalLM",  # fused in the checkpoint
        "GPTBigCodeForCausalLM",  # one head of keys, which both ranks have
        "DeepseekV2ForCausalLM",
        "Mamba2ForCausalLM",  # one group, which both ranks have, by a loader of the model's own
        "FalconH1ForCausalLM",
    ],
)
def test_a_rank_has_its_share(architecture, tmp_path, monkeypatch):
    source = build(architecture, tmp_path / "source")
    convert(source, tmp_path / "packed")
    right = decoded_copy(source, tmp_path / "packed", tmp_path / "right")
    decoded, plain = (shares(path, architecture, monkeypatch) for path in (right, source))
    options = OPTIONS.get(architecture, {})
    packed = tensors_of(load_model(tmp_path / "packed", **options))
    online = tensors_of(load_model(source, quantization="blockdialect", **options))
    modules = packed_modules(packed)
    assert modules
    assert modules == packed_modules(online)
    for module in modules:
        weight = f"{module}.weight"
        assert torch.equal(packed_at(packed, module).dequantize(), decoded[weight]), module
        found = packed_at(online, module)
        expected = quantize(plain[weight], SEMANTIC_32, block_size=found.block_size)
        assert torch.equal(found.codes, expected.codes), module
        assert torch.equal(found.meta, expected.meta), module
        assert torch.equal(found.row_exponent, expected.row_exponent), module


@pytest.mark.parametrize("quantization", [None, "blockdialect"])
@pytest.mark.parametrize("leaf", ["k_proj", "up_proj", "down_proj"])
def test_rows_that_the_model_does_not_have(leaf, quantization, tmp_path):
    """vLLM's loaders cut a rank's rows out of a tensor that is too high."""
    from safetensors.torch import save_file

    source = build("LlamaForCausalLM", tmp_path / "source")
    convert(source, tmp_path / "packed")
    origin = source if quantization else tmp_path / "packed"
    tensors = checkpoint_tensors(origin)
    for name, value in tensors.items():
        if name.startswith("model.layers.0.") and f".{leaf}." in name:
            tensors[name] = torch.cat([value, value])
    for file in origin.glob("*.safetensors"):
        file.unlink()
    (origin / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, origin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="rows where the model needs"):
        load_model(origin, quantization=quantization)
