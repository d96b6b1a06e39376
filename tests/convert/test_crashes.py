"""A conversion that is killed at any point continues, and ends with the same bytes."""

import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from dialect_plugin.checkpoint import open_packed
from dialect_plugin.convert import JOURNAL, convert

pytestmark = pytest.mark.slow

KILLS = 20


def hashes(path):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}


def convert_in_child(source, destination, started):
    os.environ["OMP_NUM_THREADS"] = "1"
    started.set()
    convert(source, destination, workers=1)


def test_killed_at_random_points(tiny_model, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dialect_plugin.convert"])
    source = tiny_model(hidden_size=256, intermediate_size=1024, shard="300KB")

    def start(destination):
        started = context.Event()
        child = context.Process(target=convert_in_child, args=(source, destination, started))
        child.start()
        started.wait()
        return child, time.monotonic()

    child, began = start(tmp_path / "whole")
    child.join()
    assert child.exitcode == 0
    duration = time.monotonic() - began
    expected = hashes(tmp_path / "whole")

    draw, unfinished, resumed = random.Random(0), 0, 0
    for i in range(KILLS):
        destination = tmp_path / f"killed-{i}"
        child, began = start(destination)
        time.sleep(draw.random() * duration)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        if not (destination / "config.json").exists():
            unfinished += 1
        if child.exitcode == 0:
            continue  # it was done before it could be killed
        finished = destination.exists() and hashes(destination) == expected
        if not finished:
            resumed += convert(source, destination).resumed > 0
        assert hashes(destination) == expected
    assert unfinished >= KILLS // 2, "too few kills hit a conversion that was under way"
    assert resumed, "no kill left a shard to continue from"


def test_a_failing_disk_leaves_nothing_that_looks_finished(tiny_model, tmp_path, monkeypatch):
    source, destination = tiny_model(shard="200KB"), tmp_path / "packed"
    calls = []

    def fail_at_the_third(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return save_file(*arguments, **keywords)

    monkeypatch.setattr("dialect_plugin.convert.save_file", fail_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        convert(source, destination)
    assert not (destination / "config.json").exists()
    assert (destination / JOURNAL).exists()
    monkeypatch.undo()
    assert convert(source, destination).resumed == 2
    assert not (destination / JOURNAL).exists()
    assert open_packed(destination).layers


MEASURE = """
import resource, sys
import torch
from dialect_plugin.convert import convert

convert(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_peak_memory(tiny_model, tmp_path):
    """Four shards of 256 MiB: at most twice the largest shard and 1 GiB, the program included.

    One of four tensors is quantized, to be quick; the others have names that stay in 16 bit.
    """
    source, shard_bytes = tmp_path / "large", 256 << 20
    source.mkdir()
    small = tiny_model()
    for name in ("config.json", "tokenizer.json"):
        (source / name).write_bytes((small / name).read_bytes())
    weight = torch.randn(4096, 8192).to(torch.bfloat16)
    for i in range(4):
        names = ("mlp.up_proj", "mlp.other_1", "mlp.other_2", "mlp.other_3")
        layers = {f"model.layers.{i}.{name}.weight": weight.clone() for name in names}
        save_file(layers, source / f"model-{i}.safetensors", {"format": "pt"})
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "packed")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1]) * 1024
    assert peak <= 2 * shard_bytes + (1 << 30)
