"""The set-up script: it fails with the reason, and a second run does nothing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
REAL_DEVICE = pytest.mark.skipif(
    Path("/dev/nvidia0").exists(), reason="this machine has a GPU, which the script sees first"
)


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """The script as a module that works in an empty folder."""
    module = load_script("setup_env")
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "stamp")
    return module


def set_path(monkeypatch, folder):
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_a_missing_compiler_is_named(setup_env, tmp_path, monkeypatch):
    set_path(monkeypatch, tmp_path / "empty")
    with pytest.raises(setup_env.SetupError, match="install a C\\+\\+ compiler"):
        setup_env.check_machine("CUDA")


def test_a_full_disk_is_named(setup_env, monkeypatch):
    monkeypatch.setitem(setup_env.NEEDED_GIB, "CUDA", 10**9)
    with pytest.raises(setup_env.SetupError, match="GiB of disk are free"):
        setup_env.check_machine("CUDA")


def test_a_python_without_ensurepip_is_named(setup_env, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(setup_env.SetupError, match="python3-venv"):
        setup_env.make_venv()


def test_an_environment_without_pip_is_made_again(setup_env):
    setup_env.venv.create(setup_env.VENV, with_pip=False)
    assert subprocess.run([setup_env.PYTHON, "-c", "import pip"], capture_output=True).returncode
    setup_env.make_venv()
    subprocess.run([setup_env.PYTHON, "-c", "import pip"], check=True)


def test_what_pip_says_is_the_reason(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env, "PYTHON", sys.executable)
    with pytest.raises(setup_env.SetupError, match=r"pip failed at: nothing\n(.|\n)*no-such-file"):
        setup_env.pip("nothing", "install", "--no-index", "no-such-file.whl")


def test_the_second_run_only_compares(setup_env, monkeypatch, capsys):
    setup_env.PYTHON.parent.mkdir(parents=True)
    setup_env.PYTHON.touch()
    setup_env.STAMP.write_text(setup_env.fingerprint("CPU"))
    setup_env.set_up("CPU")  # anything it ran would fail: that Python is an empty file
    assert ".venv is ready" in capsys.readouterr().out
    with pytest.raises((OSError, setup_env.SetupError)):
        setup_env.set_up("CUDA")  # the stamp is another build's


@pytest.mark.parametrize(
    ("listed", "status", "expected"),
    [("GPU 0: NVIDIA H200 (UUID: GPU-0)", 0, True), ("", 0, False), ("no driver", 9, False)],
)
@REAL_DEVICE
def test_the_driver_tool_alone_is_no_gpu(
    listed, status, expected, setup_env, tmp_path, monkeypatch
):
    tool = set_path(monkeypatch, tmp_path / "bin") / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{listed}'\nexit {status}\n")
    tool.chmod(0o755)
    assert setup_env.has_nvidia_gpu() is expected


@REAL_DEVICE
def test_no_gpu_without_the_driver_tool(setup_env, tmp_path, monkeypatch):
    set_path(monkeypatch, tmp_path / "empty")
    assert not setup_env.has_nvidia_gpu()
