"""The measures of SeDA's and saliency's aims and the other groupings, against slow computations."""

import math

import pytest
import torch

from benchmarks.video import bench_video_groups as bench
from benchmarks.video import bench_video_quality as quality
from benchmarks.video import bench_video_steps as steps
from benchmarks.video import groupings
from benchmarks.video.consistency import Aims, consistency, recall, watched
from benchmarks.video.residuals import of_single_blocks, rounded_with_residuals
from dialect_kernels import SEMANTIC_32, quantize
from dialect_kernels.reference import round_activation
from diffusers_hook import SemanticDialectConfig
from diffusers_hook.attention.attention import Attention
from diffusers_hook.layouts import Blocks, Grid
from diffusers_hook.model.attach import attached
from diffusers_hook.tokens import refresh
from diffusers_hook.tokens.token_rows import TokenRows
from tests.video.support.tiny_video import generate, wan_pipeline

GRID = Grid(2, 3, 4, 5)
TOKENS = 60
TEXT = 4
SIZE = {"num_inference_steps": 4, "height": 32, "width": 32}


def attention(seed=0, text=TEXT):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 2, 3, TOKENS + text, 8, generator=generator)
    return Attention.checked(2 * query, key)


def where(text=None):
    return TokenRows(Blocks("blocks", (), "", text=text), GRID)


def weights(attention):
    """The mean over heads of the softmax, with loops: [B][query][key]."""
    samples, heads, queries, size = attention.query.shape
    found = torch.zeros(samples, queries, queries, dtype=torch.float64)
    for b in range(samples):
        for h in range(heads):
            for q in range(queries):
                logits = [
                    float(attention.query[b, h, q].double() @ attention.key[b, h, k].double())
                    / math.sqrt(size)
                    for k in range(queries)
                ]
                total = sum(math.exp(value) for value in logits)
                for k, value in enumerate(logits):
                    found[b, q, k] += math.exp(value) / total / heads
    return found


def test_consistency_is_that_of_a_slow_computation():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 64, generator=generator)
    group = torch.tensor([[0, 0, -1, 3, 0, 3], [-1, 1, -1, 1, 4, -1]])
    found = consistency(x, group, SEMANTIC_32, 32)

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    likeness, apart, energy, anyone = [], {"alone": 0.0, "together": 0.0}, 0.0, []
    for sample, anchors in zip(x.double(), group.tolist(), strict=True):
        anyone += [cosine(sample[i], sample[j]) for i in range(6) for j in range(6) if i != j]
        for anchor in sorted({a for a in anchors if a >= 0}):
            members = [t for t in range(6) if anchors[t] == anchor]
            rows = sample[members].float()
            same = torch.zeros(len(members), dtype=torch.int64)
            for name, shared in (("alone", None), ("together", same)):
                error = round_activation(rows, SEMANTIC_32, 32, shared).double() - rows.double()
                of_anchor = error[members.index(anchor)]
                apart[name] += float((error - of_anchor).square().sum())
            for t in members:
                if t != anchor:
                    likeness.append(cosine(sample[t], sample[anchor]))
                    energy += float(sample[t].square().sum())
    assert found.likeness == pytest.approx(sum(likeness) / len(likeness), abs=1e-6)
    assert found.of_any == pytest.approx(sum(anyone) / len(anyone), abs=1e-6)
    assert found.alone == pytest.approx(math.sqrt(apart["alone"] / energy), rel=1e-5)
    assert found.together == pytest.approx(math.sqrt(apart["together"] / energy), rel=1e-5)
    assert found.alone != found.together


def test_equal_tokens_are_rounded_alike_and_lonely_ones_do_not_count():
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(2)).expand(1, 4, 32)
    found = consistency(x, torch.tensor([[0, 0, 2, -1]]), SEMANTIC_32, 32)
    assert found.likeness == pytest.approx(1)
    assert found.of_any == pytest.approx(1)
    assert found.alone == found.together == 0
    assert consistency(x, torch.tensor([[0, 1, 2, -1]]), SEMANTIC_32, 32) is None


