"""Old weights after a push that fails, however the model has overwritten them."""

import pytest
import torch

from dialect_plugin.vllm.undo import keeping_pushed


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 4)
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.arange(6.0).reshape(2, 3))


def copy(model):
    model.inner.weight.data.copy_(torch.zeros(4, 3))


def copy_a_part(model):
    model.inner.weight.data[1:3].narrow(1, 0, 2).copy_(torch.zeros(2, 2))


def write_by_index(model):
    model.mean[torch.tensor([1])] = -1.0


def write_an_output(model):
    torch.add(model.mean, 1, out=model.mean)


def add_in_a_list(model):
    torch._foreach_add_([model.scale.data, model.mean], 1.0)


def other_memory(model):
    model.scale.data = torch.zeros(3)


def other_parameter(model):
    model.inner.weight = torch.nn.Parameter(torch.zeros(4, 3))


def push(model, write, error=None):
    with keeping_pushed(model):
        write(model)
        if error is not None:
            raise error


@pytest.mark.parametrize(
    "write",
    [
        copy,
        copy_a_part,
        write_by_index,
        write_an_output,
        add_in_a_list,
        other_memory,
        other_parameter,
    ],
)
def test_every_way_of_writing_is_undone(write):
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="a tensor is missing"):
            push(model, write, RuntimeError("a tensor is missing"))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
            assert value.data_ptr() == places[name], name
        push(model, write)
    assert any(not torch.equal(v, before[n]) for n, v in model.state_dict().items())
