"""A model's decoder, run block by block: only one block's weights are in memory at a time.

The modules are transformers' own, built on the meta device. Weights are read from the shards when
their block is due, as float32, and dropped after it. transformers' own rules map the names in the
files to its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.reader import Checkpoint, CheckpointError
from ..experts import expert_of
from .cache_means import CacheMeans
from .experts import run_one_by_one

__all__ = ["DecoderBlocks"]

_INSTEAD = "leave --calibrate out"


@dataclass(frozen=True)
class _Call:
    """How a model calls one of its blocks, without the hidden states."""

    by_name: bool
    """Whether the hidden states are the argument ``hidden_states`` and not the first one."""
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class _CallsKnownError(Exception):
    """Ends the model's forward pass at its last block."""


class _IndexesOutputsError(Exception):
    """The model takes the first entry of what its blocks return."""


class DecoderBlocks:
    """The repeated blocks of a model.

    Args:
        checkpoint: a 16-bit checkpoint.
        layers: names of linear layers, most of which lie in the blocks; experts among them.
        device: where the blocks run.

    Attributes:
        linear: those of `layers` that lie in a block and are modules -> its number.
        experts: those of `layers` that are matrices of routed experts, lie in a block and have
            inputs that can be seen -> its number.

    Raises:
        CheckpointError: if transformers does not have the model, or no blocks are found in it.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Collection[str], device: str) -> None:
        from ..transformers.names import parameter_names  # takes seconds

        self._checkpoint = checkpoint
        self._device = torch.device(device)
        self._model = _empty_model(checkpoint)
        names = parameter_names(self._model, checkpoint.tensors)
        self._conversions, self._parameters = names.conversions, names.parameters
        modules = {name: self._module_of(name) for name in layers if expert_of(name) is None}
        experts = self._modules_of_experts(layers)
        self._path = self._container(modules | experts, layers)
        self._blocks = list(self._model.get_submodule(self._path))
        self._modules, self.linear = self._in_blocks(modules)
        self._experts, self.experts = self._in_blocks(experts)
        self._calls: list[_Call] = []
        self._wrapped = False  # whether the blocks return tuples
        self._means: CacheMeans | None = None
        output, embedding = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        self._tied = output is not None and output.weight is embedding.weight

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    @property
    def longest(self) -> int | None:
        """The most tokens that the model takes; None if its config does not say."""
        length = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None

    def embed(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """Everything in front of the first block.

        Args:
            windows: int64 [samples, tokens].

        Returns:
            The first block's input for each window, float32 [1, tokens, width].

        Raises:
            CheckpointError: if the model passes to its blocks what depends on the text.
        """
        embedding, front = self._model.get_input_embeddings(), f"{self._path}."
        stored = self._checkpoint.tensors[self._source_of(embedding)]
        embedding.to({"BF16": torch.bfloat16, "F16": torch.float16}.get(stored.dtype))
        # the rest sees float32, and a large vocabulary stays as small as it is stored
        widen = embedding.register_forward_hook(lambda module, arguments, y: y.float())
        output = self._model.get_output_embeddings()
        head = None if output is None or self._tied else output.weight
        self._load(
            lambda name, tensor: not name.startswith(front) and tensor is not head,
            torch.device("cpu"),
        )
        inputs = []
        for number, window in enumerate(windows):
            calls, hidden = self._record(window[None])
            if number and not all(map(_alike, self._calls, calls)):
                raise CheckpointError(
                    f"{self._checkpoint.architecture}: what its blocks are given beside the hidden "
                    f"states depends on the text, which calibration does not support; {_INSTEAD}"
                )
            self._calls = calls
            inputs.append(hidden)
        widen.remove()
        self._drop_outside()
        return inputs

    @contextmanager
    def loaded(self, number: int) -> Iterator[dict[str, torch.nn.Linear]]:
        """Have a block's weights in memory inside the ``with`` block.

        Yields:
            Layer name -> its module, for the block's layers in :attr:`linear`.

        Raises:
            CheckpointError: if the checkpoint lacks a weight of the block.
        """
        block, front = self._blocks[number], f"{self._path}.{number}."
        self._load(lambda name, tensor: name.startswith(front), self._device)
        missing = [name for name, tensor in block.named_parameters() if tensor.is_meta]
        if missing:
            raise CheckpointError(
                f"{self._checkpoint.path}: holds no tensor for {front}{missing[0]}, which "
                f"transformers' {self._checkpoint.architecture} has; {_INSTEAD}"
            )
        block.to(self._device)  # buffers
        try:
            yield {
                name: self._model.get_submodule(self._modules[name])
                for name, holder in self.linear.items()
                if holder == number
            }
        finally:
            for module in block.modules():
                _drop(module)

    def experts_in(self, number: int) -> dict[str, torch.nn.Module]:
        """Name of the experts in the checkpoint -> their module, of a block."""
        return {
            expert.prefix: self._model.get_submodule(self._experts[name])
            for name, holder in self.experts.items()
            if holder == number and (expert := expert_of(name)) is not None
        }

    def drop_experts(self, number: int) -> None:
        """Free the experts' weights of a loaded block."""
        for module in self.experts_in(number).values():
            _drop(module)

    def block(self, number: int) -> torch.nn.Module:
        """The module of a block."""
        return self._blocks[number]

    def stored(self, number: int, parameter: str) -> tuple[str, torch.dtype] | None:
        """Name and dtype of the tensor that is a parameter of a block as it stands; else None."""
        path = f"{self._path}.{number}.{parameter}"
        names = [name for name, known in self._parameters.items() if known == path]
        if len(names) != 1:
            return None
        info = self._checkpoint.tensors[names[0]]
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.get(info.dtype)
        fits = tuple(info.shape) == tuple(self._model.get_parameter(path).shape)
        return (names[0], dtype) if dtype is not None and fits else None

    def watch_caches(self) -> None:
        """Let :meth:`means_seen` see what the blocks attend to; called before :meth:`embed`."""
        self._means = CacheMeans(self._model)

    @contextmanager
    def means_seen(self) -> Iterator[dict[str, torch.Tensor]]:
        """Note the keys and values of a block that runs inside the ``with`` block.

        Yields:
            A table that is filled at the end: tensor of the checkpoint -> mean, see
            :mod:`..cache_means`. Empty unless caches are watched.
        """
        found: dict[str, torch.Tensor] = {}
        if self._means is None:
            yield found
            return
        with self._means.seen() as sums:
            yield found
        paths = {module: path for path, module in self._model.named_modules()}
        for module, total in sums.items():
            name = self._stored_module(paths[module])
            found |= {f"{name}.{leaf}": mean for leaf, mean in total.means().items()}

    def _stored_module(self, path: str) -> str:
        """The checkpoint's name of a module, which holds one of its tensors at least."""
        front = f"{path}."
        for stored, parameter in self._parameters.items():
            if parameter.startswith(front):
                return stored.rsplit(".", parameter.removeprefix(front).count(".") + 1)[0]
        return path

    def run(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output of a loaded block, float32 [1, tokens, width], on the device of `hidden`."""
        with torch.no_grad():
            return self._output(number, hidden.to(self._device)).to(hidden.device)

    def differentiate(
        self, number: int, hidden: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of a number with respect to the input of a loaded block.

        Args:
            number: of the block.
            hidden: the block's input, float32 [1, tokens, width].
            gradient: that of the same number with respect to the block's output, of its shape.

        Returns:
            float32 [1, tokens, width], on the device of `hidden`.

        Raises:
            CheckpointError: if the block cannot be run alone, or not be differentiated.
        """
        given = hidden.detach().to(self._device).requires_grad_()
        output = self._output(number, given)
        try:
            (found,) = torch.autograd.grad(output, given, gradient.to(output.device))
        except RuntimeError as error:
            raise CheckpointError(
                f"{self._path}.{number}: its output cannot be differentiated ({_reason(error)}); "
                f"{_INSTEAD}"
            ) from None
        return found.to(hidden.device)

    def scores(self, windows: torch.Tensor, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """What moving the last block's output does to the model's predictions.

        At each position one token is drawn from the model's own distribution, always the same.
        The gradient of its log-likelihood has the mean 0 and the Fisher information as its second
        moment, which is what the KL divergence of a small change is made of.

        Args:
            windows: int64 [samples, tokens].
            hidden: the last block's output for each of them, float32 [1, tokens, width].

        Returns:
            For each window the gradient of the summed log-likelihood with respect to `hidden`.

        Raises:
            CheckpointError: if the model has no output projection, or predicts NaN.
        """
        self._load_head()
        draw = torch.Generator().manual_seed(0)
        found = []
        for window, state in zip(windows, hidden, strict=True):
            final = state.detach().cpu().requires_grad_()
            with _bypassed(self._blocks, final, self._wrapped):
                logits = self._model(input_ids=window[None], use_cache=False).logits
            share = logits.detach().float().softmax(-1)[0]
            if not bool(share.isfinite().all()):
                raise CheckpointError(
                    f"{self._checkpoint.path}: the model predicts NaN or Inf on the text; give "
                    f"other text, or {_INSTEAD}"
                )
            drawn = torch.multinomial(share, 1, generator=draw)
            score = share.neg_().scatter_add_(1, drawn, torch.ones(len(share), 1))
            (gradient,) = torch.autograd.grad(logits, final, score[None].to(logits.dtype))
            found.append(gradient.to(state.device))
            del logits, share, score
        self._drop_outside()
        return found

    def _output(self, number: int, given: torch.Tensor) -> torch.Tensor:
        """The output of a loaded block for an input on its device."""
        call = self._calls[number]
        arguments, keywords = _moved((call.arguments, call.keywords), self._device)
        try:
            if call.by_name:
                found = self._blocks[number](*arguments, hidden_states=given, **keywords)
            else:
                found = self._blocks[number](given, *arguments, **keywords)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self._path}.{number}: transformers cannot run this block alone "
                f"({_reason(error)}); {_INSTEAD}"
            ) from None
        return found[0] if isinstance(found, tuple) else found

    def _load_head(self) -> None:
        """Read what lies outside of the blocks, the output projection included, as float32."""
        embedding, front = self._model.get_input_embeddings(), f"{self._path}."
        output = self._model.get_output_embeddings()
        if output is None:
            raise CheckpointError(
                f"{self._checkpoint.architecture}: has no output projection, whose predictions "
                f"show what an error does; {_INSTEAD}"
            )
        embedding.float()
        self._load(lambda name, tensor: not name.startswith(front), torch.device("cpu"))
        if self._tied:
            output.weight = embedding.weight
        if output.weight.is_meta:
            raise CheckpointError(
                f"{self._checkpoint.path}: holds no tensor for its output projection; {_INSTEAD}"
            )

    def _drop_outside(self) -> None:
        """Free what lies outside of the blocks."""
        for name, module in self._model.named_modules():
            if not f"{name}.".startswith(f"{self._path}."):
                _drop(module)

    def _module_of(self, layer: str) -> str:
        """Path of the module that transformers has for a layer.

        Raises:
            CheckpointError: if it has none, or another one.
        """
        path, _, leaf = self._parameters.get(f"{layer}.weight", "").rpartition(".")
        module = self._model.get_submodule(path) if path else None
        shape = self._checkpoint.tensors[f"{layer}.weight"].shape
        if (
            leaf == "weight"
            and isinstance(module, torch.nn.Linear)
            and module.weight.shape == shape
        ):
            return path
        raise CheckpointError(
            f"{layer}: transformers has no linear layer of {list(shape)} for it in "
            f"{self._checkpoint.architecture}; --ignore it, or {_INSTEAD}"
        )

    def _modules_of_experts(self, layers: Collection[str]) -> dict[str, str]:
        """Matrix of an expert -> path of the module that runs the experts one by one."""
        stored = self._checkpoint.tensors
        holders = {
            layer: tensor for tensor in stored for layer in self._checkpoint.layers_in(tensor)
        }
        paths = {
            name: self._parameters[holders[name]].rpartition(".")[0]
            for name in layers
            if expert_of(name) is not None
        }
        modules = dict(self._model.named_modules())
        seen = {
            path for path in set(paths.values()) & set(modules) if run_one_by_one(modules[path])
        }
        return {name: path for name, path in paths.items() if path in seen}

    def _in_blocks(self, modules: Mapping[str, str]) -> tuple[dict[str, str], dict[str, int]]:
        """Layers in the blocks -> path of the module, and -> number of the block."""
        front = f"{self._path}."
        inside = {name: path for name, path in modules.items() if path.startswith(front)}
        numbers = {n: int(p.removeprefix(front).partition(".")[0]) for n, p in inside.items()}
        return inside, numbers

    def _container(self, modules: Mapping[str, str], layers: Collection[str]) -> str:
        """Path of the list of blocks that holds most of the modules."""
        found: dict[str, int] = {}
        for path in modules.values():
            parts = path.split(".")
            for end in range(1, len(parts)):
                parent = ".".join(parts[:end])
                if isinstance(self._model.get_submodule(parent), torch.nn.ModuleList):
                    found[parent] = found.get(parent, 0) + 1
                    break
        if not found:
            raise CheckpointError(
                f"{self._checkpoint.architecture}: no repeated blocks are found around "
                f"{next(iter(layers))} in transformers' model; {_INSTEAD}"
            )
        return max(found, key=lambda path: found[path])

    def _source_of(self, embedding: torch.nn.Module) -> str:
        """The stored tensor of the embedding, whatever it is called."""
        owner = next(n for n, m in self._model.named_modules() if m is embedding)
        for stored, name in self._parameters.items():
            if name == f"{owner}.weight":
                return stored
        raise CheckpointError(
            f"{self._checkpoint.path}: holds no tensor for the embedding {owner}.weight; {_INSTEAD}"
        )

    def _load(self, wanted: Callable[[str, torch.Tensor], bool], device: torch.device) -> None:
        """Read the parameters and buffers that are wanted, as the dtype of the empty model."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        held = self._model.state_dict(keep_vars=True)
        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            tensors = {}
            for stored, name in self._parameters.items():
                if name in held and wanted(name, held[name]):
                    shard = self._checkpoint.tensors[stored].shard
                    if shard not in opened:
                        opened[shard] = stack.enter_context(self._checkpoint.open_shard(shard))
                    # in this thread: memory that transformers' threads free does not come back
                    tensors[stored] = opened[shard].get_tensor(stored).to(device, held[name].dtype)
            settings = LoadStateDictConfig(
                dtype=torch.float32, weight_mapping=self._conversions, device_map={"": device}
            )
            with _no_bars():
                convert_and_load_state_dict_in_model(self._model, tensors, settings)

    def _record(self, tokens: torch.Tensor) -> tuple[list[_Call], torch.Tensor]:
        """Run the model with blocks that only note how they are called."""
        for wrapped in (False, True):
            recorder = _Recorder(self._blocks, wrapped)
            try:
                with torch.no_grad():
                    self._model.get_decoder()(input_ids=tokens, use_cache=False)
            except _CallsKnownError:
                self._wrapped = wrapped
                return recorder.calls, recorder.hidden
            except _IndexesOutputsError:
                continue
            except Exception as error:
                raise CheckpointError(
                    f"{self._checkpoint.architecture}: transformers cannot run what lies in front "
                    f"of the blocks ({_reason(error)}); {_INSTEAD}"
                ) from None
            finally:
                recorder.remove()
        raise CheckpointError(
            f"{self._checkpoint.architecture}: its blocks are not called one after another; "
            f"{_INSTEAD}"
        )


class _Recorder:
    """Stands in for the forward passes of blocks, and notes how each is called.

    Args:
        blocks: in the order in which the model calls them.
        wrapped: whether blocks return tuples.
    """

    def __init__(self, blocks: list[torch.nn.Module], wrapped: bool) -> None:
        self.calls: list[_Call] = []
        self.hidden = torch.empty(0)
        self._blocks, self._wrapped = blocks, wrapped
        for number, block in enumerate(blocks):
            block.forward = self._stand_in(number)

    def remove(self) -> None:
        """Give the blocks their own forward passes back."""
        for block in self._blocks:
            del block.forward  # the instance's, which hid that of the class

    def _stand_in(self, number: int) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            by_name = not arguments
            hidden = keywords.pop("hidden_states") if by_name else arguments[0]
            if number != len(self.calls):
                raise ValueError(f"block {number} is called in place {len(self.calls)}")
            if not number:
                self.hidden = hidden
            elif hidden.shape != self.hidden.shape:
                raise _IndexesOutputsError
            self.calls.append(_Call(by_name, arguments[1:], keywords))
            if len(self.calls) == len(self._blocks):
                raise _CallsKnownError
            return (hidden,) if self._wrapped else hidden

        return forward


@contextmanager
def _bypassed(blocks: list[torch.nn.Module], final: torch.Tensor, wrapped: bool) -> Iterator[None]:
    """Have blocks that do nothing, but for the last, which returns `final`."""

    def stand_in(last: bool) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            given = arguments[0] if arguments else keywords["hidden_states"]
            output = final if last else given
            return (output,) if wrapped else output

        return forward

    for block in blocks:
        block.forward = stand_in(block is blocks[-1])
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _empty_model(checkpoint: Checkpoint) -> Any:
    """The model without its weights; what it computes itself, such as rotary frequencies, is there.

    Raises:
        CheckpointError: if transformers does not have it.
    """
    import transformers

    name = checkpoint.architecture
    found = getattr(transformers, name, None)
    if found is None:
        raise CheckpointError(
            f"{name}: transformers {transformers.__version__} does not have this architecture, "
            f"whose blocks calibration runs; {_INSTEAD}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = found._from_config(config, dtype=torch.float32).eval()
        for module in model.modules():
            for buffer in module._non_persistent_buffers_set & module._buffers.keys():
                tensor = module._buffers[buffer]
                if tensor is not None:  # NaN shows where nothing is computed
                    unknown = torch.nan if tensor.is_floating_point() else 0
                    module._buffers[buffer] = torch.full_like(tensor, unknown, device="cpu")
            module._is_hf_initialized = False
        model.initialize_weights()  # costs nothing where weights are on the meta device
    except Exception as error:  # transformers raises whatever its parts do
        raise CheckpointError(
            f"{checkpoint.path}: transformers cannot build {name} ({_reason(error)}); {_INSTEAD}"
        ) from None
    return model


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers' own progress bars switched off."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _drop(module: torch.nn.Module) -> None:
    """Free the parameters that a module itself holds."""
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = torch.nn.Parameter(
                parameter.detach().to("meta"), requires_grad=False
            )


def _moved(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(entry, device) for entry in value)
    return value


def _alike(first: _Call, second: _Call) -> bool:
    """Whether two calls of a block differ in the hidden states only."""
    return _equal((first.arguments, first.keywords), (second.arguments, second.keywords))


def _equal(first: Any, second: Any) -> bool:
    """Whether the same tensors stand in both."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[k], second[k]) for k in first)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(map(_equal, first, second))
    return isinstance(first, torch.Tensor) == isinstance(second, torch.Tensor)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {text}"
