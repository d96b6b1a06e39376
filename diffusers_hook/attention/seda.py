"""SeDA: which video tokens share a sub-formatbook.

In every window of the (T, H, W) token grid the token that receives most attention is the anchor;
tokens strongly correlated with it by attention join its group and later share the shape of their
dialects. Anchor, window and attention as correlation are SemanticDialect's; the formulas are ours
(docs/reference/format.md, section 6).

A token needs the attention of its own windows only, so the work is linear in the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attention import Attention, masked_logits, probabilities
from .windows import Tilings, tilings

__all__ = ["assign_groups"]

FREE = -1
"""Group of a token that belongs to none."""

_CHUNK_ELEMENTS = 1 << 24
"""Query or key elements gathered at a time: 64 MiB in float32, and about four such temporaries."""


@torch.no_grad()
def assign_groups(
    attention: Attention,
    scores: torch.Tensor,
    grid: tuple[int, int, int],
    *,
    window: tuple[int, int, int] = (4, 4, 4),
    threshold: float = 0.5,
    video_positions: torch.Tensor | int = 0,
    parts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The group of every video token (ours, after SemanticDialect).

    The anchor of a window is its token with the largest score; token j of the window joins the
    anchor a if ``c(a, j) >= threshold * max c(a, .)`` over the window's other tokens, where
    ``c(a, j)`` is half the mean over heads of ``A_aj + A_ja`` and A the softmax over *all* keys. A
    token that several anchors claim follows the largest c; an anchor stays in its own group. All
    ties go to the lower index.

    Args:
        attention: a self-attention over the whole sequence with its text tokens. Its log-sum-exp,
            which costs as much as an attention, is computed here if it is missing.
        scores: [B, T_video], the attention each video token receives.
        grid: frames, rows and columns of the video tokens; T_video is their product.
        window: frames, rows and columns of a window.
        threshold: share of the window's largest correlation that a token needs, in 0..1.
        video_positions: int64 [T_video], where each video token, in (t, h, w) order, stands in the
            sequence; or the position of the first, if they follow each other in this order.
        parts: for attention over parts of the video (frames, or pixels over time), the part each
            video token belongs to, int64 [T_video]. The query then is [B * parts, H, T, D], sample
            by sample, `video_positions` are positions in a part, and a token never joins an anchor
            of another part.

    Returns:
        int32 [B, T_video]: the index of the token's anchor among the video tokens, or
        :data:`FREE`. An anchor that nobody joined keeps its own index, alone in its group, which
        rounds it as a free token.

    Raises:
        ValueError: if shapes or options do not fit.
    """
    windows = tilings(tuple(grid), tuple(window), attention.query.device)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: {threshold} is not allowed; give a number in 0..1")
    _check_scores(attention, scores, windows.tokens, parts is not None)
    places = _places(attention, scores, windows.tokens, video_positions, parts)
    anchors = _anchors(scores, windows)
    correlation = _correlations(attention.with_lse(), places, anchors, windows)
    return _resolve(correlation, anchors, windows, threshold)


@dataclass(frozen=True)
class _Places:
    """Where the video tokens stand in the attention's inputs."""

    row: torch.Tensor
    """int64 [B, T_video]: the row of the query's first dimension that a video token is in."""
    position: torch.Tensor
    """int64 [T_video]: its place in the sequence."""


def _weight(
    attention: Attention,
    places: _Places,
    from_token: torch.Tensor,
    to_token: torch.Tensor,
    sample: torch.Tensor,
) -> torch.Tensor:
    """A, float32 [..., H], from one video token to another; the indices broadcast.

    Without meaning where the two are not in the same row.
    """
    assert attention.lse is not None
    row, other_row = places.row[sample, from_token], places.row[sample, to_token]
    start, end = places.position[from_token], places.position[to_token]
    key = attention.key[other_row, :, end].unsqueeze(-2)  # [..., key heads, 1, D]
    query = attention.query[row, :, start]
    # [..., key heads, query heads of each, D]
    query = query.reshape(*query.shape[:-2], key.shape[-3], -1, key.shape[-1]).float()
    logits = (query * key).sum(-1).flatten(-2) * attention.scale
    mask = attention.whole_mask
    mask = None if mask is None else mask[row, :, start, end]
    return probabilities(masked_logits(logits, mask), attention.lse[row, :, start])


