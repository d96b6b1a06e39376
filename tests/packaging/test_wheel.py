"""The built wheel: what it makes importable, and that installing it disturbs nothing."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.compilers import unoptimized

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

PACKAGES = {
    "dialect_kernels": "triton_kernels/dialect_kernels",
    "dialect_plugin": "dialect_plugin",
    "diffusers_hook": "diffusers_hook",
}
"""Where a package lies in the repository."""

DATA_FOLDERS = {
    "dialect_kernels/cpu/kernel/": ".h",
    "dialect_kernels/golden/": ".json",
    "dialect_kernels/gpu/configs/": ".md",
    "dialect_plugin/templates/": ".html",
}
"""Folders without modules and a kind of file in them."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files that git tracks, where a build leaves nothing behind in the repository."""
    folder = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def build(source, out, **environment):
    """Build a wheel; pip with -v shows what setuptools prints, which must be free of complaints."""
    options = ["--no-deps", "--no-build-isolation", "-v", "-w", str(out)]
    done = subprocess.run(
        [*PIP, "wheel", *options, str(source)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert not re.search("absent from the `packages`|deprecated", printed, re.IGNORECASE), printed
    assert "copying triton_kernels/dialect_kernels/cpu/build.py" in printed  # setuptools is heard
    return next(out.glob("blockdialect-*.whl"))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    return build(source, folder, CXX=unoptimized(folder))


def test_contents(wheel, source):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    info = next(top for top in tops if top.endswith(".dist-info"))
    assert tops == {*PACKAGES, info}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    libraries = {name for name in names if name.endswith(".so")}
    assert [name.split("-")[0] for name in libraries] == ["dialect_kernels/cpu/dialect_cpu"]
    assert {name for name in names if not name.startswith(info)} - libraries == {
        f"{package}/{path.relative_to(source / folder)}"
        for package, folder in PACKAGES.items()
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    for folder, suffix in DATA_FOLDERS.items():
        assert any(name.startswith(folder) and name.endswith(suffix) for name in names), folder
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    entry_points = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "[vllm.general_plugins]\nblockdialect = dialect_plugin:register" in entry_points
    assert "[console_scripts]\nblockdialect = dialect_plugin.cli:app" in entry_points
    assert f"{info}/licenses/LICENSE" in names


def test_without_a_compiler_the_wheel_is_pure_python(source, tmp_path):
    built = build(source, tmp_path, CXX="no-such-compiler")
    assert built.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(built).namelist() if name.endswith(".so")]


def test_triton_kernels_is_not_importable(wheel, tmp_path):
    """vLLM would take a top-level `triton_kernels` for OpenAI's package."""
    install = [*PIP, "install", "--no-deps", "--target", str(tmp_path), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        "import importlib.util, sys; import dialect_kernels;"
        "assert dialect_kernels.__file__.startswith(sys.argv[1]), dialect_kernels.__file__;"
        "assert importlib.util.find_spec('triton_kernels') is None;"
        "from dialect_kernels.verify import verify;"
        "results = verify(); assert all(r.passed for r in results);"
        "assert {r.backend for r in results} >= {'reference', 'cpu'};"
        "from dialect_kernels.cpu import library;"
        "assert str(library._find()).startswith(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    # where -c looks first for what it imports
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_works_without_triton(wheel):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dialect_kernels as d\n"
        "p = d.quantize(torch.randn(4, 64)); d.dialect_linear(torch.randn(2, 64), p)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_installing_changes_no_installed_version(wheel, tmp_path):
    """Beside vLLM, every requirement of the wheel is met by what is there."""
    report = tmp_path / "report.json"
    metadata = zipfile.ZipFile(wheel)
    info = next(n for n in metadata.namelist() if n.endswith("METADATA"))
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.read(info).decode().splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert required
    command = [*PIP, "install", "--dry-run", "--report", str(report), *required]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads(report.read_text())["install"] == []
