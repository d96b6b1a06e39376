"""What documents show can be typed: commands, their options, and Python code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from typer.models import OptionInfo

from dialect_plugin.cli import app
from tests.documents.markdown import ROOT, code_blocks, commands, documents

DOCUMENTS = documents()
PACKAGES = ("dialect_kernels", "dialect_plugin", "diffusers_hook", "benchmarks", "demo")
VLLM_OPTIONS = {"--quantization", "-q", "--hf-overrides", "--enforce-eager", "--dtype", "--port"}
VLLM_OPTIONS |= {"--max-model-len", "--tensor-parallel-size", "--quantization-config"}
VLLM_OPTIONS |= {"--additional-config"}


def name_of(path):
    return str(path.relative_to(ROOT))


def options_of_the_commands():
    """Command -> the option names of its function."""
    found = {}
    for command in app.registered_commands:
        hints = typing.get_type_hints(command.callback, include_extras=True)
        options = {"--help"}
        for name in inspect.signature(command.callback).parameters:
            info = typing.get_args(hints[name])[1]
            if isinstance(info, OptionInfo):
                given = (info.default, *(info.param_decls or ()))
                names = [name for t in given if isinstance(t, str) for name in t.split("/") if name]
                options |= set(names) or {"--" + name.replace("_", "-")}
        found[command.callback.__name__] = options
    return found


def unknown(text):
    """The shown calls of `blockdialect` that it would refuse."""
    known = options_of_the_commands()
    for words in commands(text, "blockdialect"):
        if not words:
            continue
        if words[0] not in known:
            yield f"blockdialect {words[0]}"
            continue
        for word in words[1:]:
            option = word.partition("=")[0]
            if option.startswith("-") and option not in known[words[0]]:
                yield f"blockdialect {words[0]} {option}"


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.name != "errors.md"], ids=name_of)
def test_blockdialect_has_the_shown_options(path):
    assert list(unknown(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_the_makefile_has_the_shown_targets(path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    for words in commands(path.read_text(encoding="utf-8"), "make"):
        for word in words:
            name, assigned, _ = word.partition("=")
            assert name in ({"MODEL", "ARGS", "PYTHON"} if assigned else targets), words


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_shown_modules_and_scripts_exist(path):
    text = path.read_text(encoding="utf-8")
    for words in commands(text, "python -m"):
        if words[0].partition(".")[0] in PACKAGES and "NAME" not in words[0]:
            assert importlib.util.find_spec(words[0]), words
    for words in [*commands(text, "python"), *commands(text, ".venv/bin/python")]:
        if words and words[0].endswith(".py"):
            assert (ROOT / words[0]).is_file(), words


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_shown_options_of_vllm_are_known(path):
    """Against a list: building vLLM's own parser takes longer than all the other tests here."""
    for words in commands(path.read_text(encoding="utf-8"), "vllm serve"):
        options = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert options <= VLLM_OPTIONS, words


@pytest.mark.slow
def test_the_known_options_of_vllm_are_its_own():
    vllm = Path(sys.executable).with_name("vllm")
    done = subprocess.run(
        [vllm, "serve", "--help=all"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", done.stdout)) >= VLLM_OPTIONS


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_code_compiles_and_imports_what_exists(path):
    for language, code in code_blocks(path.read_text(encoding="utf-8")):
        if language != "python" or path.name == "api.md":  # signatures: tests of the reference
            continue
        for node in ast.walk(ast.parse(code)):
            names = []
            if isinstance(node, ast.Import):
                names = [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module, alias.name) for alias in node.names]
            for module, name in names:
                if module.partition(".")[0] in PACKAGES:
                    imported = importlib.import_module(module)
                    assert name is None or hasattr(imported, name), f"{module}.{name}"


def test_a_wrong_command_is_found():
    text = "```\nblockdialect quantize A B --block-sise 16\n```\nand `blockdialect squash A`\n"
    assert list(unknown(text)) == ["blockdialect quantize --block-sise", "blockdialect squash"]
