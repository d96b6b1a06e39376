"""vLLM's names of packed tensors, where a model's map has the weight's name in full."""

import pytest
import torch
from vllm.model_executor.models.utils import WeightsMapper

from dialect_plugin.vllm.renaming import following_weights, mapped
from tests.support.engines import STORED

IN_FULL = {".embed_tokens.weight": ".embedding.weight"}


def arriving(mapper, names):
    """The names that a model with this map makes of those of the checkpoint."""

    class Model(torch.nn.Module):
        hf_to_vllm_mapper = mapper

    found = following_weights(Model(), list)((name, torch.empty(0)) for name in names)
    return mapper.apply_list([name for name, _ in found])


@pytest.mark.parametrize(
    ("mapper", "layer", "expected"),
    [
        (WeightsMapper(orig_to_new_suffix=IN_FULL), "model.embed_tokens", "model.embedding"),
        (WeightsMapper(orig_to_new_suffix=IN_FULL), "model.layers.0.fc1", "model.layers.0.fc1"),
        (
            WeightsMapper(orig_to_new_suffix=IN_FULL, orig_to_new_substr={".self_attn.": ".attn."}),
            "model.layers.0.self_attn.o_proj",
            "model.layers.0.attn.o_proj",
        ),
        # a name that its own map would change a second time stays as it is
        (WeightsMapper(orig_to_new_prefix={"model.": "text.model."}), "model.fc", "text.model.fc"),
        (WeightsMapper(orig_to_new_prefix={"": "model."}), "fc", "model.fc"),
    ],
)
def test_packed_tensors_arrive_where_their_weight_does(mapper, layer, expected):
    assert mapped(mapper, layer) == expected
    names = ["weight", *STORED, "bias"]
    assert arriving(mapper, [f"{layer}.{name}" for name in names])[:-1] == [
        f"{expected}.{name}" for name in names[:-1]
    ]


def test_what_a_map_leaves_out_stays_out():
    mapper = WeightsMapper(orig_to_new_prefix={"mtp.": None})
    assert arriving(mapper, [f"mtp.fc.{name}" for name in STORED]) == []


def test_a_model_without_a_map_keeps_its_loader():
    own = object()
    assert following_weights(torch.nn.Module(), own) is own
