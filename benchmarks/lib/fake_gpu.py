"""A GPU that is not there: what a program would launch on one is counted, and nothing is computed.

PyTorch's fake tensors stand for tensors on the device, and a driver of our own takes the place of
Triton's, so that every kernel reaches the compiler with the arguments a real launch would have.
A clock that nobody waits for adds up what the launches would take if each took
:data:`LAUNCH_S`. Numbers from here are estimates of a session's length and are never results.

:func:`install` changes torch and Triton for the rest of the process; start one for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget

__all__ = ["LAUNCH_S", "NAME", "FakeGpu", "driver", "install"]

NAME = "NVIDIA H200"
CAPABILITY = (9, 0)
PROCESSORS = 132
LAUNCH_S = 50e-6
"""Seconds on the device for each launch: a layer's product for few tokens takes less, one for many
more."""
_HOST_S = 1e-3
"""Seconds of the host for a launch that no graph replays: about five of 200 µs, as the small cache
of this device lets benchmarks make few copies of a weight."""
_CACHE = 4 << 20
_SHARED = 227 << 10


@dataclass
class FakeGpu:
    """What has happened on the device.

    Attributes:
        clock_s: seconds that launches and waiting would have taken.
        launches: of all kernels, and of products that a library computes.
        kernels: one entry for each kernel that Triton would have to compile: its module, its name
            and what Triton's ``preload`` compiles it from.
    """

    clock_s: float = 0.0
    launches: int = 0
    kernels: list[tuple[str, str, str]] = field(default_factory=list)
    _graph: Graph | None = None
    _known: set[tuple[str, str, str]] = field(default_factory=set)

    def launch(self) -> None:
        """Count a launch: on the device, or into the graph that is being captured."""
        self.launches += 1
        self.clock_s += _HOST_S
        if self._graph is None:
            self.clock_s += LAUNCH_S
        else:
            self._graph.launches += 1

    def wants(self, *, fn: Any, key: str, compile: dict[str, Any], **_: object) -> bool:
        """Triton's hook before it compiles; True keeps it from compiling."""
        known = (fn.module, fn.name, key)
        if known not in self._known:
            self._known.add(known)
            name = fn.name.rpartition(".")[2]
            self.kernels.append((fn.module, name, compile["specialization_data"]))
        self.launch()
        return True

    @contextlib.contextmanager
    def capture(self, graph: Graph, **_: object) -> Iterator[None]:
        """As :class:`torch.cuda.graph`."""
        self._graph = graph
        try:
            yield
        finally:
            self._graph = None


class Graph:
    """As :class:`torch.cuda.CUDAGraph`; :func:`install` says on which device."""

    gpu: FakeGpu

    def __init__(self) -> None:
        self.launches = 0

    def replay(self) -> None:
        """Let the time of the captured launches pass."""
        self.gpu.clock_s += max(1, self.launches) * LAUNCH_S


class Event:
    """As :class:`torch.cuda.Event`."""

    gpu: FakeGpu

    def __init__(self, **_: object) -> None:
        self.at_s = 0.0

    def record(self, *_: object) -> None:
        """Remember the time."""
        self.at_s = self.gpu.clock_s

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from here to `end`."""
        return 1e3 * (end.at_s - self.at_s)


class _Generator(torch.Generator):
    """On whatever device, the CPU's."""

    def __new__(cls, device: object = "cpu") -> _Generator:
        del device
        return super().__new__(cls, "cpu")


class _Nothing:
    """A launcher that launches nothing."""

    def __init__(self, *_: object) -> None: ...

    def __call__(self, *_: object) -> None: ...


def driver(capability: tuple[int, int] = CAPABILITY) -> SimpleNamespace:
    """What Triton asks of a driver, for a device of `capability`."""
    major, minor = capability
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024),
        get_device_properties=lambda _: {
            "max_shared_mem": _SHARED,
            "multiprocessor_count": PROCESSORS,
        },
    )
    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
        get_active_torch_device=lambda: torch.device("cuda", 0),
        launcher_cls=_Nothing,
        utils=utils,
    )


def install() -> FakeGpu:
    """Make this process believe that it has an H200."""
    gpu = FakeGpu()
    triton.runtime.driver.set_active(driver())
    triton.knobs.runtime.jit_cache_hook = gpu.wants
    _replace_cuda(gpu)
    _let_fake_tensors_answer(gpu)
    _run_ops_themselves()
    FakeTensorMode().__enter__()
    return gpu


