"""Full and read-only disks, and sources that change: one sentence, and nothing is lost."""

import ctypes
import multiprocessing
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import CheckpointError, open_packed
from dialect_plugin.checkpoint.writer import is_temporary
from tests.support.conversions import hashes


class _AfterTheCheck(Silent):
    """Does something when the weights have been checked and before they are quantized."""

    def __init__(self, act):
        self.act = act

    def begin(self, what, tensors, nbytes):
        if what == "quantizing":
            self.act()


def convert_with_limit(limit, source, destination, connection):
    """Convert where no file may become larger than `limit`; send the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        convert(source, destination, workers=1)
        connection.send("")
    except OSError as error:
        connection.send(str(error))


def in_child(target, *arguments):
    """What a function sends from another process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dialect_plugin.checkpoint.convert"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=target, args=(*arguments, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        child.join()


@pytest.mark.slow
def test_a_full_disk(tiny_model, tmp_path):
    """At any point: the sentence names the file, no partial file takes room, a rerun continues."""
    source = tiny_model(shard="200KB")
    convert(source, tmp_path / "whole")
    expected = hashes(tmp_path / "whole")
    sizes = sorted({path.stat().st_size for path in (tmp_path / "whole").iterdir()})
    seen = set()
    for limit in [0, *(size - 1 for size in sizes[::4])]:
        destination = tmp_path / str(limit)
        sentence = in_child(convert_with_limit, limit, source, destination)
        assert "cannot be written (File too large); free some space or choose" in sentence
        assert "\n" not in sentence
        assert not (destination / "config.json").exists()
        assert not [path for path in destination.iterdir() if is_temporary(path)]
        seen.add(Path(sentence.partition(":")[0]).name)
        convert(source, destination)
        assert hashes(destination) == expected
    assert len(seen) > 1


def convert_without_privileges(source, destination, connection):
    """Convert where a directory's mode counts, for root too; send the error."""
    if os.getuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0
    try:
        convert(source, destination, workers=1)
        connection.send("")
    except OSError as error:
        connection.send(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("exists", [True, False])
def test_a_target_that_may_not_be_written(tiny_model, tmp_path, exists):
    parent = tmp_path / "parent"
    (parent / "packed").mkdir(parents=True)
    (parent / "packed").chmod(0o555)
    parent.chmod(0o555)
    destination = parent / ("packed" if exists else "other")
    sentence = in_child(convert_without_privileges, tiny_model(), destination)
    assert "cannot be written (Permission denied); free some space or choose" in sentence
    assert str(destination) in sentence
    assert sorted(path.name for path in parent.iterdir()) == ["packed"]
    assert not list((parent / "packed").iterdir())
    parent.chmod(0o755)
    (parent / "packed").chmod(0o755)
    assert convert(tiny_model(), destination).layers


def change_a_weight(path):
    """Another weight of the same size, under the same header."""
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = -tensors[name]
    save_file(tensors, path, {"format": "pt"})


def exchange_two_names(path):
    """The same bytes under exchanged names: what was read from there is another tensor's."""
    tensors = load_file(path)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    first, second = (tensors[name] for name in names)
    tensors |= dict(zip(names, (second, first), strict=True))
    save_file(tensors, path, {"format": "pt"})


def cut(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def add_a_tensor(path):
    save_file({"more": torch.zeros(1)}, path.with_name("more.safetensors"), {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (change_a_weight, "changed while it was converted; leave the source alone"),
        (exchange_two_names, "changed while it was converted; leave the source alone"),
        (add_a_tensor, "changed while it was converted; leave the source alone"),
        (cut, "became shorter while it was read; leave the source alone"),
        (Path.unlink, "cannot be read any more .*; leave the source alone"),
    ],
)
def test_a_source_that_changes_is_never_half_converted(source, tmp_path, change, sentence):
    """config.json is not written, and --overwrite converts what the source is by then."""
    whole, destination = source / "model.safetensors", tmp_path / "packed"
    original = whole.read_bytes()
    act = _AfterTheCheck(lambda: change(whole))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        convert(source, destination, progress=act)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        open_packed(destination)
    (source / "more.safetensors").unlink(missing_ok=True)
    whole.write_bytes(original)
    convert(source, destination, overwrite=True)
    convert(source, tmp_path / "again")
    assert hashes(destination) == hashes(tmp_path / "again")


def test_a_shard_that_goes_missing(tiny_model, tmp_path):
    """The rerun continues once the shard is there again, unchanged."""
    source = Path(shutil.copytree(tiny_model(shard="200KB"), tmp_path / "source"))
    shard = sorted(source.glob("*.safetensors"))[-1]
    away = tmp_path / shard.name
    act = _AfterTheCheck(lambda: shard.rename(away))
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        convert(source, tmp_path / "packed", progress=act)
    with pytest.raises(CheckpointError, match="is missing; download the model again"):
        convert(source, tmp_path / "packed")
    away.rename(shard)
    assert convert(source, tmp_path / "packed").resumed
    convert(source, tmp_path / "again")
    assert hashes(tmp_path / "packed") == hashes(tmp_path / "again")
