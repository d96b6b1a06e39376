"""Which rows of a linear layer's input, and which places of an attention, hold which tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..layouts import Blocks, Grid, Stream

__all__ = ["Rows", "TokenRows"]


@dataclass(frozen=True)
class Rows:
    """What the rounding of one linear layer's input needs, for `batch` samples of `tokens` rows."""

    batch: int
    tokens: int
    salient: torch.Tensor | None = None
    """int64 [batch, S]: rows that are decomposed."""
    group: torch.Tensor | None = None
    """int32 [batch, tokens]: the group of each row, -1 for a free one."""
    in_fp8: bool = False
    """Whether all rows are rounded to FP8, and to no dialects."""

    def decomposed(self, device: torch.device) -> Rows:
        """The same rows, all of them decomposed; `device` is where the layer computes."""
        every = torch.arange(self.tokens, device=device).expand(self.batch, -1)
        return replace(self, salient=every)


@dataclass(frozen=True)
class TokenRows:
    """Where the tokens of one call stand in a block of this kind."""

    kind: Blocks
    grid: Grid

    def fits(self, stream: Stream, count: int) -> bool:
        """Whether `count` rows of all samples together can be those of the stream."""
        tokens, rest = divmod(count, self.grid.batch)
        if rest:
            return False
        if stream == Stream.VIDEO:
            return tokens in (self.grid.tokens, self.grid.sequence)
        return stream == Stream.TEXT or tokens >= self.grid.sequence

    def rows(
        self,
        stream: Stream,
        count: int,
        salient: torch.Tensor | None,
        group: torch.Tensor | None,
        device: torch.device,
        *,
        decomposes: bool,
    ) -> Rows:
        """The salient rows and the groups of a linear layer's input.

        Args:
            stream: the tokens that its rows are.
            count: rows of all samples together; they fit, see :meth:`fits`.
            salient: int64 [batch, S], the salient video tokens; None before the first score.
            group: int32 [batch, video tokens], the group of each video token, or None.
            device: where the layer computes.
            decomposes: whether salient tokens are decomposed; all text tokens that are not padding
                are salient then.
        """
        batch, tokens = self.grid.batch, count // self.grid.batch
        if stream == Stream.TEXT:
            text = torch.arange(self._without_padding(tokens), device=device).expand(batch, -1)
            return Rows(batch, tokens, text if decomposes and text.shape[1] else None)
        video = self.video(tokens)
        rows_group = None
        if group is not None:
            rows_group = group.new_full((batch, tokens), -1, device=device)
            rows_group[:, video] = group.to(device)
        if not decomposes:
            return Rows(batch, tokens, None, rows_group)
        text = self._text(tokens, device).expand(batch, -1)
        return Rows(batch, tokens, _salient_rows(salient, video.start, text), rows_group)

    def video(self, tokens: int) -> slice:
        """The video tokens in a sequence of `tokens`."""
        first = 0  # the video alone, without others before or after it
        if tokens >= self.grid.sequence:
            text_first = tokens - self.grid.sequence if self.kind.text == "first" else 0
            first = self.grid.before + text_first
        return slice(first, first + self.grid.tokens)

    def places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where each video token, in grid order, stands in its attention.

        Returns:
            (int64 [tokens], its position among the video tokens or in its part of the video; int64
            [tokens], its part, or None where attention is over the whole video).
        """
        token = torch.arange(self.grid.tokens, device=device)
        if self.kind.attends == "all":
            return token, None
        plane = self.grid.rows * self.grid.columns
        place, frame = token % plane, token // plane
        return (place, frame) if self.kind.attends == "frame" else (frame, place)

    def order(self, device: torch.device) -> torch.Tensor:
        """The grid index of each video token in the block's order, int64 [tokens]."""
        token = torch.arange(self.grid.tokens, device=device)
        if self.kind.attends != "time":
            return token
        return token.view(self.grid.frames, -1).T.flatten()

    def _text(self, tokens: int, device: torch.device) -> torch.Tensor:
        """Positions of the text tokens in a sequence of `tokens`, without padding, int64."""
        count = max(0, tokens - self.grid.sequence)
        if self.kind.text is None:
            count = 0
        first = self.grid.sequence if self.kind.text == "last" else 0
        return torch.arange(first, first + self._without_padding(count), device=device)

    def _without_padding(self, text: int) -> int:
        """How many of a sample's text tokens are not padding, at least in one sample."""
        return text if self.grid.text is None else min(text, self.grid.text)


def _salient_rows(
    video: torch.Tensor | None, first: int, text: torch.Tensor
) -> torch.Tensor | None:
    """The chosen video tokens and every text token, as rows of the layer's input."""
    if video is not None:
        return torch.cat([video.to(text.device) + first, text], dim=1)
    return text if text.shape[1] else None
