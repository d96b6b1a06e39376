"""How the CPU kernel is compiled and found; and the kernel under the sanitizers."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dialect_kernels
import dialect_kernels.cpu.build as build_module
from tests.support.compilers import COMPILER, unoptimized

PACKAGE = Path(dialect_kernels.__file__).parent
KERNEL = PACKAGE / "cpu" / "kernel"
HEADERS = sorted(path.name for path in KERNEL.glob("*.h"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

STATE = "from dialect_kernels import cpu; print(cpu.available(), cpu.why_not())"
LOGGED = "import logging; logging.basicConfig(level='INFO');"


@pytest.fixture
def source_tree(tmp_path) -> Path:
    """The package as it lies in a source tree: without a library."""
    shutil.copytree(
        PACKAGE,
        tmp_path / "tree" / "dialect_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", ".*"),
    )
    return tmp_path / "tree"


def run(script: str, tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter that imports the package from `tree`."""
    environment = {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(tree / "cache")} | environment
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tree,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@needs_compiler
def test_built_on_first_use_into_the_cache_folder(source_tree):
    """Two processes at once; afterwards the folder holds one finished library and nothing else."""
    script = f"import sys; {STATE}; print(cpu.__file__)"
    environment = os.environ | {
        "PYTHONPATH": str(source_tree),
        "XDG_CACHE_HOME": str(source_tree / "cache"),
        "CXX": unoptimized(source_tree),
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            cwd=source_tree,
        )
        for _ in range(2)
    ]
    for process in both:
        state, file = process.communicate()[0].splitlines()
        assert state == "True None"
        assert Path(file).is_relative_to(source_tree)
    folder = source_tree / "cache" / "blockdialect"
    assert [path.name for path in folder.iterdir()] == [build_module.library_name()]


@pytest.mark.slow
@needs_compiler
def test_a_library_beside_the_package_needs_no_compiler(source_tree):
    """As a package build leaves it; the optimizer is off to save time."""
    built = build_module.build(source_tree / "dialect_kernels" / "cpu", ("-O0",))
    assert built.name == build_module.library_name()
    assert run(STATE, source_tree, CXX="/nonexistent").stdout == "True None\n"


def test_without_compiler_one_line_says_why(source_tree):
    script = LOGGED + STATE + "; cpu.available()"
    done = run(script, source_tree, CXX="/nonexistent/c++")
    assert done.stdout.startswith("False /nonexistent/c++ cannot be run")
    assert done.stderr.count("the CPU kernel is not available, torch does its work") == 1


def test_switched_off_by_the_environment(source_tree):
    done = run(LOGGED + STATE, source_tree, BLOCKDIALECT_CPU_KERNEL="0")
    assert done.stdout == "False BLOCKDIALECT_CPU_KERNEL=0\n"
    assert not (source_tree / "cache").exists()


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'import sys; sys.exit(\"no such flag\")'")
    with pytest.raises(build_module.CompilerError, match="failed:\nno such flag"):
        build_module.build(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_no_compiler_at_all(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build_module.CompilerError, match="no C\\+\\+ compiler"):
        build_module.build(tmp_path / "out")


def test_the_build_module_loads_by_path_and_without_torch(tmp_path):
    """As a package build does it."""
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('b', {build_module.__file__!r})\n"
        "b = importlib.util.module_from_spec(spec); spec.loader.exec_module(b)\n"
        "assert 'torch' not in sys.modules\n"
        "print(b.library_name())"
    )
    assert run(script, tmp_path).stdout.strip() == build_module.library_name()


