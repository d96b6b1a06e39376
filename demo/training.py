"""What the trainings of both small models share: checkpoints, updates, records, model cards."""

from __future__ import annotations

import csv
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

__all__ = ["Checkpoint", "Optimizers", "render_card", "update", "versions", "write_record"]

Optimizers: TypeAlias = list[tuple[torch.optim.Optimizer, float]]
"""Optimizers, each with its full learning rate."""


class Checkpoint:
    """Model, optimizers and progress in one safetensors file, replaced atomically.

    Args:
        folder: where ``checkpoint.safetensors`` lies.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "checkpoint.safetensors"

    def save(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        progress: dict[str, Any],
    ) -> None:
        """Replace the file; `progress` is JSON data."""
        tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
        for i, (optimizer, _) in enumerate(optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"optimizer/{i}/{index}/{key}"] = value
        temporary = self._path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"progress": json.dumps(progress)})
        temporary.replace(self._path)

    def progress(self) -> dict[str, Any] | None:
        """The `progress` of the last `save`; None without a file."""
        if not self._path.exists():
            return None
        with safetensors.safe_open(self._path, "pt") as opened:
            found: dict[str, Any] = json.loads(opened.metadata()["progress"])
        return found

    def load_model(self, model: nn.Module) -> None:
        """Load the saved weights into `model`."""
        tensors = load_file(self._path)
        weights = {name: value for name, value in tensors.items() if name.startswith("model/")}
        model.load_state_dict({name.removeprefix("model/"): v for name, v in weights.items()})

    def load_optimizers(self, optimizers: Optimizers) -> None:
        """Load the saved states into `optimizers`, which stand in the order of `save`."""
        states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
        for name, value in load_file(self._path).items():
            if name.startswith("optimizer/"):
                _, i, index, key = name.split("/")
                states[int(i)].setdefault(int(index), {})[key] = value
        for (optimizer, _), state in zip(optimizers, states, strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def update(model: nn.Module, optimizers: Optimizers, share: float, gradient_clip: float) -> None:
    """Clip the gradients, make one step at `share` of the full learning rates, forget them."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
    for optimizer, rate in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of `packages`, and the kind of CPU: what a run depends on."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def write_record(folder: Path, run: dict[str, Any], curve: list[dict[str, Any]]) -> None:
    """Write what is known of a run to ``run.json`` and its curve to ``loss.csv``."""
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    with (folder / "loss.csv").open("w", newline="") as opened:
        writer = csv.DictWriter(opened, curve[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)


def render_card(template: Path, **values: object) -> str:
    """A model card, Markdown, from a Jinja template; every variable in it must be given."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)
