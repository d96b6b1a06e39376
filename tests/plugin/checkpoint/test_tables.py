"""Tables of layers: the total first, natural order, folded names, sums per projection and depth."""

from typing import NamedTuple

import pytest

from dialect_plugin.checkpoint.tables import folded, layer_table, natural_order


class Layer(NamedTuple):
    name: str
    rows: int = 64
    columns: int = 32


def rows_of(names, **options):
    """The lines of a table with one more column: the number of layers in the row."""
    layers = [Layer(name) for name in names]
    text = layer_table(["n"], layers, lambda group: [str(len(group))], **options)
    assert text == "\n".join(line.rstrip() for line in text.split("\n"))
    return text.split("\n")


def test_numbers_in_names_are_ordered_as_numbers():
    names = ["layers.10.a", "layers.9.a", "layers.2.b", "layers.2.a", "lm_head", "7.x"]
    assert sorted(names, key=natural_order) == [
        "7.x", "layers.2.a", "layers.2.b", "layers.9.a", "layers.10.a", "lm_head",
    ]  # fmt: skip


def test_the_total_comes_first_then_projections_depths_and_layers():
    names = [f"model.layers.{i}.{part}" for i in (10, 2) for part in ("mlp.up", "attn.q")]
    assert rows_of([*names, "lm_head"]) == [
        "layer         n",
        "all 5 layers  5",
        "",
        "by projection, below model.layers",
        "attn.q        2",
        "mlp.up        2",
        "lm_head       1",
        "",
        "by depth, below model.layers",
        "2             2",
        "10            2",
        "",
        "each layer, below model.layers",
        "2.attn.q      1",
        "2.mlp.up      1",
        "10.attn.q     1",
        "10.mlp.up     1",
        "lm_head       1",
    ]


def test_several_stacks_and_numbered_experts_stay_apart():
    names = [
        f"model.{stack}.layers.{i}.{part}"
        for stack in ("encoder", "decoder")
        for i in range(2)
        for part in ("fc1", "experts.0.w", "experts.1.w")
    ]
    shown = rows_of(names)
    first = shown.index("by projection, below model")
    assert [line.split() for line in shown[first + 1 : first + 5]] == [
        ["decoder.layers.*.experts.*.w", "4"],
        ["decoder.layers.*.fc1", "2"],
        ["encoder.layers.*.experts.*.w", "4"],
        ["encoder.layers.*.fc1", "2"],
    ]
    first = shown.index("by depth, below model")
    assert [line.split()[0] for line in shown[first + 1 : first + 5]] == [
        "decoder.layers.0", "decoder.layers.1", "encoder.layers.0", "encoder.layers.1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["lm_head"], ["lm_head"]),
        (["h.0.attn.c_attn", "h.1.attn.c_attn"], ["0.attn.c_attn", "1.attn.c_attn"]),
        (["0.q", "1.q"], ["0.q", "1.q"]),
        (["model.layers.0.q", "model.layers.0.k"], ["0.k", "0.q"]),
        ([], []),
    ],
)
def test_names_of_every_kind_are_listed(names, short):
    shown = rows_of(names)
    listed = [line.split()[0] for line in shown[shown.index("") + 2 :]] if names else shown[2:]
    assert listed == short


def test_only_the_layers_to_list_are_listed_and_nothing_is_cut_off():
    long = "model.layers.0." + "x" * 300
    layers = [Layer(long), Layer("model.layers.1.q")]
    text = layer_table(["n"], layers, lambda group: ["1"], listed=layers[:1], title="some")
    assert text.endswith("some, below model.layers\n0." + "x" * 300 + "  1")
    assert "below model.layers" not in layer_table(["n"], layers, lambda group: ["1"], listed=[])


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["lm_head", "model.layers.3.q"], "lm_head, model.layers.3.q"),
        (
            [f"model.layers.{i}.mlp.down_proj" for i in (10, 0, 1, 2, 5, 9)],
            "model.layers.0-2,5,9-10.mlp.down_proj",
        ),
        (
            ["h.0.b (16)", "h.1.b (64)", "h.2.b (16)", "h.0.a.7.c"],
            "h.0.a.7.c, h.0,2.b (16), h.1.b (64)",
        ),
        (["e.0.a", "d.0.a", "e.1.a"], "d.0.a, e.0-1.a"),
    ],
)
def test_names_in_one_line(names, text):
    assert folded(names) == text