@pytest.mark.parametrize("text", ["first", "last"])
def test_recall_counts_every_query(text):
    shown = attention()
    video = where(text).video(TOKENS + TEXT)
    received = weights(shown).sum(1)[:, video]
    true = received.argsort(dim=1, descending=True)[:, :8]
    assert recall(shown, true.sort(dim=1).values, video) == 1
    half = true.clone()
    half[0, :4] = received[0].argsort()[:4]
    assert recall(shown, half, video) == 0.75


def test_rows_of_attention_are_those_of_a_slow_computation():
    shown = attention()
    found = groupings.rows_of(shown, where("last"))
    assert torch.allclose(found.double(), weights(shown)[:, :TOKENS, :TOKENS], atol=1e-6)


def test_a_floor_frees_tokens_of_the_hooks_groups():
    shown, config = attention(text=0), SemanticDialectConfig(seda=True, seda_window=(2, 2, 2))
    scores = refresh.video_scores(shown, where())
    own = refresh.group(shown, scores, where(), config)
    found = groupings.with_floor(1.5)(shown, scores, where(), config)
    a = weights(shown)
    freed = 0
    for b in range(2):
        for t in range(TOKENS):
            anchor = int(own[b, t])
            weak = anchor not in (-1, t) and float(a[b, t, anchor] + a[b, anchor, t]) / 2 < (
                1.5 / TOKENS
            )
            assert int(found[b, t]) == (-1 if weak else anchor)
            freed += weak
    assert 0 < freed < TOKENS


