"""A conversion that is killed at any point continues, and ends with the same bytes."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.journal import FinishedShard, Journal, fingerprint, open_journal
from dialect_plugin.checkpoint.options import ConvertOptions
from dialect_plugin.checkpoint.reader import JOURNAL, CheckpointError, open_checkpoint, open_packed
from dialect_plugin.checkpoint.writer import exclusive
from dialect_plugin.scheme import Scheme
from tests.support.conversions import hashes

pytestmark = pytest.mark.slow

KILLS = 20


def convert_in_child(source, destination, started):
    os.environ["OMP_NUM_THREADS"] = "1"
    started.set()
    convert(source, destination, workers=1)


def test_killed_at_random_points(tiny_model, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dialect_plugin.checkpoint.convert"])
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
        with suppress(ProcessLookupError):  # it was done before
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


def test_a_failing_disk_leaves_nothing_that_looks_finished(tiny_model, tmp_path):
    source, destination = tiny_model(shard="200KB"), tmp_path / "packed"
    options = Scheme(ignore=["re:model.layers.1.mlp.*"])  # makes a late shard the largest
    convert(source, tmp_path / "whole", options)
    expected = hashes(tmp_path / "whole")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "whole").glob("*.safetensors"))]
    largest = max(sizes)
    before = sizes.index(largest)
    assert before > 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            convert(source, destination, options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (destination / "config.json").exists()
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        open_packed(destination)
    assert convert(source, destination, options).resumed == before
    assert hashes(destination) == expected


def test_a_shard_that_changed_is_written_again(tiny_model, tmp_path):
    """A shard of another size than the journal says is not trusted."""
    source, destination = tiny_model(shard="200KB"), tmp_path / "packed"
    convert(source, destination)
    expected = hashes(destination)
    checkpoint = open_checkpoint(source)
    journal = Journal(fingerprint=fingerprint(checkpoint, ConvertOptions()))
    for shard in checkpoint.shards:
        size = (destination / shard).stat().st_size
        journal.shards[shard] = FinishedShard(records=[], tensors={}, file_bytes=size)
    torn = destination / checkpoint.shards[1]
    torn.write_bytes(torn.read_bytes()[:-1])
    journal.write(destination)
    reopened = open_journal(destination, journal.fingerprint, overwrite=False)
    assert set(journal.shards) - set(reopened.shards) == {torn.name}
    (destination / JOURNAL).unlink()
    convert(source, destination, overwrite=True)
    assert hashes(destination) == expected


def hold_lock(directory, locked, release):
    with exclusive(directory):
        locked.set()
        release.wait()


def test_two_conversions_do_not_write_into_one_directory(tiny_model, tmp_path):
    destination = tmp_path / "packed"
    destination.mkdir()
    context = multiprocessing.get_context("forkserver")
    locked, release = context.Event(), context.Event()
    child = context.Process(target=hold_lock, args=(destination, locked, release))
    child.start()
    try:
        assert locked.wait(60)
        with pytest.raises(CheckpointError, match="another conversion is writing there"):
            convert(tiny_model(), destination)
        assert not list(destination.iterdir())
    finally:
        release.set()
        child.join()
    assert convert(tiny_model(), destination).layers


MEASURE = """
import sys
import torch
from dialect_plugin.checkpoint.convert import convert

convert(sys.argv[1], sys.argv[2])
with open("/proc/self/status") as status:  # getrusage's maximum begins with that of the parent
    (peak,) = [line.split()[1] for line in status if line.startswith("VmHWM")]
print(peak)
"""


def test_peak_memory(tiny_model, tmp_path):
    """Three shards of one large layer each: at most twice the largest and 1 GiB, all included.

    Quantizing takes several times a tensor's bytes, so a whole one at a time would not fit.
    """
    source, shard_bytes = tmp_path / "large", 128 << 20
    source.mkdir()
    small = tiny_model()
    for name in ("config.json", "tokenizer.json"):
        (source / name).write_bytes((small / name).read_bytes())
    weight = torch.randn(8192, 8192).to(torch.bfloat16)
    for i in range(3):
        layer = {f"model.layers.{i}.mlp.down_proj.weight": weight}
        save_file(layer, source / f"model-{i}.safetensors", {"format": "pt"})
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "packed")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1]) * 1024
    assert peak <= 2 * shard_bytes + (1 << 30)
