"""From text to windows of tokens, and the text that is refused."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from dialect_plugin.calibration.options import CalibrationOptions
from dialect_plugin.calibration.text import read_text
from dialect_plugin.checkpoint.reader import CheckpointError

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def read(path, text, vocabulary=320, **options):
    return read_text(path, CalibrationOptions(calibrate=str(text), **options), vocabulary)


@pytest.fixture
def tokenizer(source):
    return AutoTokenizer.from_pretrained(source)


@pytest.fixture
def chatty(source, tokenizer):
    """The checkpoint with a chat template."""
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    return source


def test_a_text_file_is_cut_into_windows_that_begin_with_the_begin_token(
    source, tokenizer, tmp_path
):
    text = "def hello(name):\n" * 40
    (tmp_path / "text.txt").write_text(text)
    windows = read(source, tmp_path / "text.txt", sequence_length=16).windows
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert windows.shape == (len(tokens) // 15, 16)
    assert windows.dtype == torch.int64
    assert set(windows[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert windows[:, 1:].flatten().tolist() == tokens[: windows.shape[0] * 15]


def test_without_a_begin_token_windows_hold_text_only(source, tokenizer, tmp_path):
    tokenizer.bos_token = None
    tokenizer.save_pretrained(source)
    (tmp_path / "text.txt").write_text("abc " * 100)
    windows = read(source, tmp_path / "text.txt", sequence_length=16).windows
    tokens = tokenizer("abc " * 100, add_special_tokens=False).input_ids
    assert windows.flatten().tolist() == tokens[: windows.numel()]


def test_of_a_long_text_samples_are_spread_evenly(source, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{number} " for number in range(3000)))
    every = read(source, tmp_path / "text.txt", sequence_length=32, samples=10_000).windows
    some = read(source, tmp_path / "text.txt", sequence_length=32, samples=4).windows
    assert len(every) > 100
    places = [index * len(every) // 4 for index in range(4)]
    assert torch.equal(some, every[places])


def test_lines_of_texts_and_conversations(chatty, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    lines = [{"text": "abc"}, {"messages": messages}, {"text": "xyz", "source": "mine"}]
    (tmp_path / "text.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    windows = read(chatty, tmp_path / "text.jsonl", sequence_length=8).windows
    decoded = tokenizer.decode(windows[:, 1:].flatten())
    assert "abc[user]hi[assistant]helloxyz".startswith(decoded)
    assert len(decoded) > 20


def test_the_hash_follows_the_tokens(source, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(("x" if name == "c" else "y") * 500)
    hashes = [read(source, tmp_path / name, sequence_length=16).sha256 for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_default_text_is_installed(source, chatty):
    """It holds at least 16 windows of 512 tokens for a real tokenizer; this one has few words."""
    for model in (source, chatty):
        found = read(model, "default")
        assert found.name == "default"
        assert found.windows.shape[1] == 512
        assert len(found.windows) >= 16


def refused(path, text, match, **options):
    with pytest.raises(CheckpointError, match=match) as caught:
        read(path, text, **options)
    assert "\n" not in str(caught.value)


def test_bad_text(source, tmp_path):
    refused(source, tmp_path / "absent", "--calibrate: .*absent is not a file; give a text file")
    (tmp_path / "short").write_text("abc")
    refused(source, tmp_path / "short", "short holds . tokens, and one window takes 512; give a lo")
    (tmp_path / "empty").write_text("")
    refused(source, tmp_path / "empty", "holds 0 tokens")
    (tmp_path / "binary").write_bytes(b"abc\xff\xfe" * 100)
    refused(source, tmp_path / "binary", "is not UTF-8 text .* at byte 3")


@pytest.mark.parametrize(
    "line",
    ["abc", "[1]", "{}", '{"text": 5}', '{"messages": []}', '{"messages": [{"role": "user"}]}',
     '{"messages": [{"role": "user", "content": 5}]}', '{"text": ""}'],
)  # fmt: skip
def test_bad_lines(source, tmp_path, line):
    (tmp_path / "text.jsonl").write_text('{"text": "abc"}\n' + line + "\n")
    refused(source, tmp_path / "text.jsonl", "line 2 must be .*text.* or .*messages")


def test_conversations_without_a_template(source, tmp_path):
    line = {"messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "text.jsonl").write_text(json.dumps(line))
    refused(source, tmp_path / "text.jsonl", "no chat template; give")


def test_a_template_that_fails(source, tokenizer, tmp_path):
    tokenizer.chat_template = "{{ raise_exception('users first') }}"
    tokenizer.save_pretrained(source)
    line = {"messages": [{"role": "assistant", "content": "hi"}]}
    (tmp_path / "text.jsonl").write_text(json.dumps(line))
    refused(source, tmp_path / "text.jsonl", "does not take the conversation .*'hi' .users first")


def test_no_tokenizer(source, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    (tmp_path / "text.txt").write_text("abc " * 1000)
    refused(source, tmp_path / "text.txt", "has no tokenizer that transformers can read")


def test_a_tokenizer_of_another_model(source, tmp_path):
    (tmp_path / "text.txt").write_text("abc " * 1000)
    refused(
        source,
        tmp_path / "text.txt",
        "its tokenizer gives token .*, but the model's vocabulary has 50 entries",
        vocabulary=50,
    )


ROWS = {"text": ["one two", "", "three"], "body": ["a", "b", "c"], "number": [1, 2, 3]}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def decoded(source, text, **options):
    windows = read(source, text, sequence_length=4, **options).windows
    return AutoTokenizer.from_pretrained(source).decode(windows[:, 1:].flatten())


def test_a_data_set_that_was_saved_on_disk(source, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(ROWS)
    rows.save_to_disk(tmp_path / "rows")
    assert "one twothree".startswith(decoded(source, tmp_path / "rows"))
    both = datasets.DatasetDict({"other": rows.select([2]), "train": rows})
    both.save_to_disk(tmp_path / "both")
    assert decoded(source, tmp_path / "both")[:3] == "one"
    assert "three".startswith(decoded(source, f"{tmp_path}/both:other"))
    assert decoded(source, f"{tmp_path}/both:train:body") == "abc"
    assert decoded(source, f"{tmp_path}/both::body", samples=1) == "abc"
    refused(source, f"{tmp_path}/both:train:number", "column number of row 0 is neither text nor a")
    refused(source, f"{tmp_path}/both:train:nothing", "has no column nothing; it has text, body, n")
    refused(source, f"{tmp_path}/both:dev", "has no split dev; it has other, train")


def test_a_directory_of_data_files_and_conversations(chatty, tmp_path):
    pytest.importorskip("datasets")
    line = json.dumps({"id": 1, "messages": CHAT})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(f"{line}\n{line}\n")
    found = decoded(chatty, tmp_path / "set")
    assert ("[user]hi[assistant]hello" * 2).startswith(found)
    assert len(found) > 30
    bare = tmp_path / "set" / "train.jsonl"
    bare.write_text(json.dumps({"id": 1}) + "\n")
    refused(
        chatty, tmp_path / "set", "has no column text or messages; it has id: name one as .*set:"
    )


def test_of_a_data_set_no_more_is_read_than_is_needed(source, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["some words and more " * 9, "x" * 30_000]})
    rows.save_to_disk(tmp_path / "rows")
    first = read(source, tmp_path / "rows", sequence_length=16, samples=2)
    assert "x" not in AutoTokenizer.from_pretrained(source).decode(first.windows.flatten())
    assert len(read(source, tmp_path / "rows", sequence_length=16, samples=99).windows) == 99


def test_what_is_no_data_set(source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    refused(source, tmp_path / "empty", "is not a file, and not a data set that can be read")
    monkeypatch.setattr(
        "dialect_plugin.calibration.documents.find_spec", {"datasets": None}.__getitem__
    )
    refused(source, "owner/name:train", "owner/name is not a file, and data sets are read by the "
            "package datasets; install it with pip install 'blockdialect.datasets.'")  # fmt: skip
