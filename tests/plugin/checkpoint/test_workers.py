"""Sharing work: results in order, faults at their place, torch's threads given back."""

import threading

import pytest
import torch

from dialect_plugin.checkpoint.workers import Workers


@pytest.mark.parametrize("count", [1, 2, 7])
def test_results_come_in_order_and_few_items_are_held(count):
    drawn, taken, most = 0, 0, 0

    def items():
        nonlocal drawn
        for i in range(100):
            drawn += 1
            yield i

    with Workers(count) as workers:
        for i, result in enumerate(workers.map(lambda x: x * x, items())):
            most = max(most, drawn - taken)
            taken += 1
            assert result == i * i
    assert taken == 100
    assert most <= count + 2


def test_a_fault_reaches_the_caller_and_torch_keeps_its_threads():
    before = torch.get_num_threads()
    running = threading.active_count()

    def fail_at_three(x):
        assert torch.get_num_threads() == 1
        if x == 3:
            raise ValueError("three")
        return x

    seen = []
    with pytest.raises(ValueError, match="three"), Workers(2) as workers:
        seen.extend(workers.map(fail_at_three, range(1000)))
    assert torch.get_num_threads() == before
    assert threading.active_count() == running
