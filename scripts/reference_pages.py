"""Write the generated pages of docs/reference: the command line and the Python API.

    python scripts/reference_pages.py

A test compares the pages with the code, so run this after changing a command, a public signature
or its docstring.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from textwrap import dedent, fill
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from dialect_plugin.cli import app

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"
HEAD = "<!-- Written by scripts/reference_pages.py; change the code, then run it again. -->\n\n"

FAULTS = (
    "A fault is one sentence on stderr and exit status 1 ([errors](errors.md)); an unknown option "
    "or a missing argument has exit status 2. `--version` in place of a command prints the version."
)
API = {
    "dialect_kernels": (
        "The formats. `DIALECT_FP4` and `SEMANTIC_32` are the two formatbooks, objects of "
        "`dialect_kernels.formatbook.Formatbook`. What the words mean: [concepts](../concepts.md).",
        (
            "quantize",
            "dialect_linear",
            "dialect_embedding",
            "semantic_linear",
            "PackedTensor",
            "expert_linear",
            "PackedExperts",
        ),
    ),
    "dialect_kernels.reference": (
        "The same functions with the same signatures in plain torch, described in full, and "
        "`round_activation`, which shows how activations are rounded in flight.",
        ("quantize", "semantic_linear", "round_activation"),
    ),
    "dialect_kernels.rotation": (
        "What a rotated layer multiplies its weight and its input by; the second is also the way "
        "back from `PackedTensor.dequantize()` of a rotated weight.",
        ("rotate_weight", "rotate_activation"),
    ),
    "dialect_kernels.calibrated": (
        "Rule `gptq`, which `blockdialect quantize --calibrate` applies to every layer.",
        (
            "quantize_calibrated",
            "CalibratedWeight",
            "quantize_calibrated_baseline",
            "CalibratedValues",
        ),
    ),
    "dialect_kernels.baselines": (
        "The formats that BlockDialect is compared with.",
        ("quantize_mxfp4", "quantize_nvfp4", "quantize_fp8"),
    ),
    "dialect_plugin": ("Reading what `blockdialect quantize` has written.", ("open_packed",)),
    "dialect_plugin.checkpoint.reader": ("", ("PackedCheckpoint",)),
    "dialect_plugin.checkpoint.convert": (
        "What `blockdialect quantize` calls.",
        ("convert",),
    ),
    "dialect_plugin.checkpoint.options": ("", ("ConvertOptions",)),
    "dialect_plugin.transformers": (
        "Importing the package adds the method to transformers' tables of quantizers: "
        "[guide](../guides/transformers.md).",
        ("BlockDialectConfig", "DialectLinear"),
    ),
    "diffusers_hook": (
        "Importing the package adds `enable_semantic_dialect`, `disable_semantic_dialect` and "
        "`semantic_dialect_summary` to diffusers' pipelines; they call three functions of here. "
        "The options are fields of `SemanticDialectConfig`: [options](options.md). `ConfigError` "
        "and `LayoutError` are ValueErrors.",
        (
            "enable",
            "disable",
            "summary",
            "report",
            "record",
            "Calibration",
            "register_layout",
            "Layout",
            "Stream",
            "Blocks",
            "Grid",
        ),
    ),
}
"""Module -> what stands in front, and the names to document."""


def cli_page() -> str:
    """docs/reference/cli.md."""
    text = f"{HEAD}# The command `blockdialect`\n\n{app.info.help}\n\n{fill(FAULTS, 100)}\n"
    for command in app.registered_commands:
        text += "".join(_command(command.callback))
    return text


def api_page() -> str:
    """docs/reference/api.md."""
    text = f"{HEAD}# The Python API\n"
    for module, (front, names) in API.items():
        text += f"\n## `{module}`\n"
        text += f"\n{fill(front, 100)}\n" if front else ""
        for name in names:
            text += "".join(_documented(getattr(importlib.import_module(module), name), name))
    return text


def _command(callback: Callable[..., Any]) -> Iterator[str]:
    hints = typing.get_type_hints(callback, include_extras=True)
    arguments, options = [], []
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, info = typing.get_args(hints[name])[:2]
        if isinstance(info, ArgumentInfo):
            arguments.append((name.upper(), info.help))
        else:
            options.append(_option(name, kind, info, parameter.default))
    usage = "".join(f" {name}" for name, _ in arguments)
    command = callback.__name__.replace("_", "-")
    yield f"\n## `blockdialect {command}`\n\n{inspect.getdoc(callback)}\n\n"
    yield f"```\nblockdialect {command}{' [OPTIONS]' if options else ''}{usage}\n```\n"
    if arguments:
        yield "\n| argument | |\n|---|---|\n"
        yield from (f"| `{name}` | {text} |\n" for name, text in arguments)
    if options:
        yield "\n| option | values | default | |\n|---|---|---|---|\n"
        yield from options


def _option(name: str, kind: Any, info: OptionInfo, default: Any) -> str:
    # inside Annotated, Typer keeps the first given name of an option as its default
    given = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
    flags = given or ["--" + name.replace("_", "-")]
    if default is inspect.Parameter.empty:
        shown = "required"
    else:
        shown = "" if default is None else "off" if default is False else f"`{default}`"
    text = (info.help or "").replace("; repeatable", "")  # stands in the values
    return f"| `{'`, `'.join(flags)}` | {_values(kind, info)} | {shown} | {text} |\n"


def _values(kind: Any, info: OptionInfo) -> str:
    """What an option takes, in words."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # of literals it is the latter
        [kind] = [part for part in kind.__args__ if part is not type(None)]
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if kind is bool:
        return "flag"
    if origin is list:
        return "text, repeatable"
    words = {int: "whole number", float: "number", str: "text", Path: "path"}
    word = words.get(kind) or ", ".join(f"`{value}`" for value in getattr(kind, "__members__", ()))
    return word + ("" if info.min is None else f" from {info.min:g} on")


