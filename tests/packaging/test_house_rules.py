"""Rules of the house that a program can check, on the files that git knows.

No code is ever read from a file; no path of a machine; files and functions that one can survey;
imports that only point down; `__all__` is what other modules use.
"""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BANNED_CALLS = {"eval", "exec", "torch.load"}
BANNED_LEAVES = {name.rpartition(".")[2] for name in BANNED_CALLS}
BANNED_MODULES = {"pickle", "dill", "cloudpickle"}
MACHINE_PATH = re.compile(r"(?<![\w.-])/(?:wor[k]|roo[t]|far[m]|home)/[\w.]")
PATH_EDIT = re.compile(r"sys\.pat[h]\s*(?:\.(?:insert|append|extend|remove)|\[[^]]*\]\s*=|\+?=)")

LONGEST_FILE = 700
LONGEST_FUNCTION = 60
LONG_FUNCTIONS = {
    "triton_kernels/dialect_kernels/gpu/cache_attention.py:_attend_kernel": "a Triton kernel with "
    "38 arguments",
    "triton_kernels/dialect_kernels/gpu/dialect_attention.py:attend_kernel": "a Triton kernel with "
    "37 arguments",
    "triton_kernels/dialect_kernels/gpu/gemm.py:sixteen_bit_kernel": "a Triton kernel with 29 "
    "arguments",
    "triton_kernels/dialect_kernels/gpu/quantize_activations.py:_quantize_activation_kernel": "a "
    "Triton kernel with 24 arguments",
}
"""FILE:FUNCTION -> why it is longer."""

PRODUCT = {
    "dialect_kernels": "triton_kernels/dialect_kernels",
    "dialect_plugin": "dialect_plugin",
    "diffusers_hook": "diffusers_hook",
}
"""Import name of a package -> where it lies."""
PUBLIC_API = {
    "dialect_kernels": "the format and its operations",
    "dialect_kernels.reference": "the same functions in plain torch",
    "dialect_kernels.baselines": "MXFP4, NVFP4 and FP8 to compare with",
    "dialect_kernels.calibrated": "weights rounded for what calibration text makes of them",
    "dialect_kernels.formatbook": "the number formats as data",
    "dialect_kernels.verify": "the golden vectors, to check an implementation with",
    "dialect_plugin": "vLLM's entry point, and the reader of packed directories",
    "dialect_plugin.cli": "the command blockdialect",
    "dialect_plugin.transformers": "packed checkpoints in transformers",
    "diffusers_hook": "the video hook",
}
"""Modules whose `__all__` is for users -> what they offer."""
HANDED_OVER = {
    "dialect_kernels.cpu.build": "the compiler, which setup.py loads by its path",
    "dialect_plugin.cli": "commands, which Typer calls",
    "dialect_plugin.transformers.quantizer": "the quantizer, which transformers takes from there",
    "dialect_plugin.vllm.cpu_attention": "the back end, which vLLM takes from its registry",
    "dialect_plugin.vllm.gpu_attention": "the back end, which vLLM takes from its registry",
    "dialect_plugin.vllm.config": "configurations, which vLLM takes from its registry",
    "diffusers_hook.pipeline_methods": "methods that are added to DiffusionPipeline",
    **{
        f"diffusers_hook.layouts.families.{path.stem}": "LAYOUTS, which the registry collects"
        for path in (ROOT / "diffusers_hook" / "layouts" / "families").glob("[!_]*.py")
    },
}
"""Modules whose names others use without importing them -> which."""
BACK_ENDS = ("dialect_kernels.cpu", "dialect_kernels.gpu", "dialect_kernels.torch_backend")
"""Modules whose functions are called through `dialect_kernels.backend.Backend`."""


