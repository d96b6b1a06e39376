"""Fresh memory is poisoned for every test here, and the interpreter does its work once."""

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


@pytest.fixture(autouse=True, scope="session")
def language_is_patched_once_a_launch():
    """Spare Triton a search that finds nothing and took half of the time of these tests.

    A launch replaces the built-in functions of `triton.language` by interpreted ones and puts them
    back at its end. Triton 3.6 and 3.7 look for them again in each call of a device function,
    `tl.max` among them. Goes away with that search.
    """
    from triton import language
    from triton.runtime import interpreter

    search = interpreter._patch_lang

    def search_if_needed(function):
        builtin = (language.load, language.core.load, language.tensor.__add__)
        if any(map(language.core.is_builtin, builtin)):
            return search(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = search_if_needed
    yield
    interpreter._patch_lang = search