def _documented(thing: Any, name: str) -> Iterator[str]:
    """Signature and docstring of a function, or of a class and its public methods."""
    if inspect.isclass(thing) and issubclass(thing, Enum):
        members = ", ".join(f"`{name}.{member}`" for member in thing.__members__)
        yield f"\n### `{name}`\n\n{_prose(thing)}\nMembers: {members}.\n"
        return
    yield f"\n### `{name}`\n\n{_called(inspect.signature(thing), name)}\n\n{_prose(thing)}"
    if not inspect.isclass(thing):
        return
    for part, member in vars(thing).items():
        made = isinstance(member, classmethod)
        member = member.__func__ if made else member
        if part.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        shown = f"{name if made else ''}.{part}"
        if inspect.isfunction(member):
            bound = inspect.signature(member)
            bound = bound.replace(parameters=list(bound.parameters.values())[1:])
            yield f"\n{_called(bound, shown)}\n\n{_prose(member)}"
        else:
            yield f"\n`{shown}`\n\n{_prose(member)}"


def _called(signature: inspect.Signature, name: str) -> str:
    return f"```python\n{_signature(signature, name)}\n```"


def _signature(signature: inspect.Signature, name: str) -> str:
    """The signature, one parameter a line where it is long."""
    text = _plain(f"{name}{signature}")
    if len(text) <= 100:
        return text
    inside = "".join(f"    {parameter},\n" for parameter in signature.parameters.values())
    result = signature.return_annotation
    arrow = "" if result in (inspect.Signature.empty, None, "None") else f" -> {result}"
    return _plain(f"{name}(\n{inside}){arrow}")


def _plain(signature: str) -> str:
    """Without the quotes of annotations that are strings, and with short type names."""
    signature = re.sub(r"(: |-> )(['\"])(.*?)\2", r"\1\3", signature.removesuffix(" -> None"))
    signature = re.sub(r"Formatbook\(name='(\w+)'.*?\)\)", lambda book: book[1].upper(), signature)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", signature)


def _prose(thing: Any) -> str:
    """A docstring as Markdown: its sections become headed lists."""
    text = inspect.getdoc(thing) or ""
    text = re.sub(r":\w+:`(?:~[\w.]*\.)?([\w.]+)`", r"`\1`", text).replace("``", "`")
    text = re.sub(r"::\n\n((?:    .*\n?|\n)+)", _code, text)
    sections = r"^(Args|Attributes|Returns|Raises):\n((?:    .*\n?|\n)+)"
    text = re.sub(sections, _section, text, flags=re.M)
    return text.rstrip() + "\n"


def _code(found: re.Match[str]) -> str:
    return f":\n\n```\n{dedent(found[1]).strip()}\n```\n\n"


def _section(found: re.Match[str]) -> str:
    named = r"[\w*][\w*, ]*" if found[1] in ("Args", "Attributes") else r"\w+Error(?:, \w+Error)*"
    body = re.sub(rf"^({named}):", r"- `\1`:", dedent(found[2]).strip(), flags=re.M)
    return f"**{found[1]}**\n\n{re.sub('^ +', '  ', body, flags=re.M)}\n\n"


def main() -> None:
    """Write both pages."""
    for name, page in (("cli", cli_page()), ("api", api_page())):
        (REFERENCE / f"{name}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