def test_alike_tokens_join_the_most_alike_anchor():
    generator = torch.Generator().manual_seed(3)
    shown, config = attention(text=0), SemanticDialectConfig(seda=True, seda_window=(2, 2, 2))
    scores = torch.rand(2, TOKENS, generator=generator)
    vectors = torch.randn(2, TOKENS, 3, generator=generator)
    found = groupings.alike(lambda *_: vectors, 0.5)(shown, scores, where(), config)
    place = [(t, h, w) for t in range(3) for h in range(4) for w in range(5)]
    for b in range(2):
        expected = [-1.0] * TOKENS
        group, anchors = [-1] * TOKENS, set()
        for shift in (0, 1):
            windows = {}
            for token, at in enumerate(place):
                windows.setdefault(tuple((i + shift) // 2 for i in at), []).append(token)
            for members in windows.values():
                anchor = max(members, key=lambda token: float(scores[b, token]))
                anchors.add(anchor)
                for token in members:
                    u, v = vectors[b, token].double(), vectors[b, anchor].double()
                    cosine = float(u @ v / (u.norm() * v.norm()))
                    if cosine >= 0.5 and cosine > expected[token]:
                        expected[token], group[token] = cosine, anchor
        for anchor in anchors:
            group[anchor] = anchor
        assert found[b].tolist() == group


def test_boxes_of_places():
    scores, config = torch.zeros(2, TOKENS), SemanticDialectConfig()
    pairs = groupings.in_place(2)(attention(text=0), scores, where(), config)
    assert pairs.dtype == torch.int32
    assert pairs[1].view(3, 20).tolist() == [
        list(range(20)), list(range(20)), list(range(40, 60)),
    ]  # fmt: skip
    squares = groupings.in_place(1, 2)(attention(text=0), scores, where(), config)
    assert squares[0, :20].view(4, 5).tolist() == [
        [0, 0, 2, 2, 4], [0, 0, 2, 2, 4], [10, 10, 12, 12, 14], [10, 10, 12, 12, 14],
    ]  # fmt: skip


def test_residuals_of_single_blocks_are_those_that_matter_most():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 5, 64, generator=generator)
    matrix = torch.randn(32, 64, generator=generator)
    matrix[:, 32:] *= 3
    packed = quantize(matrix, SEMANTIC_32, 32, "mse")
    weight = packed.dequantize()
    found = rounded_with_residuals(x, [weight], packed, 0.3)
    for sample, rows in zip(found, x, strict=True):
        once = round_activation(rows, SEMANTIC_32, 32)
        twice = once + round_activation(rows - once, SEMANTIC_32, 32)
        loss = {}
        for t in range(5):
            for b in range(2):
                part = slice(32 * b, 32 * b + 32)
                error = (rows - once)[t, part].double().square()
                loss[t, b] = float(error @ weight[:, part].double().square().sum(0))
        chosen = sorted(loss, key=loss.__getitem__)[-3:]
        for t, b in loss:
            part = slice(32 * b, 32 * b + 32)
            expected = twice if (t, b) in chosen else once
            assert torch.equal(sample[t, part], expected[t, part])


def test_single_blocks_take_the_place_of_salient_tokens():
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(progress=False, salient_fraction=0.25)
    before = generate(pipe)
    with of_single_blocks(0.25):
        assert not torch.equal(generate(pipe), before)
    with of_single_blocks(1.0):
        every = generate(pipe)
    assert torch.equal(generate(pipe), before)
    pipe.disable_semantic_dialect()
    wanted = generate(pipe)
    assert (every - wanted).square().mean() < (before - wanted).square().mean()


def test_a_generation_is_watched_without_being_changed():
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(progress=False, seda=True, seda_refresh=1, salient_refresh=2)
    before = generate(pipe, **SIZE)
    aims, own = Aims(), refresh.group
    with watched(pipe.transformer, aims), groupings.in_force(None):
        watching = generate(pipe, **SIZE)
    assert torch.equal(watching, before)
    blocks = len(attached(pipe.transformer).state.blocks)
    assert {age: len(found) for age, found in aims.recalls.items()} == {
        0: 2 * 2 * blocks,
        1: 2 * 2 * blocks,
    }
    assert all(0 <= value <= 1 for found in aims.recalls.values() for value in found)
    assert aims.consistencies
    assert all(0 < share < 1 for share in aims.grouped)
    count = len(aims.consistencies)
    with groupings.in_force(groupings.in_place(2)):
        assert not torch.equal(generate(pipe, **SIZE), before)
    assert refresh.group is own
    assert torch.equal(generate(pipe, **SIZE), before)
    assert len(aims.consistencies) == count


def test_the_table_pairs_each_grouping_with_no_groups():
    plain = {"psnr": [20.0, 22.0, 24.0], "change": [5.0, 5.0, 5.0], "grouped": 0.0,
             "recall": {"0": 0.93, "1": 0.8}}  # fmt: skip
    grouped = {"psnr": [21.0, 24.0, 27.0], "change": [5.0, 5.1, 5.2], "grouped": 0.62,
               "likeness": 0.7, "of_any": 0.64, "alone": 0.136, "together": 0.143}  # fmt: skip
    ways = {bench.CONTROL: plain, "new": grouped, "same": plain}
    found = bench.tables({"steps": 16, "ways": ways})
    # differences 1, 2, 3: mean 2, standard error 1 / sqrt(3)
    assert found["groups"][1:] == [
        ["new", "62%", "0.70 / 0.64", "13.60%", "14.30%", "+2.00 ± 0.58 dB", "+0.10 ± 0.06 %"],
        ["same", "–", "–", "–", "–", "+0.00 ± 0.00 dB", "+0.00 ± 0.00 %"],
    ]
    assert found["recall"] == [["attention calls since the choice", "0", "1"],
                               ["recall", "0.93", "0.80"]]  # fmt: skip


def test_the_videos_are_none_of_those_of_other_benchmarks():
    assert not set(bench.SEEDS) & {*quality.SEEDS, *steps.SEEDS}
    assert bench._SCENES not in (16, 17, steps._SCENES)


def test_every_way_is_measured(monkeypatch):
    """On the model that ships, in two steps: nothing to read off, but the whole path."""
    for name, value in {"PROMPTS": 2, "SEEDS": (40,), "STEPS": 2}.items():
        monkeypatch.setattr(bench, name, value)
    figures = bench.measure()
    assert list(figures["ways"]) == list(bench.ways())
    for name, row in figures["ways"].items():
        assert len(row["psnr"]) == len(row["change"]) == 2
        assert all(math.isfinite(value) for value in row["psnr"])
        assert row["recall"].keys() == {"0", "1"}
        assert (row["grouped"] > 0) == (name not in (bench.CONTROL, bench.BLOCKS))
    videos = [tuple(row["psnr"]) for row in figures["ways"].values()]
    assert len(set(videos)) == len(videos)
    assert len(bench.tables(figures)["groups"]) == len(videos)
