"""Rules that a program can check: no code is ever read from a file, no paths of a machine."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BANNED_CALLS = {"eval", "exec", "torch.load"}
BANNED_MODULES = {"pickle", "dill", "cloudpickle"}
MACHINE_PATH = re.compile(r"(?<![\w.-])/(?:wor[k]|roo[t]|far[m]|home)/[\w.]")


def tracked(*patterns):
    done = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, check=True
    )
    return [name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def offences(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in BANNED_CALLS:
                yield f"line {node.lineno}: {ast.unparse(node.func)}"
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False":
                    yield f"line {node.lineno}: trust_remote_code"
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in BANNED_MODULES:
                yield f"line {node.lineno}: import {name}"


@pytest.mark.parametrize("name", tracked("*.py"))
def test_no_banned_calls(name):
    assert list(offences((ROOT / name).read_text(encoding="utf-8"))) == []


def test_the_check_finds_them():
    source = "import pickle\nexec('x')\ntorch.load('f')\nf(trust_remote_code=True)\n"
    assert len(list(offences(source))) == 4


def test_no_machine_paths():
    found = []
    for name in tracked():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert found == []
