"""Dense architectures of the table beside those of test_served_architectures, served as W4A16.

Right is what vLLM without the plugin computes on a copy that holds the decoded weights.
"""

import pytest
import torch

from dialect_plugin.architectures import candidate_layers
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.reader import open_checkpoint
from tests.support.dense_models import CONFIGS, decoded_copy, make_dense_model
from tests.support.engines import engine, logprobs

METHOD = "blockdialect_w4a16"


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_converts_without_options(architecture, tmp_path):
    """The layers that the rule for names takes, which vLLM's plugin asks while loading."""
    source = make_dense_model(tmp_path / "source", architecture)
    result = convert(source, tmp_path / "packed")
    linear = open_checkpoint(source).linear_layers()
    assert list(result.choice.formats) == candidate_layers(linear)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_packed_is_right_and_online_is_packed(architecture, tmp_path):
    source = make_dense_model(tmp_path / "source", architecture)
    convert(source, tmp_path / "packed")
    with engine(decoded_copy(source, tmp_path / "packed", tmp_path / "right")) as llm:
        right = logprobs(llm)
    with engine(tmp_path / "packed", quantization=METHOD) as llm:
        packed = logprobs(llm)
    with engine(source, quantization=METHOD) as llm:
        online = logprobs(llm)
    # float32 sums in another order; roundings of the format are above 0.01
    torch.testing.assert_close(packed, right, rtol=0, atol=1e-4)
    assert torch.equal(online, packed)
