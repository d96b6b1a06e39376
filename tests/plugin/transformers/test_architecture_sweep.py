"""Every architecture of the table: packed, loaded by transformers' own class, and saved again."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dialect_plugin import open_packed
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.reader import CheckpointError
from dialect_plugin.scheme import Scheme
from dialect_plugin.transformers import DialectExperts, DialectLinear
from tests.support.swept_models import CONFIGS, build, decoded_copy

pytestmark = pytest.mark.slow

TOKENS = torch.tensor([[1, 17, 300, 42, 99, 8, 8, 123, 77, 250, 3]])
REFUSED = {
    "HrmTextForCausalLM": "has a layer of other parts in its place",
    "Zamba2ForCausalLM": "has a layer that shares its weight with another in its place",
}
"""Architecture -> why transformers cannot have its packed layers."""


def answer(model):
    with torch.no_grad():
        output = model(input_ids=TOKENS)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def tensors_of(path):
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def scheme_of(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_packed_model_is_the_decoded_one_and_is_saved_as_it_was(architecture, tmp_path):
    source, packed = build(architecture, tmp_path / "source"), tmp_path / "packed"
    # in W4A16 nothing but the order of additions differs from a product with decoded weights
    scheme = Scheme(activation_format="none")
    convert(source, packed, scheme)
    model_class = getattr(transformers, architecture)
    if architecture in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[architecture]):
            model_class.from_pretrained(packed)
        return
    loaded = model_class.from_pretrained(packed, dtype=torch.float32)
    layers = [m for m in loaded.modules() if isinstance(m, DialectLinear)]
    mixtures = [m for m in loaded.modules() if isinstance(m, DialectExperts)]
    matrices = [m.num_experts * (3 if hasattr(m, "gate_up_proj") else 2) for m in mixtures]
    assert len(layers) + sum(matrices) == len(open_packed(packed)) > 0
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} == {torch.float32}
    decoded = decoded_copy(source, packed, tmp_path / "decoded")
    expected = answer(model_class.from_pretrained(decoded, dtype=torch.float32))
    torch.testing.assert_close(answer(loaded), expected, rtol=0, atol=1e-4)
    saved = tmp_path / "saved"
    model_class.from_pretrained(packed, dtype="auto").save_pretrained(saved)
    found, wanted = tensors_of(saved), tensors_of(packed)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():  # transformers keeps some in float32
        assert torch.equal(found[name].float(), tensor.float()), name
    assert scheme_of(saved) == scheme_of(packed)
    assert len(open_packed(saved)) == len(open_packed(packed))
