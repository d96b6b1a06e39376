"""The 16-bit model in transformers, with layers and attention that can be exchanged."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..checkpoint.reader import Checkpoint, CheckpointError
from ..experts import expert_of
from .attention import AttentionRounding, rounded_attention

__all__ = ["EvaluatedModel", "projection_of"]


class EvaluatedModel:
    """A 16-bit model whose layers another format may stand in for.

    Args:
        checkpoint: the 16-bit checkpoint.
        layers: names of linear layers, of matrices of experts, and of embeddings as the checkpoint
            stores them.
        device: where it runs.

    Attributes:
        layers: layer -> its module; of a matrix of an expert, a linear layer that shares it.
        experts: what the checkpoint calls the experts of a decoder layer -> their module.
        projections: embeddings -> the output projection that is tied to them.

    Raises:
        CheckpointError: if transformers cannot load the model, or has no such layers.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Collection[str], device: str) -> None:
        from ..transformers.expert_stacks import places_of  # takes seconds
        from ..transformers.names import parameter_names

        self._checkpoint = checkpoint
        self._model = _loaded(checkpoint).to(device)
        self._device = torch.device(device)
        parameters = parameter_names(self._model, checkpoint.tensors).parameters
        self._parameters = parameters
        single = [layer for layer in layers if expert_of(layer) is None]
        paths = {layer: self._path_of(layer, parameters) for layer in single}
        self.layers: dict[str, torch.nn.Linear | torch.nn.Embedding] = {
            layer: self._model.get_submodule(path) for layer, path in paths.items()
        }
        self.projections: dict[str, torch.nn.Linear] = {}
        for path, module in self._model.named_modules():
            for layer, embeddings in self.layers.items():
                if module is not embeddings and _is_tied(module, embeddings):
                    self.projections[layer] = module
                    paths[projection_of(layer)] = path
        self.experts = places_of(self._model, layers)
        paths |= {name: place.path for name, place in self.experts.items()}
        self._paths = paths
        self._originals = {name: self._model.get_submodule(path) for name, path in paths.items()}
        for name, place in self.experts.items():
            for number, part, weight in place.layout.matrices(place.module):
                self.layers[f"{name}.{number}.{part}"] = _sharing(weight)

    @property
    def dtype(self) -> str:
        """Of the model's numbers, such as ``"bfloat16"``."""
        return str(self._model.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def logits(self, window: torch.Tensor) -> torch.Tensor:
        """Predictions of every token of a window but the first.

        Args:
            window: int64 [T].

        Returns:
            [T - 1, V] on the model's device.
        """
        found = self._model(window[None].to(self._device), use_cache=False).logits
        rows: torch.Tensor = found[0, :-1]
        return rows

    @contextmanager
    def replaced(
        self,
        modules: Mapping[str, torch.nn.Module],
        attention: AttentionRounding | None,
        tensors: Mapping[str, torch.Tensor],
    ) -> Iterator[None]:
        """Run other layers inside the ``with`` block.

        Args:
            modules: layer, or experts of a decoder layer -> what runs in their place;
                :func:`projection_of` names a projection that is tied to embeddings.
            attention: how the operands of attention's products are rounded; None leaves them.
            tensors: other numbers for parameters outside of these layers, by their stored names.

        Raises:
            CheckpointError: if attention cannot be rounded in this model.
        """
        self._put(modules)
        held = [
            (self._model.get_parameter(self._parameters[name]), tensors[name]) for name in tensors
        ]
        before = [parameter.data for parameter, _ in held]
        for parameter, tensor in held:
            parameter.data = tensor.to(parameter)
        try:
            if attention is None:
                yield
            else:
                with rounded_attention(self._model, attention, self._checkpoint.architecture):
                    yield
        finally:
            for (parameter, _), data in zip(held, before, strict=True):
                parameter.data = data
            self._put(self._originals)

    def _put(self, modules: Mapping[str, torch.nn.Module]) -> None:
        for layer, module in modules.items():
            parent, _, leaf = self._paths[layer].rpartition(".")
            setattr(self._model.get_submodule(parent), leaf, module)

    def _path_of(self, layer: str, parameters: Mapping[str, str]) -> str:
        """Path of the module that transformers has for a layer."""
        path = parameters.get(f"{layer}.weight", "").removesuffix(".weight")
        try:
            module = self._model.get_submodule(path) if path else None
        except AttributeError:
            module = None
        shape = self._checkpoint.tensors[f"{layer}.weight"].shape
        known = (torch.nn.Linear, torch.nn.Embedding)
        if isinstance(module, known) and tuple(module.weight.shape) == shape:
            return path
        raise CheckpointError(
            f"{layer}: transformers has no layer of {list(shape)} for it in "
            f"{self._checkpoint.architecture}, so that it cannot be evaluated; serve the model and "
            "measure it there"
        )


def projection_of(layer: str) -> str:
    """What the output projection that is tied to the embeddings `layer` is called here."""
    return f"{layer}, as output projection"


def _sharing(weight: torch.Tensor) -> torch.nn.Linear:
    """A linear layer with this weight [N, K], of which it makes no copy."""
    with torch.device("meta"):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def _is_tied(module: torch.nn.Module, embeddings: torch.nn.Module) -> bool:
    """Whether a module is a linear layer with the weight of embeddings."""
    is_pair = isinstance(module, torch.nn.Linear) and isinstance(embeddings, torch.nn.Embedding)
    return is_pair and module.weight is embeddings.weight


def _loaded(checkpoint: Checkpoint) -> Any:
    """transformers' model in the dtype of the checkpoint."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype="auto", local_files_only=True, trust_remote_code=False
        ).eval()
    except Exception as error:  # transformers raises whatever its parts do
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise CheckpointError(
            f"{checkpoint.path}: transformers cannot load the model ({type(error).__name__}: "
            f"{reason}); serve the model and measure it there"
        ) from None
    finally:
        if shown:
            logging.enable_progress_bar()
