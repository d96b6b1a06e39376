"""The reference says what the code does: commands, signatures, options, errors, variables."""

from __future__ import annotations

import ast
import re

import pytest

from dialect_plugin.architectures import ARCHITECTURES
from dialect_plugin.scheme import Scheme
from diffusers_hook import SemanticDialectConfig
from tests.documents.markdown import ROOT
from tests.support import support_table
from tests.support.scripts import load_script

REFERENCE = ROOT / "docs" / "reference"
PRODUCT = [
    *(ROOT / "triton_kernels").rglob("*.py"),
    *(ROOT / "dialect_plugin").rglob("*.py"),
    *(ROOT / "diffusers_hook").rglob("*.py"),
]
GAP = "…"


def page(name):
    return (REFERENCE / f"{name}.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generated():
    return load_script("reference_pages")


def test_the_command_line_is_the_app_s(generated):
    assert page("cli") == generated.cli_page(), "run python scripts/reference_pages.py"


def test_the_api_is_the_signatures_and_docstrings(generated):
    assert page("api") == generated.api_page(), "run python scripts/reference_pages.py"


def section(text, heading):
    [found] = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return found


def test_options_of_the_video_hook_are_those_of_its_configuration():
    text = section(page("options"), "Video: `SemanticDialectConfig`")
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE)
    told = {name: ast.literal_eval(default) for name, default in rows}
    not_set_by_hand = {"quant_method", "format_version"}
    fields = SemanticDialectConfig.model_fields
    assert told == {n: f.default for n, f in fields.items() if n not in not_set_by_hand}
    assert list(told) == [name for name in fields if name not in not_set_by_hand]
    assert all(f"`{name}`" in text for name in not_set_by_hand)


def test_options_of_vllm_are_those_of_the_scheme():
    text = section(page("options"), "vLLM: `quantization_config`")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(Scheme.model_fields)


def test_the_table_of_language_models_is_the_record():
    text = page("support-models")
    assert text == support_table.page(text, support_table.recorded())
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) >= set(ARCHITECTURES)


def sentences():
    """Every string of the product's code, with a gap for each value in it."""
    found = set()
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else GAP for p in node.values]
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"\{\w+\}|%s", GAP, node.value))
    return found


def is_said(message, known):
    """Whether one of the known strings has all fixed parts of a message, in their order."""
    parts = [part for part in (part.strip() for part in message.split(GAP)) if len(part) > 2]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(text) for text in known)


def test_error_sentences_are_the_code_s():
    rows = re.findall(r"^\| (.*?)`(.+?)` \| ", page("errors"), re.MULTILINE)
    ours = [message for whose, message in rows if not whose]
    assert len(ours) > 40
    known = sentences()
    assert [message for message in ours if not is_said(message, known)] == []


def test_a_sentence_that_no_code_says_is_found():
    known = {"…: has dtype …; allowed are float32"}
    assert is_said("…: has dtype …; allowed are", known)
    assert not is_said("…: has type …; allowed are", known)


def test_environment_variables_are_those_that_the_code_reads():
    read = set()
    for path in [*PRODUCT, *(ROOT / "benchmarks").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        read |= set(re.findall(r"environ(?:\.get)?[(\[]\s*\"([A-Z_]+)\"", text))
        read |= set(re.findall(r"\"(BLOCKDIALECT_[A-Z_]+)\"", text))
    listed = set(re.findall(r"`([A-Z_]+)(?:=\w+)?`", page("environment")))
    assert read
    assert read <= listed
