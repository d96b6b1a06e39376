"""W4A4 models in vLLM's engine, packed and online, against transformers.

One with bias, one with fused projections, one with experts; the sweep has the other architectures.

The packed bytes must be those of quantizing the checkpoint's weights; the log-probabilities those
of transformers' model with decoded weights and rounded inputs, and those of the packed checkpoint
in transformers. The tolerance is for the order of
float32 additions in what is not quantized (norms, attention, output projection), 1e-6
here; the formats differ from each other by more than 0.05 (test_engine).
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

import dialect_plugin.transformers  # noqa: F401 (it registers itself)
from dialect_plugin.checkpoint.convert import convert
from tests.support.engines import (
    STORED,
    engine,
    expected_bytes,
    expected_experts,
    logprobs,
    packed_experts,
    packed_modules,
    parameters,
)
from tests.support.served_models import (
    PROMPT,
    VOCABULARY,
    build,
    checkpoint_tensors,
    expected_logprobs,
    is_quantized,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "OPTForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM"],
)
def test_packed_and_online(architecture, tmp_path):
    source = build(architecture, tmp_path / "source")
    convert(source, tmp_path / "packed")
    with engine(tmp_path / "packed") as llm:
        packed, packed_logprobs = parameters(llm), logprobs(llm)
    with engine(source, quantization="blockdialect") as llm:
        online, online_logprobs = parameters(llm), logprobs(llm)

    weights = checkpoint_tensors(source)
    names = {name for name in weights if is_quantized(architecture, name)}
    assert names
    expected = {}
    for module in packed_modules(packed):
        expected |= expected_bytes(weights, module)
    for module in packed_experts(packed):
        expected |= expected_experts(weights, module)
    stored = [name for name in packed if name.endswith(STORED)]
    assert sorted(stored) == sorted(expected)
    quantized = sum(weights[name].numel() for name in names)
    assert sum(packed[name].numel() for name in stored if name.endswith("packed")) == quantized / 2
    for name in stored:
        assert torch.equal(packed[name], expected[name]), name

    assert packed.keys() == online.keys()
    for name, value in packed.items():
        assert torch.equal(online[name], value), name
    assert torch.equal(packed_logprobs, online_logprobs)

    oracle = expected_logprobs(source, architecture)[:-1]
    torch.testing.assert_close(packed_logprobs, oracle, rtol=1e-4, atol=1e-3)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = loaded(torch.tensor([PROMPT])).logits[0, :-1, :VOCABULARY]
    in_transformers = logits.log_softmax(-1)
    torch.testing.assert_close(packed_logprobs, in_transformers, rtol=1e-4, atol=1e-3)
