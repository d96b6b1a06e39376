"""Damaged checkpoints at random, and every fault that they have found, by itself."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.language.mutation_verdicts import OUTCOMES, Verdict, judge, sound_faults
from benchmarks.language.mutation_workers import judge_all
from benchmarks.language.mutations import KINDS, PACKED, SOURCES, make_victims
from dialect_plugin.checkpoint.companions import find_companions
from dialect_plugin.checkpoint.convert import convert
from dialect_plugin.checkpoint.inspection import inspect_checkpoint
from dialect_plugin.checkpoint.json_files import load_json
from dialect_plugin.checkpoint.progress import Silent
from dialect_plugin.checkpoint.reader import CheckpointError, open_checkpoint
from dialect_plugin.scheme import Scheme, SchemeError
from tests.support.conversions import edit_config, refused

SHARE = range(1_000_000, 1_000_200)
"""Cases of every run of the tests; the benchmark takes thousands of others."""


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    path = tmp_path_factory.mktemp("victims")
    make_victims(path)
    return path


def test_sound_checkpoints_are_right(tmp_path):
    (tmp_path / "scratch").mkdir()
    assert sound_faults(tmp_path / "victims", tmp_path / "scratch") == []


def test_a_share_of_the_damaged_ones(victims, tmp_path):
    """No crash, no hang, no wrong acceptance; and the share is no idle one."""
    found = list(judge_all(judge, victims, SHARE, tmp_path / "s", seconds=60, processes=1))
    faults = [v for v in found if v.outcome not in ("refused", "right")]
    assert faults == []
    assert sorted(v.number for v in found) == list(SHARE)
    assert {v.victim for v in found} == {*SOURCES, *PACKED}
    assert {kind for v in found for kind in v.kinds} == set(KINDS)
    refused_ones = sum(v.outcome == "refused" for v in found)
    assert len(found) * 0.3 < refused_ones < len(found) * 0.95


def _hang_or_die(victims, number, scratch):
    if number == 1:
        time.sleep(1000)
    if number == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 3:
        return Verdict(number, "", (), "right", str(len(bytearray(1 << 40))), 0)
    return Verdict(number, "", (), "right", "", 0)


@pytest.mark.slow
def test_hangs_and_deaths_are_seen_and_survived(tmp_path):
    found = judge_all(_hang_or_die, tmp_path, range(4), tmp_path / "s", seconds=5, processes=1)
    outcomes = {verdict.number: (verdict.outcome, verdict.detail) for verdict in found}
    assert set(OUTCOMES) > {outcome for outcome, _ in outcomes.values()}
    assert outcomes == {
        0: ("right", ""),
        1: ("hang", "not done after 5 s"),
        2: ("crash", "the process ended with -11"),
        3: ("crash", "the process ended with 1"),  # out of memory
    }


class TestOracle:
    """What must not be accepted is found, if the product accepts it."""

    def judged(self, monkeypatch, victims, scratch, number, name, replacement):
        monkeypatch.setattr(f"benchmarks.language.mutation_verdicts.{name}", replacement)
        scratch.mkdir(exist_ok=True)
        return judge(victims, number, scratch)

    def test_a_conversion_of_other_values(self, monkeypatch, victims, tmp_path):
        def other(source, destination, **options):
            result = convert(victims / SOURCES[0], destination, **options)
            shard = next(destination.glob("*-00001-*"))
            tensors = load_file(shard)
            name = next(name for name in tensors if name.endswith("_packed"))
            tensors[name][0, 0] ^= 1
            save_file(tensors, shard, {"format": "pt"})
            return result

        outcomes = {
            self.judged(monkeypatch, victims, tmp_path / "s", number, "convert", other).outcome
            for number in range(40)
        }
        assert "wrong" in outcomes

    def test_a_file_that_the_format_forbids(self, victims, tmp_path, monkeypatch):
        found = [
            self.judged(
                monkeypatch, victims, tmp_path / "s", number, "inspect_checkpoint", lambda *_: None
            )
            for number in range(40)
        ]
        details = " ".join(v.detail for v in found if v.outcome == "wrong")
        assert "accepted, but" in details


def raw_header(path, text, data=b""):
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


class TestJson:
    """config.json and the index hold what nobody expects."""

    @pytest.mark.parametrize("depth", [101, 500, 950, 985, 100_000])
    def test_nested_beyond_reason(self, source, tmp_path, depth):
        config = (source / "config.json").read_text().rstrip("} \n")
        deep = "[" * depth + "]" * depth
        (source / "config.json").write_text(f'{config}, "a": {deep}}}')
        refused(source, tmp_path / "packed", "config.json: is not valid JSON .*(nested|recursion)")

    def test_nested_as_no_config_is(self, source, tmp_path):
        config = (source / "config.json").read_text().rstrip("} \n")
        (source / "config.json").write_text(f'{config}, "a": {"[" * 90 + "]" * 90}}}')
        assert convert(source, tmp_path / "packed").layers

    def test_text_that_utf_8_cannot_hold(self, source, tmp_path):
        edit_config(source, name_or_path="\ud800")
        refused(source, tmp_path / "packed", "config.json: is not valid JSON .*surrogates")
        edit_config(source, name_or_path="\U0001f600")  # two escapes that belong together
        assert convert(source, tmp_path / "packed").layers

    @pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/dev/zero")])
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
    def test_no_regular_file(self, source, tmp_path, make, name):
        (source / name).unlink(missing_ok=True)
        make(source / name)
        refused(source, tmp_path / "packed", f"{name}: is not a regular file")

    def test_a_link_to_itself(self, source, tmp_path):
        (source / "config.json").unlink()
        (source / "config.json").symlink_to("config.json")
        refused(source, tmp_path / "packed", "config.json: cannot be read")

    def test_lines_and_escapes_in_values(self, source, tmp_path):
        edit_config(source, quantization_config={"quant_method": "a\n\x1b[2Jb"})
        refused(source, tmp_path / "packed", r"quantized already \(a\\n\\x1b\[2Jb\)")
        config = {"overrides": {"a\nb": {"block_size": 1}}}
        with pytest.raises(SchemeError, match=r"overrides\.a\\nb") as caught:
            Scheme.parse(config)
        assert "\n" not in str(caught.value)

    def test_file_names_that_no_disk_holds(self, source, tmp_path):
        index = {"weight_map": {"model.norm.weight": "é" * 200 + ".safetensors"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(source, tmp_path / "packed", "is missing; download the model again")

    @pytest.mark.parametrize("pattern", ["re:a{4294967296}", "re:" + "(" * 5000, "re:("])
    def test_expressions_that_do_not_compile(self, pattern):
        with pytest.raises(SchemeError, match="is not a regular expression"):
            Scheme.parse({"ignore": [pattern]})

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(CheckpointError, match="is missing; a checkpoint directory needs it"):
            load_json(tmp_path / "config.json")


class TestHeaders:
    """Headers that safetensors takes, or that our own reading would have stumbled over."""

    @pytest.mark.parametrize("name", ["a\nb", "\x1b[2Jb", "a\0b", "a\u202eb"])
    def test_names_that_cannot_be_printed(self, tmp_path, name):
        (tmp_path / "config.json").write_text("{}")
        entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
        raw_header(tmp_path / "model.safetensors", json.dumps({name: entry}).encode(), b"0")
        with pytest.raises(CheckpointError, match=r"cannot be printed; rename it") as caught:
            open_checkpoint(tmp_path)
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("shape", [[2**63, 0], [0, 2**62], [0, 2**41]])
    def test_empty_tensors_beyond_64_bits(self, tmp_path, shape):
        (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
        header = {"model.layers.0.mlp.up_proj.weight": entry}
        raw_header(tmp_path / "model.safetensors", json.dumps(header).encode())
        with pytest.raises(CheckpointError, match=r"no dimension may be larger than 2\*\*40"):
            convert(tmp_path, tmp_path.with_name("packed"))


class TestCompanions:
    """Files beside the weights that point to somewhere else."""

    def test_paths_that_are_none(self, source, tmp_path):
        paths = [["a"], None, 1, "/", "..", "../..", "", ".", "é" * 200, "a\0b", "x" * 5000, {}]
        modules = [{"path": path} for path in paths]
        (source / "modules.json").write_text(json.dumps(modules))
        (source / "generation_config.json").write_text(json.dumps({"a": "é" * 200, "b": "a\0b"}))
        checkpoint = open_checkpoint(source)
        assert {name.parent.name for name in find_companions(checkpoint).copied} == {""}
        assert convert(source, tmp_path / "packed").layers

    def test_links_to_folders_are_not_followed(self, source, tmp_path):
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "config.json").write_text("{}")
        (source / "1_Pooling").symlink_to(outside)
        assert not [n for n in find_companions(open_checkpoint(source)).copied if n.parent.name]
        (source / "modules.json").write_text('[{"path": "1_Pooling"}]')
        refused(source, tmp_path / "packed", "1_Pooling: is a link, and links to folders are not")

    def test_pipes_are_not_read(self, source, tmp_path):
        for name in ("modules.json", "tokenizer_config.json"):
            (source / name).unlink(missing_ok=True)
            os.mkfifo(source / name)
        assert convert(source, tmp_path / "packed").layers
        inspect_checkpoint(tmp_path / "packed", Silent())