def load_build_module(tree: Path):
    """The build module of a copy of the package, by path as a package build loads it."""
    spec = importlib.util.spec_from_file_location(
        "copied_build", tree / "dialect_kernels" / "cpu" / "build.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_change_in_any_kernel_file_gives_another_name(source_tree):
    copied = load_build_module(source_tree)
    names = {copied.library_name()}
    assert names == {build_module.library_name()}
    kernel = source_tree / "dialect_kernels" / "cpu" / "kernel"
    files = sorted(kernel.iterdir())
    assert [path.name for path in files] == sorted(path.name for path in KERNEL.iterdir())
    for path in files:
        path.write_bytes(path.read_bytes() + b"\n")
        names.add(copied.library_name())
    assert len(names) == 1 + len(files) >= 10


def test_moving_text_from_one_header_to_another_gives_another_name(source_tree):
    copied = load_build_module(source_tree)
    kernel = source_tree / "dialect_kernels" / "cpu" / "kernel"
    name = copied.library_name()
    first, second = (kernel / header for header in HEADERS[:2])
    whole = first.read_bytes()
    second.write_bytes(whole[-10:] + second.read_bytes())
    first.write_bytes(whole[:-10])
    assert copied.library_name() != name


def test_headers_include_only_headers_above_them():
    """The order is the list at the head of the translation unit, which names every header."""
    unit = KERNEL / "dialect_cpu.cpp"
    order = re.findall(r"^//     (\w+\.h) ", unit.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(order) == HEADERS
    included = set()
    for position, name in enumerate([*order, unit.name]):
        text = (KERNEL / name).read_text(encoding="utf-8")
        assert name == unit.name or text.count("\n#pragma once\n") == 1, name
        found = re.findall(r'^#include "(.*)"$', text, re.MULTILINE)
        assert not set(found) - set(order[:position]), name
        included |= set(found)
    assert included == set(order)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_includes_what_it_needs(name, tmp_path):
    unit = tmp_path / "unit.cpp"
    unit.write_text(f'#include "{name}"\n', encoding="utf-8")
    command = [str(COMPILER), "-std=c++17", "-fsyntax-only", "-I", str(KERNEL), str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SANITIZED = """
from dataclasses import replace
from itertools import product
import torch
from dialect_kernels import (
    DIALECT_FP4, SEMANTIC_32, PackedExperts, PackedTensor, cpu, reference
)
from dialect_kernels.cpu import calls
torch.manual_seed(0)
assert cpu.available(), cpu.why_not()
best = cpu.INSTRUCTIONS.index(cpu.features())
dtypes = (torch.float32, torch.float16, torch.bfloat16)
for case, (block_size, book) in enumerate(product((16, 32, 64), (DIALECT_FP4, SEMANTIC_32))):
    for rows, columns, tokens in (
        (1, 1, 1), (9, 33, 3), (8, 95, 100), (35, 2111, 18), (0, 0, 0), (9, 96, 60)
    ):
        w = torch.randn(rows, columns) * torch.randn(columns).exp()
        rotations = ("none",) if columns % 32 else ("none", "hadamard_32")
        for rule, rotation in product(book.rules, rotations):
            window = book.largest_stored_delta
            q = calls.quantize(w, book, block_size, rule, window, rotation).packed
            want = reference.quantize(w, book, block_size, rule, rotation=rotation)
            assert torch.equal(q.codes, want.codes)
        any_bytes = [torch.randint(0, 256, t.shape).to(t.dtype) for t in q.tensors]
        weights = [
            replace(p, rotation=rotation)
            for p in (q, PackedTensor(*any_bytes, q.shape, book, block_size))
            for rotation in rotations
        ]
        for number, p in enumerate(weights, start=case):
            dtype = dtypes[number % 3]  # each of them with every shape and block size
            calls.dequantize(p)
            x = torch.randn(tokens, columns).to(dtype)
            if tokens > 2:
                x[1, 0], x[2, -1] = torch.nan, torch.inf
            for format, instructions in product(
                ("dialect", "fp8", "none"), cpu.INSTRUCTIONS[: best + 1]
            ):
                options = {"threads": 3, "instructions": instructions}
                calls.linear(x, p, None, format, **options)
                calls.linear(x, p, None, format, "default", **options)
            experts, bias = PackedExperts.stack([p, p, p]), torch.randn(3, rows).to(dtype)
            offsets = torch.tensor([tokens // 4, tokens // 4, tokens // 3, tokens])
            modes = {"exact": torch.arange(tokens - 1, -1, -1), "default": None}
            for format, instructions, mode in product(
                ("dialect", "fp8", "none"), cpu.INSTRUCTIONS[: best + 1], modes
            ):
                if rule == "mse":
                    options = {"threads": 3, "instructions": instructions}
                    named = modes[mode]
                    calls.grouped_linear(x, named, offsets, experts, bias, format, mode, **options)
            whole = torch.randint(-64, 65, (tokens, columns)).to(dtype)
            whole[1:, 7:8] = 2.0**-14  # needs more digits than there are
            for instructions in cpu.INSTRUCTIONS[: best + 1]:
                options = {"threads": 3, "instructions": instructions}
                calls.linear(whole, p, None, "none", **options)
            salient = torch.arange(tokens - 1, -1, -2)
            for instructions in cpu.INSTRUCTIONS[: best + 1]:
                options = {"threads": 3, "instructions": instructions}
                costs = calls.variant_costs(x, book, block_size, p.rotation, **options)
                chosen = torch.randint_like(costs[..., 0], -1, book.variants).to(torch.int8)
                for variants in (None, chosen):
                    calls.decomposed_linear(x, p, variants, salient, **options)

from dialect_kernels.cpu import kv_cache
from dialect_kernels.kv_cache import Context, KvCache, Scoring, slot_bytes
table = torch.tensor([[3, 0, 0], [1, 4, 2]], dtype=torch.int32)
lengths = torch.tensor([5, 70], dtype=torch.int32)
starts = torch.tensor([0, 1, 41], dtype=torch.int32)
for head_size, dtype, instructions in product(
    (32, 96), (torch.float32, torch.float16, torch.bfloat16), cpu.INSTRUCTIONS[: best + 1]
):
    options = {"threads": 3, "instructions": instructions}
    memory = torch.randint(0, 256, (5, 2, 24, slot_bytes(head_size)), dtype=torch.uint8)
    mean = torch.randn(2, head_size)
    key = torch.randn(40, 2, head_size).to(dtype)
    key[3, 0, 1] = torch.nan
    for cache in (KvCache(memory, head_size), KvCache(memory, head_size, True, mean, mean)):
        kv_cache.store(cache, key, key, torch.arange(40) * 3 - 1, **options)
        for group, scoring in product(
            (1, 3, 16), (Scoring(0.1), Scoring(0.1, 2.0, 9, torch.ones(2), torch.ones(2)))
        ):
            if scoring.slopes is not None and group > 1:
                continue
            query = torch.randn(41, 2 * group, head_size).to(dtype)
            for rounded in (False, True):
                kv_cache.attend(
                    cache, query, Context(starts, lengths, table), scoring,
                    dialect_attention=rounded, **options,
                )
"""


@pytest.mark.slow
@needs_compiler
def test_address_and_undefined_behaviour_sanitizers(source_tree):
    """Reads and writes past a tensor, misaligned and overflowing arithmetic end the process."""
    libraries = [
        subprocess.run(
            [str(COMPILER), f"-print-file-name=lib{name}.so"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name in ("asan", "ubsan", "stdc++")
    ]
    if missing := [name for name in libraries if not Path(name).is_file()]:
        pytest.skip(f"the compiler has no {', '.join(missing)}")
    flags = (
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize-recover=all",
        "-g1",  # lines for the report
        "-O0",  # -O1 takes the compiler twice as long
    )
    build_module.build(source_tree / "dialect_kernels" / "cpu", flags)
    run(
        SANITIZED,
        source_tree,
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter keeps its memory until the end
    )