def _anchors(scores: torch.Tensor, windows: Tilings) -> torch.Tensor:
    """int64 [B, windows]: each window's token with the largest score."""
    padding = windows.members < 0
    of_window = scores[:, windows.members.clamp(min=0)].masked_fill(padding, -torch.inf)
    slot = of_window.argmax(-1)  # the first of equals, by its documentation
    return windows.members.expand(len(scores), -1, -1).gather(2, slot.unsqueeze(2)).squeeze(2)


def _correlations(
    attention: Attention, places: _Places, anchors: torch.Tensor, windows: Tilings
) -> torch.Tensor:
    """float32 [B, windows, P]: c of each window's anchor with its other tokens.

    -1 where a token cannot join: the anchor itself, tokens of another part, padding.
    """
    samples, count = anchors.shape
    members = windows.members
    sample = torch.arange(samples, device=members.device).view(-1, 1, 1)
    per_window = samples * members.shape[1] * attention.query.shape[1] * attention.query.shape[3]
    step = max(1, _CHUNK_ELEMENTS // max(1, per_window))
    correlation = torch.empty(samples, *members.shape, dtype=torch.float32, device=members.device)
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        anchor = anchors[:, chunk, None]
        token = members[chunk].clamp(min=0)
        there = _weight(attention, places, anchor, token, sample)
        back = _weight(attention, places, token, anchor, sample)
        apart = places.row[sample, anchor] != places.row[sample, token]
        correlation[:, chunk] = (0.5 * (there + back).mean(-1)).masked_fill(apart, -1)
    nobody = (members < 0) | (members == anchors.unsqueeze(2))
    return correlation.masked_fill_(nobody, -1)


def _resolve(
    correlation: torch.Tensor, anchors: torch.Tensor, windows: Tilings, threshold: float
) -> torch.Tensor:
    """int32 [B, T_video]: each token follows the claim with the largest correlation."""
    largest = correlation.amax(-1, keepdim=True)
    claimed = correlation >= threshold * largest
    claims = correlation.masked_fill(~claimed, -1).flatten(1)[:, windows.slots]  # [B, 2, T_video]
    claimants = anchors[:, windows.slots // windows.members.shape[1]].masked_fill(claims < 0, FREE)
    first, second = claims.unbind(1)
    group = torch.where(
        first == second,
        claimants.amin(1),
        torch.where(first > second, claimants[:, 0], claimants[:, 1]),
    )
    return group.scatter(1, anchors, anchors).to(torch.int32)


def _places(
    attention: Attention,
    scores: torch.Tensor,
    tokens: int,
    video_positions: torch.Tensor | int,
    parts: torch.Tensor | None,
) -> _Places:
    """Where the video tokens stand.

    Raises:
        ValueError: if positions or parts do not fit.
    """
    device, samples, length = attention.query.device, len(scores), attention.query.shape[2]
    for name, value in (("video_positions", video_positions), ("parts", parts)):
        if isinstance(value, torch.Tensor) and value.shape != (tokens,):
            raise ValueError(
                f"{name}: has shape {list(value.shape)}, but the grid has {tokens} tokens; pass "
                "one value per video token"
            )
    if isinstance(video_positions, torch.Tensor):
        position = video_positions.to(device)
    elif 0 <= video_positions <= length - tokens:
        position = torch.arange(video_positions, video_positions + tokens, device=device)
    else:
        raise ValueError(
            f"video_positions: {tokens} tokens from {video_positions} on do not fit into a "
            f"sequence of {length}"
        )
    per_sample = len(attention.query) // samples
    first = torch.arange(samples, device=device).unsqueeze(1) * per_sample
    if parts is None:
        parts = torch.zeros(tokens, dtype=torch.int64, device=device)
    return _Places(first + parts.to(device), position)


def _check_scores(attention: Attention, scores: torch.Tensor, tokens: int, in_parts: bool) -> None:
    """Raise ValueError unless the scores are those of a self-attention's video tokens."""
    queries, keys, batch = attention.query.shape[2], attention.key.shape[2], len(attention.query)
    if queries != keys:
        raise ValueError(f"key: has {keys} tokens, query {queries}; pass a self-attention's")
    if scores.ndim != 2 or scores.shape[1] != tokens:
        raise ValueError(
            f"scores: has shape {list(scores.shape)}, but the grid has {tokens} tokens; "
            "pass [samples, video tokens]"
        )
    samples = len(scores)
    if samples == 0 or batch % samples or (not in_parts and batch != samples):
        raise ValueError(
            f"query: has a batch of {batch} for {samples} samples of scores; they must agree, or "
            "divide where parts are given"
        )
