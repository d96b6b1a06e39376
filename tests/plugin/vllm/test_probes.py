"""What probes tell about a loader: rows in another order are followed, all else is refused."""

import pytest
import torch

from dialect_plugin.vllm.errors import LoadError
from dialect_plugin.vllm.probes import WEIGHT, Recorder

LAYER = "model.layers.0.self_attn.q_proj"
SHAPES = {WEIGHT: (8, 32), "weight_packed": (8, 16), "weight_row_exponent": (8,)}
PERMUTED = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


def arrive(loaders):
    """Orders that a load finds in which `loaders` change the tensors of `LAYER` on their way."""
    recorder, orders = Recorder(), {}
    with recorder:
        for layer in ("another.layer", LAYER):
            for field, shape in SHAPES.items():
                probe = recorder.probe(layer, field, shape)
                if layer == LAYER:
                    probe = loaders.get(field, lambda tensor: tensor)(probe)
                    assert recorder.record(probe, field, "qkv_proj", ("q",), orders)
            recorder.check_layer(layer)
    return orders


def permute(tensor):
    return tensor[PERMUTED]


def test_rows_in_another_order_are_followed():
    orders = arrive({WEIGHT: permute, "weight_packed": permute})
    assert orders.keys() == {("weight_row_exponent", ("q",))}
    stored = torch.arange(100, 108, dtype=torch.int8)
    [order] = orders.values()
    assert torch.equal(stored[order], stored[PERMUTED])


def test_an_order_that_only_a_packed_tensor_gets_is_taken_back():
    orders = arrive({"weight_packed": permute})
    codes = torch.arange(8)
    assert torch.equal(permute(codes)[orders["weight_packed", ("q",)]], codes)


def test_rows_that_stand_twice_are_followed():
    """A head of keys that is repeated for every head of queries."""
    orders = arrive({field: lambda t: t[:4].repeat_interleave(2, 0) for field in SHAPES})
    assert orders == {}
    orders = arrive(
        {WEIGHT: lambda t: t[:4].repeat_interleave(2, 0)}
        | dict.fromkeys(["weight_packed", "weight_row_exponent"], lambda t: torch.cat([t[:4]] * 2))
    )
    arrived = torch.cat([torch.arange(4)] * 2)
    for order in orders.values():
        assert torch.equal(arrived[order], torch.arange(4).repeat_interleave(2))
    assert len(orders) == 2


@pytest.mark.parametrize(
    "loader",
    [
        lambda t: t.T,
        lambda t: t[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))],
        lambda t: t[:4],
        lambda t: t[:, 16:],
        lambda t: torch.cat([t[:7], t[:1]]),
        lambda t: t.reshape(16, 16),
        lambda t: t.flatten(),
    ],
)
def test_what_packed_tensors_cannot_follow_is_refused(loader):
    with pytest.raises(LoadError, match=f"^{LAYER}: vLLM's loader of this model rearranges"):
        arrive({WEIGHT: loader})
