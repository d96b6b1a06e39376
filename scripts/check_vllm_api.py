"""Check, without installing it, that a version of vLLM has what the plugin uses.

    python scripts/check_vllm_api.py 0.26.0 0.33.0
    python scripts/check_vllm_api.py path/to/vllm-0.33.0-….whl

Versions are downloaded from the package index. Read are the sources of wheel and plugin, nothing is
imported: every name that `dialect_plugin` imports from vLLM exists there, with the attributes it
reads from modules; calls fit the signatures; and methods that override those of a vLLM class take
the arguments the class's own ones take. What objects hold while vLLM runs cannot be seen this way.
Imports inside ``try`` are passed over: the plugin goes without them.

Needs griffe (``pip install '.[dev]'``), a minute for each version, and 350 MB of disk for it.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import griffe

PLUGIN = Path(__file__).resolve().parents[1] / "dialect_plugin"

_SEVERAL = {griffe.ParameterKind.var_positional, griffe.ParameterKind.var_keyword}


@dataclass(frozen=True)
class Source:
    """A module of the plugin.

    Attributes:
        path: its file.
        tree: its syntax tree.
        imported: name in the module -> full name in vLLM.
        lines: full name in vLLM -> line of the import.
    """

    path: Path
    tree: ast.Module
    imported: dict[str, str]
    lines: dict[str, int]

    def at(self, line: int) -> str:
        """A place in it, for messages."""
        return f"{self.path.parent.name}/{self.path.name}:{line}"


def read_sources(directory: Path, package: str) -> list[Source]:
    """The modules below `directory` that import from `package`."""
    sources = []
    for path in sorted(directory.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        passed_over = {n for t in ast.walk(tree) if isinstance(t, ast.Try) for n in ast.walk(t)}
        imported, lines = {}, {}
        for node in ast.walk(tree):
            if node in passed_over or not isinstance(node, ast.ImportFrom) or node.level:
                continue
            if (node.module or "").partition(".")[0] != package:
                continue
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                imported[alias.asname or alias.name] = name
                lines[name] = node.lineno
        if imported:
            sources.append(Source(path, tree, imported, lines))
    return sources


class Api:
    """The names of a package, read from its sources.

    Args:
        directory: where the package's folder lies.
        package: its name.
    """

    def __init__(self, directory: Path, package: str) -> None:
        loader = griffe.GriffeLoader(search_paths=[directory], allow_inspection=False)
        loader.load(package, try_relative_path=False)
        self._modules = loader.modules_collection

    def find(self, name: str) -> Any:
        """What `name` is; None if it does not exist."""
        try:
            found = self._modules.get_member(name)
            return found.final_target if found.is_alias else found
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            return None

    def method(self, owner: Any, name: str) -> Any:
        """A method of a class, its own or an inherited one; None if there is none."""
        found = owner.all_members.get(name)
        found = found.final_target if found is not None and found.is_alias else found
        return found if found is not None and found.is_function else None

    def signature(self, found: Any) -> list[griffe.Parameter] | None:
        """The parameters of a call of `found`, without self; None if they are not known."""
        if found.is_function:
            return list(found.parameters)
        if found.is_class and (made := self.method(found, "__init__")) is not None:
            return list(made.parameters)[1:]
        return None


def faults(source: Source, api: Api) -> Iterator[str]:
    """What a module of the plugin uses and the package lacks, one sentence each."""
    found = {local: api.find(name) for local, name in source.imported.items()}
    for local, name in source.imported.items():
        if found[local] is None:
            yield f"{source.at(source.lines[name])}: {name} does not exist"
    known = {local: entry for local, entry in found.items() if entry is not None}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = known.get(node.value.id)
            if owner is not None and owner.is_module and node.attr not in owner.members:
                yield f"{source.at(node.lineno)}: {owner.path}.{node.attr} does not exist"
        elif isinstance(node, ast.Call):
            yield from _call_faults(source, api, known, node)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                owner = known.get(base.id) if isinstance(base, ast.Name) else None
                if owner is not None and owner.is_class:
                    yield from _override_faults(source, api, owner, node)


def _call_faults(source: Source, api: Api, known: dict[str, Any], call: ast.Call) -> Iterator[str]:
    """What a call passes that its function does not take, or lacks."""
    target = None
    if isinstance(call.func, ast.Name):
        target = known.get(call.func.id)
    elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        owner = known.get(call.func.value.id)
        target = (
            owner.members.get(call.func.attr) if owner is not None and owner.is_module else None
        )
        target = target.final_target if target is not None and target.is_alias else target
    parameters = None if target is None else api.signature(target)
    if parameters is None:
        return
    where, kinds = source.at(call.lineno), {parameter.kind for parameter in parameters}
    given = {keyword.arg for keyword in call.keywords}
    names = {p.name for p in parameters if p.kind not in _SEVERAL}
    if griffe.ParameterKind.var_keyword not in kinds:
        for name in sorted(given - names - {None}):
            yield f"{where}: {target.path} has no parameter {name!r}"
    if None in given or any(isinstance(argument, ast.Starred) for argument in call.args):
        return
    by_place = [
        p
        for p in parameters
        if p.kind
        in (griffe.ParameterKind.positional_only, griffe.ParameterKind.positional_or_keyword)
    ]
    if len(call.args) > len(by_place) and griffe.ParameterKind.var_positional not in kinds:
        yield f"{where}: {target.path} takes {len(by_place)} arguments by place"
    for parameter in parameters:
        passed = parameter in by_place[: len(call.args)] or parameter.name in given
        if parameter.required and parameter.kind not in _SEVERAL and not passed:
            yield f"{where}: {target.path} needs {parameter.name!r}"


def _override_faults(source: Source, api: Api, owner: Any, made: ast.ClassDef) -> Iterator[str]:
    """What methods of a class do not take and those of its base do, and abstract ones it lacks."""
    own = {n.name: n for n in made.body if isinstance(n, ast.FunctionDef)}
    assigned = {
        target.id
        for node in made.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for name in owner.all_members:
        base = api.method(owner, name)
        if base is None or name == "__init__":
            continue
        if name not in own:
            abstract = "abc.abstractmethod" in {d.callable_path for d in base.decorators}
            if abstract and name not in assigned:
                yield f"{source.at(made.lineno)}: {made.name} lacks {owner.path}.{name}"
            continue
        takes = own[name].args
        names = {a.arg for a in (*takes.posonlyargs, *takes.args, *takes.kwonlyargs)}
        for parameter in base.parameters:
            fits = parameter.name in names or parameter.name in ("self", "cls")
            star = takes.vararg if parameter.kind is griffe.ParameterKind.var_positional else None
            if not fits and parameter.kind not in _SEVERAL and not takes.kwarg and not star:
                yield (
                    f"{source.at(own[name].lineno)}: {made.name}.{name} does not take "
                    f"{parameter.name!r} of {base.path}"
                )


def _wheel(version: str, directory: Path) -> Path:
    """The wheel of a version, from the package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(directory), f"vllm=={version}"]
    subprocess.run(command, check=True)
    return next(directory.glob("vllm-*.whl"))


def main() -> int:
    """Print the faults of each version; the exit status is 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="+", help="a version of vLLM, or a wheel")
    sources, status = read_sources(PLUGIN, "vllm"), 0
    for version in parser.parse_args().versions:
        with tempfile.TemporaryDirectory() as made:
            directory = Path(made)
            given = Path(version)
            wheel = given if given.suffix == ".whl" else _wheel(version, directory)
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith(".py")]
                archive.extractall(directory, names)
            api = Api(directory, "vllm")
            found = [fault for source in sources for fault in faults(source, api)]
        uses = sum(len(source.imported) for source in sources)
        print(f"{wheel.name}: {uses} imports, {len(found)} faults", *found, sep="\n  ", flush=True)
        status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main())
