"""The tokens of a call among the rows of a layer, on a grid of 2 x 2 x 3 tokens."""

import pytest
import torch

from diffusers_hook.layouts import Blocks, Grid, Stream
from diffusers_hook.tokens.token_rows import TokenRows

CPU = torch.device("cpu")


def placed(text=None, attends="all", batch=2, before=0, after=0):
    kind = Blocks("blocks", (), "", text=text, attends=attends)
    return TokenRows(kind, Grid(batch, 2, 2, 3, before, after))


@pytest.mark.parametrize(
    ("where", "tokens", "first"),
    [
        (placed(), 12, 0),
        (placed(), 17, 0),
        (placed("first"), 17, 5),
        (placed("last"), 17, 0),
        (placed("first", before=4), 21, 9),
        (placed(before=4, after=2), 18, 4),
        (placed(before=4, after=2), 12, 0),  # the video alone
    ],
)
def test_where_the_video_begins(where, tokens, first):
    assert where.video(tokens) == slice(first, first + 12)


@pytest.mark.parametrize(
    ("stream", "counts", "others"),
    [
        (Stream.VIDEO, (24, 36), (25, 28, 48)),  # with or without the other video
        (Stream.JOINT, (36, 40), (24, 37)),
        (Stream.TEXT, (2, 10), (3,)),
    ],
)
def test_counts_of_rows_that_fit(stream, counts, others):
    where = placed(before=6)
    assert all(where.fits(stream, count) for count in counts)
    assert not any(where.fits(stream, count) for count in others)


@pytest.mark.parametrize(
    ("text", "salient", "first"),
    [("first", [7, 12, 0, 1, 2, 3, 4], 5), ("last", [2, 7, 12, 13, 14, 15, 16], 0)],
)
def test_salient_rows_are_the_chosen_tokens_and_the_text(text, salient, first):
    group = torch.arange(12, dtype=torch.int32)[None]
    rows = placed(text, batch=1).rows(
        Stream.JOINT, 17, torch.tensor([[2, 7]]), group, CPU, decomposes=True
    )
    assert rows.salient.tolist() == [salient]
    expected = torch.full((1, 17), -1, dtype=torch.int32)
    expected[:, first : first + 12] = group
    assert torch.equal(rows.group, expected)


def test_rows_without_a_choice_or_without_decomposition():
    where = placed("last", batch=1)
    before = where.rows(Stream.JOINT, 14, None, None, CPU, decomposes=True)
    assert (before.salient.tolist(), before.group) == ([[12, 13]], None)
    assert where.rows(Stream.VIDEO, 12, None, None, CPU, decomposes=True).salient is None
    assert where.rows(Stream.TEXT, 2, None, None, CPU, decomposes=True).salient.tolist() == [[0, 1]]
    for stream, count in ((Stream.JOINT, 14), (Stream.TEXT, 2)):
        assert where.rows(stream, count, None, None, CPU, decomposes=False).salient is None


@pytest.mark.parametrize("attends", ["all", "frame", "time"])
def test_order_and_places_of_the_video_tokens(attends):
    where = placed(attends=attends)
    positions, parts = where.places(CPU)
    order = where.order(CPU)
    plane = 6
    for token, (position, place) in enumerate(zip(positions, order.argsort(), strict=True)):
        frame, inside = divmod(token, plane)
        expected = {"all": (token, token), "frame": (inside, token), "time": (frame, None)}
        assert position == expected[attends][0]
        assert place == (inside * 2 + frame if attends == "time" else expected[attends][1])
        if parts is not None:
            assert parts[token] == (frame if attends == "frame" else inside)
    assert (parts is None) == (attends == "all")