@cache
def known(*patterns):
    """Files that git tracks, or that it would if they were added."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    names = sorted(set(filter(None, done.stdout.decode().split("\0"))))
    return [name for name in names if (ROOT / name).is_file()]


@cache
def tree(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def offences(source):
    for node in ast.walk(source):
        if isinstance(node, ast.Call):
            leaf = getattr(node.func, "attr", getattr(node.func, "id", None))
            if leaf in BANNED_LEAVES and ast.unparse(node.func) in BANNED_CALLS:
                yield f"line {node.lineno}: {ast.unparse(node.func)}"
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False":
                    yield f"line {node.lineno}: trust_remote_code"
        for name in imported(node):
            if name.split(".")[0] in BANNED_MODULES:
                yield f"line {node.lineno}: import {name}"


def imported(node):
    """The modules that an import statement names, as written."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module]
    return []


def test_no_banned_calls():
    found = [f"{name}, {offence}" for name in known("*.py") for offence in offences(tree(name))]
    assert found == []


def test_the_check_finds_them():
    source = "import pickle\nexec('x')\ntorch.load('f')\nf(trust_remote_code=True)\n"
    assert len(list(offences(ast.parse(source)))) == 4


def matches(pattern, *files):
    found = []
    for name in known(*files):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {match[0]}" for match in pattern.finditer(text)]
    return found


def test_no_machine_paths():
    assert matches(MACHINE_PATH) == []


def test_no_module_edits_the_search_path():
    """Also none in a string that a new Python process runs: PYTHONPATH is there for that."""
    assert matches(PATH_EDIT, "*.py", "*.ipynb") == []
    for edit in (".insert(0, x)", " += [x]", " = []", "[:] = []"):
        assert PATH_EDIT.search(f"sys.{'path'}{edit}")
    assert not PATH_EDIT.search("print(sys.path)")


def test_nothing_but_tests_imports_tests():
    found = [
        f"{name}, line {node.lineno}: import {module}"
        for name in known("*.py")
        if not name.startswith("tests/")
        for node in ast.walk(tree(name))
        for module in imported(node)
        if module.split(".")[0] == "tests"
    ]
    assert found == []


