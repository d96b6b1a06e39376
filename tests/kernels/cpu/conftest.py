"""What the tests of the CPU kernel share."""

import pytest
import torch


@pytest.fixture
def poisoned_outputs():
    """Fresh tensors hold NaN or the largest integer, so that an element left out shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
