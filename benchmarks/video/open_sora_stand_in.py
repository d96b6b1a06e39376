"""A stand-in for Open-Sora 2.0's MMDiT, for benchmarks and tests of its shapes without its package.

It has the original's module names, shapes, token order and call, and random weights: it generates
no video. What matters to a hook is as in the original: text comes first in the joint attention;
video tokens arrive packed, their places in `img_ids`; `attention()` applies the rotary embedding
and calls a flash attention of its own; a block's processor does the work; the model's `forward`
belongs to the instance; `linear2` takes attention and MLP side by side.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def flash_attn_func(query, key, value):
    """[batch, tokens, heads, head size]; torch's attention in place of the GPU library."""
    turned = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*turned).transpose(1, 2)


def attention(q, k, v, pe):
    """[batch, heads, tokens, head size], not yet rotated -> [batch, tokens, heads * head size]."""
    q, k = rotated(q, pe), rotated(k, pe)
    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).flatten(2)


def rotated(x, angle):
    """Turn pairs of neighbouring channels; `angle` is [batch, 1, tokens, head size / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def sinusoid(value, width):
    index = torch.arange(width // 2, device=value.device)
    frequency = torch.exp(-math.log(10000) * index / (width // 2))
    angle = 1000 * value[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(value.dtype)


class MLPEmbedder(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.in_layer = nn.Linear(width, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class QKNorm(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.query_norm, self.key_norm = nn.RMSNorm(head), nn.RMSNorm(head)

    def forward(self, q, k):
        return self.query_norm(q), self.key_norm(k)


class Modulation(nn.Module):
    def __init__(self, hidden, parts):
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(hidden, parts * hidden)

    def forward(self, vec):
        return self.lin(F.silu(vec))[:, None].chunk(self.parts, dim=-1)


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Projections of one stream; the joint attention is computed by the block."""

    def __init__(self, hidden, heads, fused_qkv):
        super().__init__()
        self.heads, self.fused_qkv = heads, fused_qkv
        if fused_qkv:
            self.qkv = nn.Linear(hidden, 3 * hidden)
        else:
            self.q_proj = nn.Linear(hidden, hidden)
            self.k_proj = nn.Linear(hidden, hidden)
            self.v_proj = nn.Linear(hidden, hidden)
        self.norm = QKNorm(hidden // heads)
        self.proj = nn.Linear(hidden, hidden)

    def project(self, x):
        """Queries, keys and values [batch, heads, tokens, head size]."""
        if self.fused_qkv:
            q, k, v = (heads_of(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        else:
            q, k, v = (heads_of(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        return *self.norm(q, k), v


def mlp(hidden, ratio):
    inner = int(hidden * ratio)
    return nn.Sequential(nn.Linear(hidden, inner), nn.GELU("tanh"), nn.Linear(inner, hidden))


class DoubleStreamBlockProcessor:
    def __call__(self, attn, img, txt, vec, pe):
        img_mod, txt_mod = attn.img_mod(vec), attn.txt_mod(vec)
        img_qkv = attn.img_attn.project((1 + img_mod[1]) * attn.img_norm1(img) + img_mod[0])
        txt_qkv = attn.txt_attn.project((1 + txt_mod[1]) * attn.txt_norm1(txt) + txt_mod[0])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        both = attention(q, k, v, pe=pe)
        txt_out, img_out = both.split([txt.shape[1], img.shape[1]], dim=1)
        img = img + img_mod[2] * attn.img_attn.proj(img_out)
        img = img + img_mod[5] * attn.img_mlp((1 + img_mod[4]) * attn.img_norm2(img) + img_mod[3])
        txt = txt + txt_mod[2] * attn.txt_attn.proj(txt_out)
        txt = txt + txt_mod[5] * attn.txt_mlp((1 + txt_mod[4]) * attn.txt_norm2(txt) + txt_mod[3])
        return img, txt


class DoubleStreamBlock(nn.Module):
    def __init__(self, hidden, heads, ratio, fused_qkv):
        super().__init__()
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Modulation(hidden, 6))
            setattr(self, f"{stream}_norm1", nn.LayerNorm(hidden, elementwise_affine=False))
            setattr(self, f"{stream}_attn", SelfAttention(hidden, heads, fused_qkv))
            setattr(self, f"{stream}_norm2", nn.LayerNorm(hidden, elementwise_affine=False))
            setattr(self, f"{stream}_mlp", mlp(hidden, ratio))
        self.processor = DoubleStreamBlockProcessor()

    def forward(self, img, txt, vec, pe):
        return self.processor(self, img, txt, vec, pe)


class SingleStreamBlockProcessor:
    def __call__(self, attn, x, vec, pe):
        shift, scale, gate = attn.modulation(vec)
        y = (1 + scale) * attn.pre_norm(x) + shift
        hidden = attn.hidden_size
        if attn.fused_qkv:
            q, k, v, inner = attn.linear1(y).split([hidden] * 3 + [attn.mlp_hidden_dim], dim=-1)
        else:
            q, k = attn.q_proj(y), attn.k_proj(y)
            v, inner = attn.v_mlp(y).split([hidden, attn.mlp_hidden_dim], dim=-1)
        q, k, v = (heads_of(part, attn.num_heads) for part in (q, k, v))
        q, k = attn.norm(q, k)
        attended = attention(q, k, v, pe=pe)
        return x + gate * attn.linear2(torch.cat((attended, attn.mlp_act(inner)), dim=2))


class SingleStreamBlock(nn.Module):
    def __init__(self, hidden, heads, ratio, fused_qkv):
        super().__init__()
        self.hidden_size, self.num_heads, self.fused_qkv = hidden, heads, fused_qkv
        self.mlp_hidden_dim = int(hidden * ratio)
        if fused_qkv:
            self.linear1 = nn.Linear(hidden, 3 * hidden + self.mlp_hidden_dim)
        else:
            self.q_proj = nn.Linear(hidden, hidden)
            self.k_proj = nn.Linear(hidden, hidden)
            self.v_mlp = nn.Linear(hidden, hidden + self.mlp_hidden_dim)
        self.linear2 = nn.Linear(hidden + self.mlp_hidden_dim, hidden)
        self.norm = QKNorm(hidden // heads)
        self.pre_norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.mlp_act = nn.GELU("tanh")
        self.modulation = Modulation(hidden, 3)
        self.processor = SingleStreamBlockProcessor()

    def forward(self, x, vec, pe):
        return self.processor(self, x, vec, pe)


class LastLayer(nn.Module):
    def __init__(self, hidden, channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden, elementwise_affine=False)
        self.linear = nn.Linear(hidden, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x, vec):
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear((1 + scale) * self.norm_final(x) + shift)


class MMDiTModel(nn.Module):
    """The original: hidden 3072, 24 heads, 19 double and 38 single blocks, axes (16, 56, 56)."""

    def __init__(
        self, hidden=64, heads=2, ratio=4.0, depth=2, single=2, channels=16, text=32, pooled=16,
        axes=(8, 12, 12), fused_qkv=False,
    ):  # fmt: skip
        super().__init__()
        self.axes = axes
        self.img_in = nn.Linear(channels, hidden)
        self.time_in = MLPEmbedder(256, hidden)
        self.vector_in = MLPEmbedder(pooled, hidden)
        self.txt_in = nn.Linear(text, hidden)
        blocks = (hidden, heads, ratio, fused_qkv)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*blocks) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*blocks) for _ in range(single))
        self.final_layer = LastLayer(hidden, channels)
        self.forward = self.run

    def run(self, img, img_ids, txt, txt_ids, timesteps, y_vec, cond=None, guidance=None, **kwargs):
        """Video tokens [batch, N, channels], their (frame, row, column), text, noise level."""
        ids = torch.cat((txt_ids, img_ids), dim=1).float()
        pe = torch.cat(
            [
                ids[..., i, None] / 100 ** (torch.arange(0, axis, 2, device=ids.device) / axis)
                for i, axis in enumerate(self.axes)
            ],
            dim=-1,
        ).unsqueeze(1)
        vec = self.time_in(sinusoid(timesteps, 256)) + self.vector_in(y_vec)
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vec, pe)
        return self.final_layer(x[:, txt.shape[1] :], vec)
