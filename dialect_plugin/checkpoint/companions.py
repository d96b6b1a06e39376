"""The files beside the weights: which of them a converted checkpoint keeps, and which it leaves.

Kept are tokenizer, templates, generation and licence files of the checkpoint's own directory, and
the small files in folders that its JSON files refer to, such as ``1_Pooling/config.json``. Python
code and pickles are never copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .json_files import load_json
from .reader import CONFIG, INDEX, Checkpoint, CheckpointError

__all__ = ["Companions", "find_companions", "without_local_code"]

_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".bpe"}
_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
_CODE = ".py"
_WEIGHTS = ".safetensors"
_MODULES = "modules.json"
_VOCABULARIES = ("tokenizer.json", "vocab.json", INDEX)
"""JSON files of thousands of strings, none of which is a path or names code."""
_TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")
"""Folders that transformers reads without a file that refers to them."""
_OTHER_FORMAT_CONFIG = "params.json"
_REPLACED = {CONFIG, "README.md", ".gitattributes"}
"""Files that a conversion writes itself, or that belong to a repository and not to a model."""


@dataclass(frozen=True)
class Companions:
    """What a conversion does with the files beside the weights.

    Attributes:
        copied: files to copy, as paths inside the checkpoint's directory.
        left_out: files and folders that are not copied, likewise.
        code: JSON files with ``auto_map`` entries that point to Python files of the checkpoint ->
            these entries' keys.
    """

    copied: tuple[PurePosixPath, ...]
    left_out: tuple[str, ...]
    code: dict[str, tuple[str, ...]]


def find_companions(checkpoint: Checkpoint) -> Companions:
    """Sort the files beside the weights into those that are kept and those that are left out.

    Raises:
        CheckpointError: if a module of a sentence-transformers model has its weights in a pickle
            only: the engine would leave the module out without a word.
    """
    root = checkpoint.path
    files = [file.name for file in sorted(root.iterdir()) if file.is_file()]
    two_formats = any(name.startswith("consolidated") for name in files)
    copied = [
        PurePosixPath(name)
        for name in files
        if _is_kept(name) and not (two_formats and name == _OTHER_FORMAT_CONFIG)
    ]
    modules = _module_folders(root)
    wanted = {*_references(root, [CONFIG, *(str(name) for name in copied)]), *modules}
    for relative in _files_below(root):
        parents = {str(parent) for parent in relative.parents}
        if relative.name.startswith("consolidated") or not (
            str(relative) in wanted or parents & (wanted | set(_TEMPLATE_FOLDERS))
        ):
            continue
        is_weight = relative.suffix == _WEIGHTS and bool(parents & modules)
        if relative.name == CONFIG or _is_kept(relative.name) or is_weight:
            copied.append(relative)
    _check_modules(root, modules, copied)
    return Companions(
        tuple(copied),
        tuple(_left_out(checkpoint, files, {str(name) for name in copied})),
        dict(_local_code(root, [CONFIG, *(str(n) for n in copied if n.suffix == ".json")])),
    )


def without_local_code(config: dict[str, Any]) -> dict[str, Any]:
    """`config` without the entries of ``auto_map`` that point to files of the checkpoint.

    Entries that point to a repository of the hub (``organisation/model--module.Class``) stay.
    """
    local = _local_keys(config)
    if not local:
        return config
    kept = {key: value for key, value in config["auto_map"].items() if key not in local}
    rest = {key: value for key, value in config.items() if key != "auto_map"}
    return rest | ({"auto_map": kept} if kept else {})


def _is_kept(name: str) -> bool:
    suffix = PurePosixPath(name).suffix
    if name == CONFIG or name.startswith(".") or name.endswith(".index.json") or suffix == _CODE:
        return False
    return suffix in _SUFFIXES or name.startswith(_NAMES)


def _files_below(root: Path) -> list[PurePosixPath]:
    """The files in folders, but for hidden ones; nested ``config.json`` belong to modules.

    Links to folders are not followed: one could lead to everything on the machine.
    """
    found = []
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.is_symlink() or folder.name.startswith("."):
            continue
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                found.append(PurePosixPath(file.relative_to(root).as_posix()))
    return found


def _references(root: Path, names: list[str]) -> set[str]:
    """Everything in the JSON files that is the relative path of a file or folder."""
    found = set()
    for name in names:
        if not name.endswith(".json") or name in _VOCABULARIES:
            continue
        for text in _strings(_json(root / name)):
            if _is_inside(text) and (root / text).exists():
                found.add(str(PurePosixPath(text)))
    return found


def _is_inside(text: str) -> bool:
    """Whether a string can be the path of something inside the checkpoint's directory."""
    path = PurePosixPath(text)
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in text
    possible = len(text) < 256 and all(len(part.encode()) < 256 for part in path.parts)
    return bool(path.parts) and inside and possible


def _module_folders(root: Path) -> set[str]:
    """Folders of the modules of a sentence-transformers model."""
    modules = _json(root / _MODULES)
    entries = modules if isinstance(modules, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return {
        str(PurePosixPath(path))
        for path in paths
        if isinstance(path, str) and _is_inside(path) and (root / path).is_dir()
    }


def _check_modules(root: Path, modules: set[str], copied: list[PurePosixPath]) -> None:
    for folder in sorted(modules):
        if (root / folder).is_symlink():
            raise CheckpointError(
                f"{root / folder}: is a link, and links to folders are not followed; put the "
                "folder itself there"
            )
        files = [file for file in sorted((root / folder).iterdir()) if file.is_file()]
        pickles = [file.name for file in files if file.suffix in _PICKLES]
        kept = {str(name) for name in copied}
        if pickles and not any(f"{folder}/{f.name}" in kept for f in files if f.suffix == _WEIGHTS):
            raise CheckpointError(
                f"{root / folder}: holds its weights in {pickles[0]} only, a pickle, which is "
                "never read or copied; save the model with sentence-transformers' "
                "save_pretrained, which writes model.safetensors"
            )


def _left_out(checkpoint: Checkpoint, files: list[str], copied: set[str]) -> Iterator[str]:
    written = {*checkpoint.shards, INDEX, *_REPLACED}
    for name in files:
        if name not in written and name not in copied and not name.startswith("."):
            yield name
    for folder in sorted(path for path in checkpoint.path.iterdir() if path.is_dir()):
        if folder.name.startswith("."):
            continue
        below = [str(n) for n in _files_below(checkpoint.path) if n.parts[0] == folder.name]
        if not copied.intersection(below):
            yield f"{folder.name}/"
        else:
            yield from (name for name in below if name not in copied)


def _local_code(root: Path, names: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name in names:
        data = None if name in _VOCABULARIES else _json(root / name)
        local = _local_keys(data) if isinstance(data, dict) else ()
        if local:
            yield name, local


def _local_keys(config: dict[str, Any]) -> tuple[str, ...]:
    """The keys of ``auto_map`` whose classes lie in Python files of the checkpoint."""
    entries = config.get("auto_map")
    if not isinstance(entries, dict):
        return ()
    return tuple(key for key, value in entries.items() if any(map(_is_local, _strings(value))))


def _is_local(reference: str) -> bool:
    return "--" not in reference


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)


def _json(path: Path) -> Any:
    """What a JSON file holds; None if it is missing or damaged, which is its reader's affair."""
    try:
        return load_json(path)
    except CheckpointError:
        return None
