"""Freed memory goes back to the system."""

import subprocess
import sys

import pytest

from dialect_plugin.vllm import heap

GAPS = """
import psutil, torch
from dialect_plugin.vllm.heap import trim

blocks = [torch.ones(25_000) for _ in range(2000)]  # 100 kB each: from the heap
kept = blocks[::20]
del blocks
before = psutil.Process().memory_info().rss
trim()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(heap._malloc_trim() is None, reason="the C library has no malloc_trim")
def test_gaps_between_blocks_in_use_are_given_back():
    done = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100e6, "of 190 MB that were freed"


def test_another_c_library(monkeypatch):
    heap._malloc_trim.cache_clear()
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    heap.trim()
    heap._malloc_trim.cache_clear()
