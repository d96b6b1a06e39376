"""Seeing the queries and keys of a block's attention, where diffusers computes it.

A processor's ``__call__`` ends in one call of diffusers' ``dispatch_attention_fn`` or of
``F.scaled_dot_product_attention``; the queries and keys exist nowhere else, after norms and rotary
embedding. We give the processor a subclass of its own class whose ``__call__`` is the same source
with that one call going through the processor itself::

    hidden_states = dispatch_attention_fn(query, key, value, ...)          # diffusers
    hidden_states = self._dispatch_attention_fn(query, key, value, ...)    # observed

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
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import ops
from .layouts import LayoutError

__all__ = ["Observed", "observed_class", "observed_processor"]

_CALLS = {
    "dispatch_attention_fn": "_dispatch_attention_fn",
    "F.scaled_dot_product_attention": "_scaled_dot_product_attention",
}


class Observed:
    """What an observed processor has besides its own class."""

    _slot: torch.Tensor

    def _dispatch_attention_fn(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Observe, then do what diffusers does; tensors are [rows, tokens, heads, head dim]."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        q, k = query.transpose(1, 2), key.transpose(1, 2)
        ops.observe(q, k, attn_mask, self._slot, options.get("scale"))
        y: torch.Tensor = dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **options)
        return y

    def _scaled_dot_product_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Observe, then do what torch does; tensors are [rows, heads, tokens, head dim]."""
        ops.observe(query, key, attn_mask, self._slot, options.get("scale"))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)


def observed_processor(processor: Any, slot: torch.Tensor) -> Any:
    """A copy of an attention processor that shows its queries and keys to a block's state.

    Args:
        processor: an instance of one of diffusers' processor classes.
        slot: the block's slot.

    Raises:
        LayoutError: if its ``__call__`` has no attention call that could be observed.
    """
    observed = copy.copy(processor)
    observed.__class__ = observed_class(type(processor))
    observed._slot = slot
    return observed


_observed: dict[type, type] = {}


def observed_class(original: type) -> type:
    """The observed subclass of a processor class; one for all blocks: they share compiled code.

    Raises:
        LayoutError: if its ``__call__`` has no attention call that could be observed.
    """
    if original not in _observed:
        body = {"__call__": _rewritten(original.__call__), "__module__": original.__module__}
        _observed[original] = type(original.__name__, (Observed, original), body)
    return _observed[original]


def _rewritten(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with its attention calls going through ``self``."""
    inner = inspect.unwrap(function)
    if not isinstance(inner, types.FunctionType):
        raise LayoutError(f"{function!r} is no Python function; its attention cannot be observed")
    lines, first = inspect.getsourcelines(inner)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    rewriter = _Rewriter(definition.args.args[0].arg)
    rewriter.visit(definition)
    if not rewriter.found:
        raise LayoutError(
            f"{inner.__qualname__}: calls neither dispatch_attention_fn nor "
            "F.scaled_dot_product_attention; its attention cannot be observed"
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

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.found = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        method = _CALLS.get(ast.unparse(node.func))
        if method is None:
            return node
        self.found += 1
        instance = ast.Name(self.instance, ast.Load())
        node.func = ast.copy_location(ast.Attribute(instance, method, ast.Load()), node.func)
        return node
