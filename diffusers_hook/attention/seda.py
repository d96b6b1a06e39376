"""SeDA: which video tokens share a sub-formatbook.

In every window of the (T, H, W) token grid the token that receives most attention is the anchor;
tokens strongly correlated with it by attention join its group and later share the shape of their
dialects. Anchor, window and attention as correlation are SemanticDialect's; the formulas are ours
(docs/format.md, section 6).

A token needs the attention of its own windows only, so the work is linear in the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .attention import (
    check_attention,
    default_scale,
    expanded_mask,
    log_sum_exp,
    masked_logits,
    probabilities,
)

__all__ = ["FREE", "assign_groups", "windows"]

FREE = -1
"""Group of a token that belongs to none."""

_CHUNK_ELEMENTS = 1 << 24
"""Query or key elements gathered at a time: 64 MiB in float32, and about four such temporaries."""


def windows(grid: tuple[int, int, int], window: tuple[int, int, int] = (4, 4, 4)) -> torch.Tensor:
    """The tokens of every window of both tilings.

    The first tiling starts at (0, 0, 0), the second is shifted by half a window (rounded down) in
    each axis. Windows are cut off at the borders; every token is in one window of each tiling.

    Args:
        grid: frames, rows and columns of the token grid; token (t, h, w) is ``(t*H + h)*W + w``.
        window: frames, rows and columns of a window.

    Returns:
        int64 [windows, tokens of the largest window] on the CPU, the first tiling's windows first;
        tokens ascending in each row, then -1. Shared between calls: do not write to it.

    Raises:
        ValueError: if a size is not positive.
    """
    return _tilings(tuple(grid), tuple(window), torch.device("cpu")).members


@torch.no_grad()
def assign_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    scores: torch.Tensor,
    grid: tuple[int, int, int],
    *,
    lse: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int, int] = (4, 4, 4),
    threshold: float = 0.5,
    video_positions: torch.Tensor | int = 0,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The group of every video token (ours, after SemanticDialect).

    The anchor of a window is its token with the largest score; token j of the window joins the
    anchor a if ``c(a, j) >= threshold * max c(a, .)`` over the window's other tokens, where
    ``c(a, j)`` is half the mean over heads of ``A_aj + A_ja`` and A the softmax over *all* keys. A
    token that several anchors claim follows the largest c; an anchor stays in its own group. All
    ties go to the lower index.

    Args:
        query: float32, bfloat16 or float16 [B, H, T, D], the whole sequence with its text tokens.
        key: [B, H, T, D]; fewer heads are allowed where they divide H (grouped queries).
        scores: [B, T_video], the attention each video token receives.
        grid: frames, rows and columns of the video tokens; T_video is their product.
        lse: float32 [B, H, T], the log-sum-exp of every query's logits, if the attention handed it
            out (:func:`~diffusers_hook.attention.attention.attention_with_lse`); computed here
            otherwise, which costs as much as an attention.
        mask: bool (True takes part) or additive, broadcastable to [B, H, T, T].
        scale: factor of the logits, default ``1 / sqrt(D)``.
        window: frames, rows and columns of a window.
        threshold: share of the window's largest correlation that a token needs, in 0..1.
        video_positions: int64 [T_video], where each video token, in (t, h, w) order, stands in the
            sequence; or the position of the first, if they follow each other in this order.
        rows: for attention over parts of the video (frames, or pixels over time), the part each
            video token belongs to, int64 [T_video]. query then is [B * parts, H, T, D], sample by
            sample, `video_positions` are positions in a part, and a token never joins an anchor of
            another part.

    Returns:
        int32 [B, T_video]: the index of the token's anchor among the video tokens, or
        :data:`FREE`. An anchor that nobody joined keeps its own index, alone in its group, which
        rounds it as a free token.

    Raises:
        ValueError: if shapes or options do not fit.
    """
    tilings = _tilings(tuple(grid), tuple(window), query.device)
    _check(query, key, scores, tilings.tokens, lse, threshold, video_positions, rows)
    if lse is None:
        lse = log_sum_exp(query, key, mask=mask, scale=scale)
    attention = _Attention(
        query,
        key,
        lse,
        expanded_mask(mask, query, key),
        default_scale(query, scale),
        *_places(query, scores, tilings.tokens, video_positions, rows),
    )
    anchors = _anchors(scores, tilings)
    correlation = _correlations(attention, anchors, tilings)
    return _resolve(correlation, anchors, tilings, threshold)


