"""Every decoder that transformers builds and vLLM serves on a CPU: converted, packed, online.

Right is what vLLM without the plugin computes on a copy of the checkpoint whose packed layers hold
the decoded weights. All of it is W4A16 in float32: roundings of activations would hide the rest.
"""

import pytest
import torch

from dialect_plugin.architectures import ARCHITECTURES, candidate_layers
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.reader import open_checkpoint, open_packed
from tests.support.engine_core import many_engines, serve, text_models
from tests.support.support_table import entry, recorded
from tests.support.swept_models import CONFIGS, OPTIONS, UNSERVED, build, decoded_copy

pytestmark = pytest.mark.slow
METHOD = "blockdialect_w4a16"


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    with many_engines():
        yield


def test_nothing_is_left_out():
    """Each text model of this vLLM whose class transformers has is swept, or has a reason."""
    assert text_models() <= CONFIGS.keys() | UNSERVED.keys()
    assert not CONFIGS.keys() & UNSERVED.keys()
    assert set(ARCHITECTURES) <= CONFIGS.keys() | UNSERVED.keys()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_packed_is_right_and_online_is_packed(architecture, tmp_path):
    source = build(architecture, tmp_path / "source")
    convert(source, tmp_path / "packed")
    stored = open_packed(tmp_path / "packed")
    assert sorted(stored) == sorted(candidate_layers(open_checkpoint(source).linear_layers()))
    assert entry(source, stored) == recorded()[architecture]

    options = OPTIONS.get(architecture, {})
    right = serve(decoded_copy(source, tmp_path / "packed", tmp_path / "right"), **options)
    packed = serve(tmp_path / "packed", METHOD, **options)
    online = serve(source, METHOD, **options)

    assert not right.packed
    assert packed.packed == online.packed
    assert sum(packed.packed.values()) == sum(2 * p.codes.numel() for p in stored.values())
    # float32 sums in another order; roundings of the format are above 0.01
    torch.testing.assert_close(packed.output, right.output, rtol=0, atol=1e-4)
    assert torch.equal(online.output, packed.output)
