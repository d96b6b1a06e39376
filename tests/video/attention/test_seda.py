"""SeDA's groups against a brute force written from the format's section 6, token by token."""

import math
from fractions import Fraction
from itertools import chain, pairwise, product

import numpy as np
import pytest
import torch

from diffusers_hook.attention import saliency, seda
from diffusers_hook.attention.attention import Attention
from diffusers_hook.attention.seda import FREE
from diffusers_hook.attention.windows import tilings
from tests.video.support.full_attention import LargestTensor, full_attention, full_logits, tensors

GRIDS = ((4, 4, 4), (5, 3, 7), (9, 6, 5), (3, 8, 9), (1, 9, 10), (2, 1, 1), (1, 1, 1))


def received_attention(query, key, mask=None):
    return saliency.received_attention(Attention.checked(query, key, mask))


def assign_groups(query, key, scores, grid, *, mask=None, lse=None, **options):
    attention = Attention.checked(query, key, mask, lse=lse)
    return seda.assign_groups(attention, scores, grid, **options)


def windows(grid, window):
    return tilings(grid, window, torch.device("cpu")).members


def softmax_of(query, key, mask=None):
    """A in float64, [B, H, T, T]."""
    return full_attention(full_logits(query, key, mask))


def brute_windows(grid, window):
    """Lists of tokens: the tiling from (0, 0, 0), then the one shifted by half a window."""
    lists = []
    for shifted in (False, True):
        pieces = []
        for size, length in zip(grid, window, strict=True):
            cuts = set(range(length // 2 if shifted else 0, size, length)) | {0, size}
            cuts = sorted(cuts)
            pieces.append([range(a, b) for a, b in pairwise(cuts)])
        for frames, rows, columns in product(*pieces):
            lists.append(
                [(t * grid[1] + h) * grid[2] + w for t, h, w in product(frames, rows, columns)]
            )
    return lists


class Brute:
    """Groups of one sample from A [H, T_video, T_video]; counts what the case contains."""

    def __init__(self, attention, scores, grid, window, threshold, parts=None):
        self.margin = math.inf
        self.ties = self.conflicts = self.claimed_anchors = 0
        self.attention = attention
        claims = {}
        anchors = set()
        for tokens in brute_windows(grid, window):
            anchor = min(tokens, key=lambda j: (-scores[j], j))
            anchors.add(anchor)
            others = {
                j: self.correlation(anchor, j)
                for j in tokens
                if j != anchor and (parts is None or parts[j] == parts[anchor])
            }
            limit = threshold * max(others.values(), default=0)
            for j, c in others.items():
                self.compare(c, limit)
                if c >= limit:
                    claims.setdefault(j, []).append((c, anchor))
        self.groups = []
        for j in range(len(scores)):
            best = min(claims.get(j, []), key=lambda claim: (-claim[0], claim[1]), default=None)
            if j in anchors:
                self.groups.append(j)
                self.claimed_anchors += best is not None
            else:
                self.groups.append(FREE if best is None else best[1])
                if len({anchor for _, anchor in claims.get(j, [])}) == 2:
                    self.conflicts += 1
                    self.compare(claims[j][0][0], claims[j][1][0])

    def correlation(self, a, j):
        pairs = [self.attention[h][a][j] + self.attention[h][j][a] for h in range(self.heads)]
        return sum(pairs) / (2 * self.heads)

    @property
    def heads(self):
        return len(self.attention)

    def compare(self, one, other):
        """Remember how close a decision was, relatively; equal counts as a tie."""
        if one == other:
            self.ties += 1
        else:
            self.margin = min(self.margin, float(abs(one - other) / max(one, other)))


def brute_groups(attention, scores, grid, window=(4, 4, 4), threshold=0.5, parts=None):
    """[Brute] of all samples; A is [B, H, T_video, T_video]."""
    return [
        Brute(a.tolist(), s.tolist(), grid, window, threshold, parts)
        for a, s in zip(attention, scores, strict=True)
    ]


def check(groups, brutes):
    """Equal, and no decision so close that float32 could have taken it otherwise."""
    assert groups.dtype == torch.int32
    assert min(brute.margin for brute in brutes) > 1e-5
    assert groups.tolist() == [brute.groups for brute in brutes]


@pytest.mark.parametrize("window", [(4, 4, 4), (2, 2, 2), (3, 1, 4), (1, 1, 1), (5, 9, 2)])
@pytest.mark.parametrize("grid", GRIDS)
def test_windows_of_both_tilings(grid, window):
    rows = [[j for j in row if j >= 0] for row in windows(grid, window).tolist()]
    assert rows == brute_windows(grid, window)
    first = math.prod(-(-size // length) for size, length in zip(grid, window, strict=True))
    for tiling in (rows[:first], rows[first:]):
        assert sorted(chain(*tiling)) == list(range(math.prod(grid)))
    assert windows(grid, window).shape[1] == max(map(len, rows))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_groups_of_a_video(dtype, grid):
    tokens = math.prod(grid)
    query, key = tensors((2, 3, tokens, 16), (2, 3, tokens, 16), dtype=dtype, seed=tokens)
    scores = received_attention(query, key)
    brutes = brute_groups(softmax_of(query, key), scores, grid)
    check(assign_groups(query, key, scores, grid), brutes)


def test_the_cases_above_hold_conflicts_and_claimed_anchors():
    """Otherwise the comparison would not see the rules for them."""
    query, key = tensors((2, 3, 270, 16), (2, 3, 270, 16), seed=270)
    brutes = brute_groups(softmax_of(query, key), received_attention(query, key), grid=(9, 6, 5))
    assert min(brute.conflicts for brute in brutes) > 5
    assert min(brute.claimed_anchors for brute in brutes) > 1
    assert all(FREE in brute.groups for brute in brutes)


@pytest.mark.parametrize("window", [(2, 2, 2), (3, 1, 4), (1, 1, 1), (1, 4, 4), (8, 8, 8)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
def test_other_windows_and_thresholds(threshold, window):
    grid = (5, 3, 7)
    query, key = tensors((2, 2, 105, 8), (2, 2, 105, 8), seed=1)
    (scores,) = tensors((2, 105), seed=2)
    brutes = brute_groups(softmax_of(query, key), scores, grid, window, threshold)
    groups = assign_groups(query, key, scores, grid, window=window, threshold=threshold)
    check(groups, brutes)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries(key_heads):
    grid = (3, 4, 5)
    query, key = tensors((2, 4, 60, 8), (2, key_heads, 60, 8), seed=3)
    scores = received_attention(query, key)
    check(
        assign_groups(query, key, scores, grid),
        brute_groups(softmax_of(query, key), scores, grid),
    )


def joint(layout, tokens, text):
    """Positions of the video tokens, in (t, h, w) order, in a sequence with text."""
    if layout == "video_first":
        return torch.arange(tokens), 0
    if layout == "text_first":
        return torch.arange(tokens) + text, text
    # (h, w, t) order with text on both sides
    inner = torch.arange(tokens).view(4, 5, 3).permute(2, 0, 1).flatten()
    return inner + 2, inner + 2


@pytest.mark.parametrize("kind", ["none", "padding", "additive"])
@pytest.mark.parametrize("layout", ["video_first", "text_first", "time_last"])
def test_joint_sequences(layout, kind):
    grid, tokens, text = (3, 4, 5), 60, 9
    query, key = tensors((2, 2, tokens + text, 8), (2, 2, tokens + text, 8), seed=4)
    positions, passed = joint(layout, tokens, text)
    is_text = torch.ones(tokens + text, dtype=torch.bool)
    is_text[positions] = False
    mask = None
    if kind == "padding":  # half the text of the second sample
        mask = torch.ones(2, 1, 1, tokens + text, dtype=torch.bool)
        mask[1, 0, 0, is_text.nonzero()[4:]] = False
    if kind == "additive":
        (mask,) = tensors((1, 2, tokens + text, tokens + text), seed=5)
    attention = softmax_of(query, key, mask)
    if kind == "padding":
        assert (attention[1][..., ~mask[1, 0, 0].numpy()] == 0).all()
    picked = positions.numpy()
    scores = received_attention(query, key, mask=mask)[:, positions]
    brutes = brute_groups(attention[:, :, picked][..., picked], scores, grid)
    groups = assign_groups(query, key, scores, grid, mask=mask, video_positions=passed)
    check(groups, brutes)
    # the keys of the text belong to the softmax
    without = softmax_of(query[:, :, positions], key[:, :, positions])
    assert [b.groups for b in brute_groups(without, scores, grid)] != groups.tolist()


@pytest.mark.parametrize("grid", [(4, 3, 5), (5, 5, 9), (1, 4, 5), (6, 1, 1)])
@pytest.mark.parametrize("per", ["frame", "pixel"])
def test_attention_within_frames_or_over_time(per, grid):
    """Factorised attention: [samples * parts, H, tokens, D]; nobody joins another part."""
    samples, tokens, pixels = 2, math.prod(grid), grid[1] * grid[2]
    token = torch.arange(tokens)
    if per == "frame":
        parts, rows, positions = grid[0], token // pixels, token % pixels
    else:
        parts, rows, positions = pixels, token % pixels, token // pixels
    shape = (samples * parts, 2, tokens // parts, 8)
    query, key = tensors(shape, shape, seed=6)
    within = softmax_of(query, key).reshape(samples, parts, 2, *[tokens // parts] * 2)
    attention = np.zeros((samples, 2, tokens, tokens))
    for i, j in product(range(tokens), range(tokens)):
        if rows[i] == rows[j]:
            attention[:, :, i, j] = within[:, rows[i], :, positions[i], positions[j]]
    scores = received_attention(query, key).view(samples, parts, -1)[:, rows, positions]
    groups = assign_groups(query, key, scores, grid, parts=rows, video_positions=positions)
    check(groups, brute_groups(attention, scores, grid, parts=rows.tolist()))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("grid", [(5, 3, 7), (4, 4, 4), (1, 8, 9)])
def test_ties_go_to_the_lower_index(grid, seed):
    """With q = k = 0 and lse = 0, A is the mask: sums of a few ones and zeros, equal or not."""
    tokens = math.prod(grid)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 2, tokens, tokens, generator=generator) < 0.4
    scores = torch.randint(0, 3, (2, tokens), generator=generator).float()
    zeros = torch.zeros(2, 2, tokens, 4)
    groups = assign_groups(zeros, zeros, scores, grid, mask=mask, lse=torch.zeros(2, 2, tokens))
    exact = np.vectorize(Fraction)(mask.int().numpy())
    brutes = brute_groups(exact, scores, grid, threshold=Fraction(1, 2))
    assert groups.tolist() == [brute.groups for brute in brutes]
    assert min(brute.ties for brute in brutes) > 10


def by_hand(attention, scores, window):
    """Groups on a line of tokens, with A as given: q and k are 0, the mask holds log A."""
    tokens = len(scores)
    zeros = torch.zeros(1, 1, tokens, 4)
    mask = torch.tensor(attention, dtype=torch.float32).log()
    scores = torch.tensor([scores])
    lse = torch.zeros(1, 1, tokens)
    grid = (1, 1, tokens)
    return assign_groups(zeros, zeros, scores, grid, lse=lse, mask=mask, window=window).tolist()[0]


def line(tokens, **pairs):
    """Symmetric A from pairs such as t13=0.5."""
    attention = np.zeros((tokens, tokens))
    for name, value in pairs.items():
        a, b = int(name[1]), int(name[2])
        attention[a, b] = attention[b, a] = value
    return attention.tolist()


# windows of four on a line of six: 0-3 and 4-5, shifted: 0-1 and 2-5
WINDOW = (1, 1, 4)


def test_by_hand_tokens_above_half_the_largest_join():
    attention = line(6, t02=0.5, t12=0.8, t23=0.3, t24=0.9, t25=0.5, t01=0.7)
    # anchors: 2 (both windows that hold it), 4 (of 4-5), 0 (of 0-1)
    assert by_hand(attention, [0.2, 0.1, 0.9, 0.0, 0.8, 0.0], WINDOW) == [0, 2, 2, FREE, 4, 2]


def test_by_hand_both_directions_count():
    attention = np.zeros((4, 4))
    attention[0, 1], attention[2, 0], attention[0, 3] = 0.6, 0.6, 0.2
    assert by_hand(attention.tolist(), [1.0, 0.0, 0.1, 0.0], (1, 1, 8)) == [0, 0, 0, FREE]


def test_by_hand_an_equal_claim_goes_to_the_lower_anchor():
    # 1 and 5 are anchors; 2 and 3 lie in a window of each
    attention = line(6, t12=0.5, t25=0.5, t13=0.5, t35=0.75)
    assert by_hand(attention, [0.0, 1.0, 0.0, 0.0, 0.0, 1.0], WINDOW) == [1, 1, 1, 5, 5, 5]


def test_a_window_of_one_token_is_an_anchor_alone():
    query, key = tensors((2, 2, 6, 8), (2, 2, 6, 8))
    (scores,) = tensors((2, 6))
    groups = assign_groups(query, key, scores, (1, 2, 3), window=(1, 1, 1))
    assert groups.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_a_given_log_sum_exp_is_used():
    grid = (3, 4, 5)
    query, key = tensors((2, 2, 60, 8), (2, 2, 60, 8), seed=7)
    scores = received_attention(query, key)
    lse = Attention.checked(query, key).with_lse().lse
    expected = assign_groups(query, key, scores, grid)
    assert torch.equal(assign_groups(query, key, scores, grid, lse=lse), expected)
    lse[:, :, ::3] += 2
    assert not torch.equal(assign_groups(query, key, scores, grid, lse=lse), expected)


@pytest.mark.parametrize("elements", [1, 20_000])
def test_chunks_do_not_change_the_groups(monkeypatch, elements):
    query, key = tensors((2, 2, 105, 8), (2, 2, 105, 8), seed=8)
    scores = received_attention(query, key)
    expected = assign_groups(query, key, scores, (5, 3, 7))
    monkeypatch.setattr(seda, "_CHUNK_ELEMENTS", elements)
    assert torch.equal(assign_groups(query, key, scores, (5, 3, 7)), expected)


def test_samples_do_not_see_each_other():
    query, key = tensors((3, 2, 60, 8), (3, 2, 60, 8), seed=9)
    scores = received_attention(query, key)
    together = assign_groups(query, key, scores, (3, 4, 5))
    alone = [
        assign_groups(query[b : b + 1], key[b : b + 1], scores[b : b + 1], (3, 4, 5))
        for b in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_same_groups_under_autocast():
    query, key = tensors((1, 2, 60, 8), (1, 2, 60, 8), seed=10)
    scores = received_attention(query, key)
    expected = assign_groups(query, key, scores, (3, 4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(assign_groups(query, key, scores, (3, 4, 5)), expected)


def test_never_a_full_map():
    query, key = tensors((1, 2, 1024, 32), (1, 2, 1024, 32))
    with LargestTensor() as largest:
        scores = received_attention(query, key)
        assign_groups(query, key, scores, (4, 16, 16))
    assert largest.elements < 1024 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_groups_on_the_gpu(dtype):
    query, key = tensors((2, 4, 105, 64), (2, 2, 105, 64), dtype=dtype, seed=11)
    scores = received_attention(query, key)
    brutes = brute_groups(softmax_of(query, key), scores, (5, 3, 7))
    groups = assign_groups(query.cuda(), key.cuda(), scores.cuda(), (5, 3, 7))
    check(groups.cpu(), brutes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (3, 4, 6)}, r"scores: has shape \[2, 60\], but the grid has 72 tokens"),
        ({"grid": (3, 0, 6)}, r"grid: \(3, 0, 6\) is not allowed; give three positive sizes"),
        ({"window": (4, 4)}, r"window: \(4, 4\) is not allowed; give three positive sizes"),
        ({"threshold": 1.5}, r"threshold: 1\.5 is not allowed"),
        ({"lse": torch.zeros(2, 2, 59)}, r"lse: has shape \[2, 2, 59\], but query needs"),
        ({"video_positions": 4}, "60 tokens from 4 on do not fit into a sequence of 62"),
        ({"video_positions": torch.arange(59)}, r"video_positions: has shape \[59\]"),
        ({"parts": torch.arange(59)}, r"parts: has shape \[59\]"),
        ({"scores": torch.zeros(1, 60)}, "batch of 2 for 1 samples"),
        ({"key": torch.zeros(2, 2, 61, 8)}, "key: has 61 tokens, query 62"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    arguments = {
        "query": torch.zeros(2, 2, 62, 8),
        "key": torch.zeros(2, 2, 62, 8),
        "scores": torch.zeros(2, 60),
        "grid": (3, 4, 5),
    }
    with pytest.raises(ValueError, match=message):
        assign_groups(**(arguments | options))
