"""Which plan is chosen for a product: the derived table, and measured files."""

import json
import logging
from itertools import pairwise

import pytest

from dialect_kernels.gpu import tuning
from dialect_kernels.gpu.tuning import (
    GemmPlan,
    _can_split,
    _default_plan,
    _measured_plan,
    _tuned_plans,
    choose,
    parse_plans,
)

H200 = {"processors": 132, "table": "fp8"}


def plan_of(tokens, features=4096, columns=4096, **facts):
    return _default_plan(tokens, features, columns, **(H200 | facts))


@pytest.mark.parametrize("table", tuning.TABLES)
def test_a_plan_for_every_number_of_tokens(table):
    kinds = [plan_of(tokens, table=table).kind for tokens in range(1, 2049)]
    assert kinds[0] == "fused"
    assert kinds[-1] == "scratch"
    assert sum(a != b for a, b in pairwise(kinds)) == 1, "one crossover"


def test_tiles_grow_with_the_tokens():
    tiles = [plan_of(tokens).tokens for tokens in range(1, 65)]
    assert tiles == sorted(tiles)
    assert tiles[0] == 16, "the MMA's smallest side"


def test_columns_are_split_only_where_tiles_are_few():
    assert plan_of(1).splits > 1
    assert plan_of(1, features=128256).splits == 1
    assert plan_of(1, columns=256).splits == 1, "a split has several steps"
    for tokens in (1, 16, 17, 64, 100):
        for features in (1, 64, 4096, 28672):
            plan = plan_of(tokens, features)
            tiles = -(-tokens // plan.tokens) * -(-features // plan.features)
            assert 1 <= plan.splits <= 8
            assert plan.splits == 1 or tiles * plan.splits <= 3 * 132


def test_wide_tiles_where_they_fill_the_device():
    assert [plan_of(tokens, 28672).features for tokens in (16, 32, 64)] == [128, 256, 256]
    for tokens in (16, 32, 64):
        assert plan_of(tokens, 1024).features < 256, "four programs cannot read a weight at speed"


def test_tiles_without_registers_for_it_are_not_split():
    for features in range(256, 16384, 256):
        for tokens in (1, 20, 50, 200):
            plan = plan_of(tokens, features, 14336)
            assert plan.splits == 1 or _can_split(plan)


@pytest.fixture
def folder(tmp_path):
    """A folder of measured plans as the package has one; no result outlives the test."""
    configs = tmp_path / "configs"
    configs.mkdir()
    yield tmp_path
    _tuned_plans.cache_clear()


def test_measured_plans_are_chosen_by_the_nearest_number(folder, monkeypatch):
    fields = {"kind": "fused", "tokens": 32, "features": 64, "columns": 128, "splits": 3}
    data = {"dialect": {"1": fields, "100": {"kind": "scratch"}}}
    name = "gemm,N=4096,K=14336,device=NVIDIA_H200.json"
    (folder / "configs" / name).write_text(json.dumps(data))
    monkeypatch.setattr(tuning, "files", lambda package: folder)
    _tuned_plans.cache_clear()

    def kind(tokens, activation_format="dialect", features=4096):
        plan = choose(tokens, features, 14336, activation_format, "NVIDIA H200", **H200)
        return plan.kind, plan.splits

    assert kind(1) == ("fused", 3)
    assert kind(9) == ("fused", 3)
    assert kind(49)[1] != 3, "derived: too far from 1 and from 100"
    assert kind(51) == ("scratch", 1)
    assert kind(9999) == ("scratch", 1)
    assert kind(9999, "fp8")[0] == "scratch", "what is not in the file is derived"
    assert kind(64, features=4095)[0] == "fused"


def fused(tokens, splits=1):
    return GemmPlan("fused", tokens, splits=splits)


def test_a_tile_is_not_used_far_beyond_what_was_measured():
    """A file of the fused kernel only must not decide about a prompt."""
    plans = {16: fused(16), 512: fused(128), 1024: fused(128)}
    near = {1: 16, 16: 16, 257: 512, 512: 512, 513: 1024, 700: 1024, 1024: 1024, 1536: 1024}
    for tokens, measured in near.items():
        assert _measured_plan(tokens, plans) is plans[measured]
    for tokens in (25, 255, 1537, 2048, 16384, 131072):
        assert _measured_plan(tokens, plans) is None
    assert _measured_plan(1, {}) is None


def test_a_larger_measured_tile_before_one_that_is_too_small():
    plans = {1: fused(16, 1), 16: fused(16, 2), 24: fused(32, 3), 128: fused(128), 256: fused(128)}
    for tokens, measured in ((1, 1), (3, 1), (9, 16), (16, 16), (17, 24), (32, 24), (150, 256)):
        assert _measured_plan(tokens, plans) is plans[measured], tokens
    assert _measured_plan(20, {16: fused(16)}).tokens == 16, "there is no other"


def test_the_library_for_all_that_is_larger():
    plans = {512: fused(128), 1024: GemmPlan("scratch")}
    assert _measured_plan(1 << 17, plans) == GemmPlan("scratch")
    assert _measured_plan(513, plans) is plans[1024], "one more token is one more tile"
    assert _measured_plan(500, plans) is plans[512]


def test_one_warning_without_a_measurement(caplog):
    tuning._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for tokens in (1, 2, 300):
            choose(tokens, 64, 64, "dialect", "Some GPU", **H200)
    assert [record.getMessage() for record in caplog.records] == [
        "no measured GEMM configuration for Some GPU: using derived ones"
    ]


def test_files_that_hold_something_else(folder, monkeypatch):
    monkeypatch.setattr(tuning, "files", lambda package: folder)
    file = folder / "configs" / "gemm,N=1,K=2,device=x.json"
    for text, sentence in (
        ("{", r"gemm,N=1,K=2,device=x.json: .*measure again or remove the file"),
        ('{"dialect": {"1": {"kind": "fast"}}}', "kind: 'fast'; allowed are 'fused' and 'scratch'"),
        ('{"dialect": {"1": {"kind": "fused", "tile": 3}}}', "unexpected keyword argument 'tile'"),
        ('{"dialect": {"1": {"kind": "fused", "tokens": 24}}}', "tokens: 24; allowed are 16..256"),
        ('{"dialect": {"1": {"kind": "fused", "columns": 1024}}}', "columns: 1024; allowed"),
        ('{"dialect": {"many": {"kind": "fused"}}}', "invalid literal for int"),
    ):
        _tuned_plans.cache_clear()
        file.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            _tuned_plans(1, 2, "x")


def test_accumulator_bits_are_measured_or_unknown(folder, monkeypatch):
    monkeypatch.setattr(tuning, "files", lambda package: folder)
    file = folder / "configs" / "probes,device=NVIDIA_H200.json"
    tuning.accumulator_bits.cache_clear()
    assert tuning.accumulator_bits("NVIDIA H200") is None
    measured = {"gpu": "NVIDIA H200", "fp8_accumulator_bits": {"within": 13, "across": 22}}
    for text, sentence in (
        (json.dumps(measured), None),
        ("{", r"probes,device=NVIDIA_H200.json: holds no integer fp8_accumulator_bits\.across"),
        (json.dumps({"fp8_accumulator_bits": {"across": "22"}}), "holds no integer"),
    ):
        file.write_text(text)
        tuning.accumulator_bits.cache_clear()
        if sentence is None:
            assert tuning.accumulator_bits("NVIDIA H200") == 22
        else:
            with pytest.raises(ValueError, match=sentence):
                tuning.accumulator_bits("NVIDIA H200")
    tuning.accumulator_bits.cache_clear()


def test_plans_from_json():
    assert parse_plans({"none": {"8": {"kind": "scratch"}}}) == {"none": {8: GemmPlan("scratch")}}
