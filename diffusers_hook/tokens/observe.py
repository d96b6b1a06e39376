"""The queries and keys of a block's attention, observed where diffusers computes it.

A processor's ``__call__`` ends in one call of diffusers' ``dispatch_attention_fn`` or of
``F.scaled_dot_product_attention``; the queries and keys exist nowhere else, after norms and rotary
embedding. We give the processor a subclass of its own class whose ``__call__`` is the same source
with that one call going through the processor itself::

    hidden_states = dispatch_attention_fn(query, key, value, ...)                       # diffusers
    hidden_states = self._tokens_first(dispatch_attention_fn, query, key, value, ...)   # observed

Where a processor calls a function of its own that applies the rotary embedding and attends
(Open-Sora: ``attention(q, k, v, pe)``), a copy of that function is rewritten in the same way and
becomes a method of the subclass.

No function of diffusers or torch is patched, so other models and other threads see nothing of it;
compilers trace through it; and the signature, which diffusers inspects, stays.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Collection
from typing import Any

import torch

from ..layouts import LayoutError
from . import ops

__all__ = ["Observed", "observed_class", "observed_processor"]

_CALLS = {
    "dispatch_attention_fn": "_tokens_first",
    "flash_attn_func": "_tokens_first",
    "F.scaled_dot_product_attention": "_heads_first",
}
"""Functions that attend, and the method of :class:`Observed` that knows their order of axes."""

_ENTERED = ("attention",)
"""Functions that do more than attend; they are rewritten too."""

_Function = types.FunctionType


class Observed:
    """The methods that an observed processor has besides those of its own class."""

    _slot: torch.Tensor

    def _tokens_first(
        self,
        attend: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Observe, then attend; tensors are [rows, tokens, heads, head dim]."""
        self._observe(query.transpose(1, 2), key.transpose(1, 2), attn_mask, options)
        if attn_mask is not None:
            options["attn_mask"] = attn_mask
        return attend(query, key, value, **options)

    def _heads_first(
        self,
        attend: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Observe, then attend; tensors are [rows, heads, tokens, head dim]."""
        self._observe(query, key, attn_mask, options)
        return attend(query, key, value, attn_mask=attn_mask, **options)

    def _observe(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> None:
        if mask is None or isinstance(mask, torch.Tensor):  # sparse attention has a mask of blocks
            scale = options.get("scale", options.get("softmax_scale"))
            ops.observe(query, key, mask, self._slot, scale)


def observed_processor(processor: Any, slot: torch.Tensor) -> Any:
    """A copy of an attention processor that shows its queries and keys to a block's state.

    Args:
        processor: an instance of one of diffusers' processor classes.
        slot: the block's slot.

    Raises:
        LayoutError: if its ``__call__`` has no attention call that could be observed, or no source.
    """
    observed = copy.copy(processor)
    observed.__class__ = observed_class(type(processor))
    observed._slot = slot
    return observed


_observed: dict[type, type] = {}


def observed_class(original: type) -> type:
    """The observed subclass of a processor class; one for all blocks: they share compiled code.

    Raises:
        LayoutError: if its ``__call__`` has no attention call that could be observed, or no source.
    """
    if original not in _observed:
        call = _function(original.__call__)
        entered = {
            name: call.__globals__[name]
            for name in _ENTERED
            if name in call.__code__.co_names and isinstance(call.__globals__.get(name), _Function)
        }
        body: dict[str, Any] = {"__call__": _rewritten(original.__call__, entered)}
        for name, function in entered.items():
            body[_method(name)] = _rewritten(function, (), instance="_observed")
        body["__module__"] = original.__module__
        _observed[original] = type(original.__name__, (Observed, original), body)
    return _observed[original]


def _method(name: str) -> str:
    """The method of an observed processor that a function becomes."""
    return f"_entered_{name}"


def _function(function: Callable[..., Any]) -> types.FunctionType:
    """The function inside its decorators."""
    inner = inspect.unwrap(function)
    if not isinstance(inner, _Function):
        raise LayoutError(f"{function!r} is no Python function; its attention cannot be observed")
    return inner


def _rewritten(
    function: Callable[..., Any], entered: Collection[str], instance: str | None = None
) -> Callable[..., Any]:
    """The same function with its attention calls going through its processor.

    Args:
        function: a method of the processor, or a function that becomes one.
        entered: functions it calls that become methods too.
        instance: for a function, the name of the argument that it gets in front of its own.

    Raises:
        LayoutError: if it has no attention call, or no source.
    """
    inner = _function(function)
    try:
        lines, first = inspect.getsourcelines(inner)
    except OSError:
        raise LayoutError(
            f"{inner.__qualname__}: has no source file, which is read to observe its attention"
        ) from None
    tree = ast.parse(textwrap.dedent("".join(lines)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    if instance is not None:
        definition.args.args.insert(0, ast.arg(instance))
    rewriter = _Rewriter(definition.args.args[0].arg, entered)
    rewriter.visit(definition)
    if not rewriter.found:
        raise LayoutError(
            f"{inner.__qualname__}: calls neither {' nor '.join(_CALLS)}; its attention cannot be "
            "observed"
        )
    ast.increment_lineno(ast.fix_missing_locations(tree), first - 1)
    module = compile(tree, inspect.getsourcefile(inner) or "<processor>", "exec")
    code = next(c for c in module.co_consts if isinstance(c, types.CodeType))
    result = types.FunctionType(
        code, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__
    )
    result.__kwdefaults__ = inner.__kwdefaults__
    return functools.wraps(function)(result)


class _Rewriter(ast.NodeTransformer):
    """Turns attention calls into calls of the processor's own methods."""

    def __init__(self, instance: str, entered: Collection[str]) -> None:
        self.instance = instance
        self.entered = entered
        self.found = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if called in self.entered:
            node.func = self._of_instance(_method(called), node.func)
        elif called in _CALLS:
            node.args.insert(0, node.func)
            node.func = self._of_instance(_CALLS[called], node.func)
        else:
            return node
        self.found += 1
        return node

    def _of_instance(self, name: str, place: ast.expr) -> ast.expr:
        method = ast.Attribute(ast.Name(self.instance, ast.Load()), name, ast.Load())
        return ast.copy_location(method, place)