def test_no_file_is_longer_than_one_can_survey():
    code = known("*.py", "*.cpp", "*.h", "*.sh")
    lengths = {name: len((ROOT / name).read_text("utf-8").splitlines()) for name in code}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def long_functions(source, limit=LONGEST_FUNCTION):
    for node in ast.walk(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > limit:
                yield node.name, length


def test_no_function_is_longer_than_one_can_survey():
    found = {
        f"{name}:{function}": length
        for name in known("*.py")
        for function, length in long_functions(tree(name))
    }
    assert {name: length for name, length in found.items() if name not in LONG_FUNCTIONS} == {}
    assert set(LONG_FUNCTIONS) <= set(found), "an exception that is needed no more"


def test_a_long_function_is_found():
    assert list(long_functions(ast.parse("def f():\n    x\n    y\n"), 2)) == [("f", 3)]


class Module:
    """What a module of the product or one of its users defines, exports and uses."""

    def __init__(self, name, path, source):
        self.name = name
        self.package = name if path.endswith("__init__.py") else name.rpartition(".")[0]
        self.source = source
        self.exported, self.defined, self.annotated = [], {}, {}
        for node in source.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self.defined[node.name] = node
            elif isinstance(node, ast.AnnAssign):
                self.annotated[ast.unparse(node.target)] = node
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                self.exported = ast.literal_eval(node.value)

    def uses(self, modules):
        """(module, name) for every name of one of `modules` that this module takes from it."""
        aliases = {}
        for node in ast.walk(self.source):
            if isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                for alias in node.names:
                    yield base, alias.name
                    if f"{base}.{alias.name}" in modules:
                        aliases[alias.asname or alias.name] = f"{base}.{alias.name}"
            elif isinstance(node, ast.Import):
                aliases |= {alias.asname or alias.name: alias.name for alias in node.names}
        for node in ast.walk(self.source):
            if isinstance(node, ast.Attribute):
                owner = aliases.get(ast.unparse(node.value))
                if owner in modules:
                    yield owner, node.attr

    def _absolute(self, node):
        if not node.level:
            return node.module
        parts = self.package.split(".")
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def seen_with(self, name):
        """Names in the annotations of a name: whoever uses it handles such objects."""
        known_as = self.defined | self.annotated
        for node in ast.walk(known_as.get(name, ast.Pass())):
            for part in ("annotation", "returns"):
                for inner in ast.walk(getattr(node, part, None) or ast.Pass()):
                    if isinstance(inner, ast.Name):
                        yield inner.id


@cache
def product():
    found = {}
    for package, folder in PRODUCT.items():
        for path in known(f"{folder}/*.py"):
            inside = path.removeprefix(folder).removesuffix(".py").removesuffix("/__init__")
            name = (package + inside).replace("/", ".")
            found[name] = Module(name, path, tree(path))
    return found


def unused(modules, users):
    """MODULE.NAME for every exported name that no other module uses.

    It is used where it is imported or read from its module, or where it stands in the annotations
    of a name that is.
    """
    used = {use for user in users for use in user.uses(modules) if use[0] != user.name}
    found = []
    for module in modules.values():
        names = {name for name in module.exported if (module.name, name) in used}
        reached = set()
        while names - reached:
            reached |= names
            names |= {seen for name in names for seen in module.seen_with(name)}
        found += [f"{module.name}.{name}" for name in module.exported if name not in reached]
    return found


def unexported(modules):
    """MODULE.NAME for every function or class that neither is exported nor starts with `_`."""
    return [
        f"{module.name}.{name}"
        for module in modules.values()
        for name in module.defined
        if not name.startswith("_") and name not in module.exported
    ]


def without(names, exempt):
    """Those `names`, MODULE.NAME, that do not belong to an exempt module."""
    return [name for name in names if name.rpartition(".")[0] not in exempt]


@cache
def all_unused():
    further = known("benchmarks/*.py", "demo/*.py", "examples/*.py", "scripts/*.py", "setup.py")
    users = [Module(path.removesuffix(".py").replace("/", "."), path, tree(path))
             for path in further]  # fmt: skip
    return unused(product(), [*product().values(), *users])


def called_by_protocol():
    """Functions of the back ends that stand in the protocol."""
    backend = product()["dialect_kernels.backend"].defined["Backend"]
    methods = [node.name for node in backend.body if isinstance(node, ast.FunctionDef)]
    return {f"{module}.{method}" for module in BACK_ENDS for method in methods}


def test_what_is_exported_is_used():
    found = without(all_unused(), {*PUBLIC_API, *HANDED_OVER})
    found = [name for name in found if name not in called_by_protocol()]
    assert not found, "\n".join(found)


def test_what_is_not_exported_starts_with_an_underscore():
    found = without(unexported(product()), HANDED_OVER)
    assert not found, "\n".join(found)


def test_every_exception_is_needed():
    assert set(PUBLIC_API) <= set(product())
    assert all(product()[name].exported for name in PUBLIC_API)
    needed = {name.rpartition(".")[0] for name in [*all_unused(), *unexported(product())]}
    assert set(HANDED_OVER) <= needed
    assert set(BACK_ENDS) <= needed


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("from .a import one", True),
        ("from p.a import one as other", True),
        ("from . import a\na.one()", True),
        ("from . import a as b\nb.one()", True),
        ("import p.a\np.a.one()", True),
        ("from . import a\na.two()", False),
        ("def one(): ...", False),
    ],
)
def test_a_use_is_seen(source, used):
    exports = (
        "__all__ = ['One', 'one']\ndef one() -> One | None: ...\nclass One: ...\ndef two(): ..."
    )
    exporting = Module("p.a", "p/a.py", ast.parse(exports))
    user = Module("p.b", "p/b.py", ast.parse(source))
    modules = {"p.a": exporting, "p.b": user}
    assert unused(modules, modules.values()) == ([] if used else ["p.a.One", "p.a.one"])
    assert "p.a.two" in unexported(modules)