@dataclass(frozen=True)
class _Tilings:
    members: torch.Tensor
    """int64 [windows, P]: the tokens of each window, -1 after the last."""
    slots: torch.Tensor
    """int64 [2, tokens]: where each tiling holds a token, as an index into `members`, flattened."""
    tokens: int


@dataclass(frozen=True)
class _Attention:
    query: torch.Tensor
    key: torch.Tensor
    lse: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    batch: torch.Tensor
    """int64 [B, T_video]: the row of the query's first dimension that a video token is in."""
    position: torch.Tensor
    """int64 [T_video]: its place in the sequence."""

    def weight(
        self, from_token: torch.Tensor, to_token: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """A, float32 [..., H], from one video token to another; the indices broadcast.

        Without meaning where the two are not in the same row.
        """
        row, other_row = self.batch[sample, from_token], self.batch[sample, to_token]
        start, end = self.position[from_token], self.position[to_token]
        key = self.key[other_row, :, end].unsqueeze(-2)  # [..., key heads, 1, D]
        query = self.query[row, :, start]
        # [..., key heads, query heads of each, D]
        query = query.reshape(*query.shape[:-2], key.shape[-3], -1, key.shape[-1]).float()
        logits = (query * key).sum(-1).flatten(-2) * self.scale
        mask = None if self.mask is None else self.mask[row, :, start, end]
        return probabilities(masked_logits(logits, mask), self.lse[row, :, start])


def _anchors(scores: torch.Tensor, tilings: _Tilings) -> torch.Tensor:
    """int64 [B, windows]: each window's token with the largest score."""
    padding = tilings.members < 0
    of_window = scores[:, tilings.members.clamp(min=0)].masked_fill(padding, -torch.inf)
    slot = of_window.argmax(-1)  # the first of equals, by its documentation
    return tilings.members.expand(len(scores), -1, -1).gather(2, slot.unsqueeze(2)).squeeze(2)


def _correlations(attention: _Attention, anchors: torch.Tensor, tilings: _Tilings) -> torch.Tensor:
    """float32 [B, windows, P]: c of each window's anchor with its other tokens.

    -1 where a token cannot join: the anchor itself, tokens of another part, padding.
    """
    samples, count = anchors.shape
    members = tilings.members
    sample = torch.arange(samples, device=members.device).view(-1, 1, 1)
    per_window = samples * members.shape[1] * attention.query.shape[1] * attention.query.shape[3]
    step = max(1, _CHUNK_ELEMENTS // max(1, per_window))
    correlation = torch.empty(samples, *members.shape, dtype=torch.float32, device=members.device)
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        anchor = anchors[:, chunk, None]
        token = members[chunk].clamp(min=0)
        there = attention.weight(anchor, token, sample)
        back = attention.weight(token, anchor, sample)
        apart = attention.batch[sample, anchor] != attention.batch[sample, token]
        correlation[:, chunk] = (0.5 * (there + back).mean(-1)).masked_fill(apart, -1)
    nobody = (members < 0) | (members == anchors.unsqueeze(2))
    return correlation.masked_fill_(nobody, -1)


def _resolve(
    correlation: torch.Tensor, anchors: torch.Tensor, tilings: _Tilings, threshold: float
) -> torch.Tensor:
    """int32 [B, T_video]: each token follows the claim with the largest correlation."""
    largest = correlation.amax(-1, keepdim=True)
    claimed = correlation >= threshold * largest
    claims = correlation.masked_fill(~claimed, -1).flatten(1)[:, tilings.slots]  # [B, 2, T_video]
    claimants = anchors[:, tilings.slots // tilings.members.shape[1]].masked_fill(claims < 0, FREE)
    first, second = claims.unbind(1)
    group = torch.where(
        first == second,
        claimants.amin(1),
        torch.where(first > second, claimants[:, 0], claimants[:, 1]),
    )
    return group.scatter(1, anchors, anchors).to(torch.int32)


def _places(
    query: torch.Tensor,
    scores: torch.Tensor,
    tokens: int,
    video_positions: torch.Tensor | int,
    rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    device, samples = query.device, len(scores)
    if isinstance(video_positions, int):
        position = torch.arange(video_positions, video_positions + tokens, device=device)
    else:
        position = video_positions.to(device)
    parts = len(query) // max(1, samples)
    first = torch.arange(samples, device=device).unsqueeze(1) * parts
    part = torch.zeros(tokens, dtype=torch.int64, device=device) if rows is None else rows
    return first + part.to(device), position


@lru_cache(maxsize=32)
def _tilings(grid: tuple[int, ...], window: tuple[int, ...], device: torch.device) -> _Tilings:
    for name, sizes in (("grid", grid), ("window", window)):
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"{name}: {sizes} is not allowed; give three positive sizes (T, H, W)")
    tokens = grid[0] * grid[1] * grid[2]
    width = 1
    for size, length in zip(grid, window, strict=True):
        width *= min(size, length)
    members, slots, offset = [], [], 0
    for shifted in (False, True):
        window_of = torch.zeros(1, dtype=torch.int64)
        for size, length in zip(grid, window, strict=True):
            # shifted by half a window: the other part of a window lies before the first token
            block = (torch.arange(size) + shifted * (length - length // 2)) // length
            block -= int(block[0])
            window_of = (window_of.unsqueeze(-1) * (int(block[-1]) + 1) + block).flatten()
        count = window_of.bincount()
        order = window_of.argsort(stable=True)
        start = (count.cumsum(0) - count)[window_of[order]]
        slot = torch.empty(tokens, dtype=torch.int64)
        slot[order] = window_of[order] * width + torch.arange(tokens) - start
        tokens_at = torch.full((len(count) * width,), -1)
        tokens_at[slot] = torch.arange(tokens)
        members.append(tokens_at.view(-1, width))
        slots.append(slot + offset)
        offset += len(tokens_at)
    return _Tilings(torch.cat(members).to(device), torch.stack(slots).to(device), tokens)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    scores: torch.Tensor,
    tokens: int,
    lse: torch.Tensor | None,
    threshold: float,
    video_positions: torch.Tensor | int,
    rows: torch.Tensor | None,
) -> None:
    check_attention(query, key)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"key: has {key.shape[2]} tokens, query {query.shape[2]}; pass a self-attention's"
        )
    if scores.ndim != 2 or scores.shape[1] != tokens:
        raise ValueError(
            f"scores: has shape {list(scores.shape)}, but the grid has {tokens} tokens; "
            "pass [samples, video tokens]"
        )
    if len(scores) == 0 or len(query) % len(scores) or (rows is None and len(query) != len(scores)):
        raise ValueError(
            f"query: has a batch of {len(query)} for {len(scores)} samples of scores; they must "
            "agree, or divide where rows is given"
        )
    if lse is not None and lse.shape != query.shape[:3]:
        raise ValueError(
            f"lse: has shape {list(lse.shape)}, but query needs {list(query.shape[:3])}; "
            "pass one value per query row"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: {threshold} is not allowed; give a number in 0..1")
    for name, value in (("video_positions", video_positions), ("rows", rows)):
        if isinstance(value, torch.Tensor) and value.shape != (tokens,):
            raise ValueError(
                f"{name}: has shape {list(value.shape)}, but the grid has {tokens} tokens"
            )
    if isinstance(video_positions, int) and not 0 <= video_positions <= query.shape[2] - tokens:
        raise ValueError(
            f"video_positions: {tokens} tokens from {video_positions} on do not fit into a "
            f"sequence of {query.shape[2]}"
        )
