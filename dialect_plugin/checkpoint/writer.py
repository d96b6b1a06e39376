"""Writing a checkpoint's files so that each is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .reader import CheckpointError

__all__ = [
    "ShardWriter",
    "StoredTensor",
    "check_destination",
    "check_disk_space",
    "exclusive",
    "is_temporary",
    "make_directory",
    "remove_temporary",
    "sync_directory",
    "write_file",
    "write_text",
]

_TEMPORARY = ".blockdialect-tmp"
_HEADER_ALIGNMENT = 8


class StoredTensor(NamedTuple):
    """A tensor's entry in the header of a safetensors file.

    Attributes:
        dtype: safetensors' name of the dtype, e.g. ``"BF16"``.
        shape: its dimensions.
        nbytes: its size in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class ShardWriter:
    """Writes a safetensors file tensor by tensor, without holding any of them whole.

    The safetensors library writes a dict of whole tensors; a shard of one large tensor would then
    need its size several times over. The layout is the library's: an 8-byte header length, the
    JSON header padded with spaces, the data without holes, wide dtypes first.

    Args:
        file: the file, open for writing.
        tensors: name -> header entry of every tensor that will be written.
    """

    def __init__(self, file: BinaryIO, tensors: Mapping[str, StoredTensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._file = file
        self._spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name, tensor in sorted(tensors.items(), key=_by_width):
            begin, end = end, end + tensor.nbytes
            offsets = [begin, end]
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
            self._spans[name] = (begin, end)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        file.write(len(text).to_bytes(8, "little") + text)
        self._data = 8 + len(text)

    def append(self, name: str, data: bytes | memoryview) -> None:
        """Write the next bytes of the tensor `name`."""
        begin, end = self._spans[name]
        if begin + len(data) > end:
            raise ValueError(f"{name}: got more bytes than its shape and dtype take")
        self._file.seek(self._data + begin)
        self._file.write(data)
        self._spans[name] = (begin + len(data), end)

    def finish(self) -> None:
        """Raise ValueError if a tensor is not complete."""
        for name, (begin, end) in self._spans.items():
            if begin != end:
                raise ValueError(f"{name}: {end - begin} of its bytes were not written")


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is there whole or not at all, even after a power failure.

    Args:
        path: the file.
        write: function that writes the contents to a path, a temporary one in the same directory.

    Raises:
        OSError: one sentence, if the disk is full or cannot be written; the temporary file is gone.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors creates files that only their owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # on a full disk it would be in the way of others
        if isinstance(error, OSError):
            raise _not_written(path, error) from error
        raise


def make_directory(path: Path) -> None:
    """Make a directory, with those above it, where it is not there yet.

    Raises:
        OSError: one sentence, if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> OSError:
    return OSError(
        f"{path}: cannot be written ({error.strerror or error}); free some space or choose another "
        "directory, and run the same command again"
    )


def write_text(path: Path, text: str) -> None:
    """:func:`write_file` with UTF-8 text."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sync_directory(path: Path) -> None:
    """Flush the directory's entries to disk."""
    if os.name == "nt":
        return  # Windows cannot open directories
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Keep other conversions from writing into `directory`; a killed one leaves no lock behind.

    Raises:
        CheckpointError: if another process is writing there.
    """
    if os.name == "nt":
        yield  # Windows has no such lock: users must not start two conversions into one directory
        return
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{directory}: another conversion is writing there; wait for it, or choose "
                "another directory"
            ) from None
        yield
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether this is an unfinished file of a killed run."""
    return path.name.endswith(_TEMPORARY)


def remove_temporary(directory: Path) -> None:
    """Delete the unfinished files of killed runs in `directory`."""
    for path in list(directory.rglob("*")):
        if is_temporary(path):
            path.unlink()


def check_destination(source: Path, destination: Path) -> None:
    """Raise CheckpointError if `destination` is a file, or is or overlaps the source."""
    inside, outside = destination.resolve(), source.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise CheckpointError(
            f"{destination}: is the source or overlaps it; choose another directory"
        )
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file; choose a directory")


def check_disk_space(destination: Path, needed: int) -> None:
    """Raise CheckpointError if less than `needed` bytes are free where `destination` will be."""
    existing = next(p for p in (destination, *destination.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"{destination}: {free / 2**30:.1f} GiB are free, but the new checkpoint takes "
            f"{needed / 2**30:.1f} GiB; free some space or choose another disk"
        )


def _by_width(item: tuple[str, StoredTensor]) -> tuple[int, str]:
    """Wide elements first, so that every tensor begins at a multiple of its width; then names."""
    name, tensor = item
    elements = 1
    for dimension in tensor.shape:
        elements *= dimension
    return (-(tensor.nbytes // elements) if elements else 0, name)
