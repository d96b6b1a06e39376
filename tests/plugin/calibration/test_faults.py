"""Calibrated conversions on a full disk, and killed ones: nothing is lost."""

import multiprocessing
import os
import resource
import signal

import pytest

from dialect_plugin.calibration.calibrator import Calibrator
from dialect_plugin.calibration.options import CalibrationOptions
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.writer import is_temporary
from tests.support.conversions import hashes, options_of

SCHEME = {"book": "semantic_32", "rotation": "hadamard_32"}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"def f{n}(x): return {n * n} - x  # {n % 7}\n" for n in range(400)))
    return file


def calibrated(source, destination, text, progress=None):
    settings = CalibrationOptions(calibrate=str(text), samples=8, sequence_length=64)
    return convert(
        source,
        destination,
        options_of(**SCHEME),
        calibration=Calibrator(settings),
        progress=progress,
        workers=1,
    )


def in_child(target, *arguments):
    """The exit code of a function's own process."""
    child = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    child.start()
    child.join()
    return child.exitcode


class KillsItself(Silent):
    """Ends its process, as ``kill -9`` does, when the second block is calibrated."""

    def __init__(self):
        self.here, self.layers = "", 0

    def begin(self, what, tensors, nbytes):
        self.here = what

    def advance(self, nbytes):
        self.layers += self.here == "calibrating"
        if self.layers == 8:
            os.kill(os.getpid(), signal.SIGKILL)


def convert_and_die(source, destination, text):
    calibrated(source, destination, text, KillsItself())


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_behind_the_last_block(tiny_model, text, tmp_path):
    source, packed = tiny_model(), tmp_path / "packed"
    calibrated(source, tmp_path / "whole", text)
    assert in_child(convert_and_die, source, packed, text) == -signal.SIGKILL
    assert sorted(path.name for path in packed.glob(".blockdialect-block-*")) == [
        ".blockdialect-block-00000-000", ".blockdialect-block-00001-000"
    ]  # fmt: skip
    assert not (packed / "config.json").exists()
    calibrated(source, packed, text)
    assert hashes(packed) == hashes(tmp_path / "whole")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_full_disk(tiny_model, text, tmp_path, share):
    """No file may become larger than a share of a block's file."""
    source, packed = tiny_model(), tmp_path / "packed"
    calibrated(source, tmp_path / "whole", text)
    limit = int(share * 50_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            OSError, match=r"cannot be written \(File too large\); free some"
        ) as caught:
            calibrated(source, packed, text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert (".blockdialect-block-00000" in str(caught.value)) == bool(share)
    assert not [path for path in packed.iterdir() if is_temporary(path)]
    calibrated(source, packed, text)
    assert hashes(packed) == hashes(tmp_path / "whole")
