"""Attention with the full map in float64, masks of every kind, and a meter of tensor sizes."""

import math

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def full_logits(query, key, mask=None, scale=None):
    """float64 [B, H, T_q, T_k], -inf where masked."""
    query, key = query.double().numpy(), key.double().numpy()
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    logits = query @ np.swapaxes(key, 2, 3) * scale
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return np.where(mask.numpy(), logits, -np.inf)
    return logits + mask.double().numpy()


def full_lse(logits):
    with np.errstate(divide="ignore"):
        return np.log(np.exp(logits).sum(-1))


def full_attention(logits):
    """Softmax rows; zeros where everything is masked."""
    weights = np.exp(logits)
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def some_mask(kind, batch, heads, queries, keys):
    generator = torch.Generator().manual_seed(keys)
    if kind == "none":
        return None
    if kind == "padding":
        return torch.arange(keys) < torch.tensor([keys - 3, keys // 2]).view(batch, 1, 1, 1)
    if kind == "pairs":
        return torch.rand(queries, keys, generator=generator) < 0.7
    if kind == "every_head":
        return torch.rand(batch, heads, queries, keys, generator=generator) < 0.5
    if kind == "additive":
        return torch.randn(batch, 1, queries, keys, generator=generator)
    # three queries, two of which are sampled, attend to nothing
    mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    mask[:, :, [0, 1, 6]] = False
    return mask


MASKS = ("none", "padding", "pairs", "every_head", "additive", "empty_rows")


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation's result had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.untyped_storage().nbytes() // item.itemsize)
        return result