def _replace_cuda(gpu: FakeGpu) -> None:
    properties = SimpleNamespace(
        name=NAME,
        multi_processor_count=PROCESSORS,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        L2_cache_size=_CACHE,
        total_memory=139 << 30,
    )
    Graph.gpu = Event.gpu = gpu

    def ignoring(value: Any = None) -> Callable[..., Any]:
        return lambda *_, **__: value

    stream = SimpleNamespace(wait_stream=ignoring(), synchronize=ignoring(), cuda_stream=0)
    for name, answer in {
        "is_available": ignoring(True),
        "device_count": ignoring(1),
        "current_device": ignoring(0),
        "get_device_name": ignoring(NAME),
        "get_device_capability": ignoring(CAPABILITY),
        "get_device_properties": ignoring(properties),
        "mem_get_info": ignoring((139 << 30, 139 << 30)),
        "is_current_stream_capturing": lambda: gpu._graph is not None,
        "synchronize": ignoring(),
        "empty_cache": ignoring(),
        "device": ignoring(contextlib.nullcontext()),
        "stream": ignoring(contextlib.nullcontext()),
        "Stream": ignoring(stream),
        "current_stream": ignoring(stream),
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": gpu.capture,
    }.items():
        setattr(torch.cuda, name, answer)
    torch.Generator = _Generator  # type: ignore[misc]


def _let_fake_tensors_answer(gpu: FakeGpu) -> None:
    """Values that are not there compare equal, and are one; addresses are aligned."""

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            gpu.launch()
            return function(*arguments, **options)

        return call

    answers: dict[str, Callable[..., Any]] = {
        "data_ptr": lambda _: 0,
        "__bool__": lambda _: True,
        "__int__": lambda _: 1,
        "__float__": lambda _: 1.0,
        "item": lambda _: 1,
        "__getitem__": _indexed,
        "__setitem__": lambda *_: None,
        "to": _moved,
        "cuda": lambda tensor: _moved(tensor, "cuda"),
        "copy_": lambda tensor, *_, **__: tensor,  # PyTorch's fake one needs its CUDA build
        "tolist": lambda tensor: [1] * tensor.numel(),
    }
    for name, answer in answers.items():
        setattr(FakeTensor, name, answer)
    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        value = made(data, **options)  # on the device itself it would need PyTorch's CUDA build
        return value if device is None else value.to(device)

    torch.tensor = tensor
    torch.equal = lambda *_: True
    torch._scaled_mm = counted(torch._scaled_mm)
    torch.nn.functional.linear = counted(torch.nn.functional.linear)


def _moved(tensor: torch.Tensor, *to: Any, **options: Any) -> torch.Tensor:
    """``tensor.to(...)`` with the device's number, which only PyTorch's CUDA build looks up."""

    def numbered(value: Any) -> Any:
        return torch.device("cuda", 0) if str(value) == "cuda" else value

    named = {name: numbered(value) for name, value in options.items()}
    return _TO(tensor, *map(numbered, to), **named)


_TO = torch.Tensor.to


def _indexed(tensor: torch.Tensor, key: Any) -> torch.Tensor:
    """``tensor[key]``, whose own way to a fake tensor on a GPU needs PyTorch's CUDA build."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in [part for part in keys if not isinstance(part, torch.Tensor)]:
        at = next(i for i, part in enumerate(keys) if part is Ellipsis)
        there = sum(part is not None for part in keys) - 1
        keys[at : at + 1] = [slice(None)] * (tensor.dim() - there)
    dim = 0
    for part in keys:
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
        elif isinstance(part, int):
            tensor, dim = tensor.select(dim, part), dim - 1
        else:
            before = [None] * dim
            tensor = torch.ops.aten.index.Tensor(tensor, [*before, torch.as_tensor(part)])
        dim += 1
    return tensor


def _run_ops_themselves() -> None:
    """PyTorch answers a torch op on fake tensors with its fake; ours has to launch its kernels."""
    from dialect_kernels import ops

    ops.linear = ops._linear  # type: ignore[assignment]
    ops.semantic_op = ops._semantic_linear  # type: ignore[assignment]
    ops.grouped_linear = ops._grouped_linear  # type: ignore[assignment]
    ops.embedding = ops._embedding  # type: ignore[assignment]
