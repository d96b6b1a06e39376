"""Fresh memory is poisoned for every test here."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh tensors hold NaN, or bytes of NaN, so that an element that is not written shows."""
    allocate = torch.empty

    def poisoned(*size, **options):
        fresh = allocate(*size, **options)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else 0x7F)

    monkeypatch.setattr(torch, "empty", poisoned)
