"""The memory of a calibration: the largest block, its moments and the text, however many blocks."""

import json
import math
import os
import subprocess
import sys

import pytest

from dialect_kernels.second_moments import SecondMoments
from dialect_plugin.checkpoint.reader import open_checkpoint
from tests.support import swept_models
from tests.support.tiny_models import make_tokenizer

pytestmark = pytest.mark.slow

MEASURE = """
import sys
import threading
from dialect_plugin.calibration.calibrator import Calibrator
from dialect_plugin.calibration.options import CalibrationOptions
from dialect_plugin.checkpoint.convert import convert

source, destination, text, samples = sys.argv[1:]
options = CalibrationOptions(calibrate=text, samples=int(samples), sequence_length=256)
finished = threading.Event()
kibibytes = []


def watch():
    while not finished.wait(0.002):
        with open("/proc/self/status") as status:
            kibibytes.extend(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
convert(source, destination, calibration=Calibrator(options))
finished.set()
watcher.join()
print(1024 * max(kibibytes))
"""


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(
        "".join(f"line {n} holds {n * n} and {chr(97 + n % 26)}\n" for n in range(2000))
    )
    return file


def peak_bytes(source, destination, text, samples, few_tokens=False):
    """The most memory that a process held of its own which calibrated a model.

    Pages of files do not count: how much of a library or a shard is mapped is the system's choice.
    """
    command = [sys.executable, "-c", MEASURE, *map(str, (source, destination, text, samples))]
    kept = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc hands back what is freed, at once
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | kept
    )
    record = json.loads((destination / "blockdialect_calibration.json").read_text())
    assert bool(record["rounded_to_nearest"]) == few_tokens
    return int(done.stdout.split()[-1])


def test_the_widest_layer_is_factored_in_the_memory_of_its_moments(tiny_model, text, tmp_path):
    """What interpreter and libraries hold of their own is in the 1 GiB too."""
    width, hidden, samples = 8192, 64, 9
    source = tiny_model(hidden_size=hidden, intermediate_size=width, num_hidden_layers=1)
    block = 4 * (4 * hidden * hidden + 3 * hidden * width)
    moments = 4 * (3 * hidden * hidden + width * width)
    activations = 4 * samples * 256 * hidden
    peak = peak_bytes(source, tmp_path / "packed", text, samples)
    assert peak <= block + moments + activations + 2**30


def test_twelve_more_blocks_take_no_more_memory_than_two(tiny_model, text, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    block = 4 * (2 * 512 * 512 + 2 * 64 * 512 + 3 * 1024 * 512)
    peaks = [
        peak_bytes(tiny_model(**sizes, num_hidden_layers=n), tmp_path / str(n), text, 2)
        for n in (2, 14)
    ]
    assert peaks[1] - peaks[0] < 4 * block


def test_moments_of_many_experts_take_no_more_than_their_weights(text, tmp_path):
    """Moments of all at once would take six times as much; so the block runs several times."""
    width, experts, samples = 2048, 128, 2
    source = swept_models.build(
        "Qwen3MoeForCausalLM",
        tmp_path / "source",
        hidden_size=width,
        num_experts=experts,
        num_experts_per_tok=8,
        num_hidden_layers=1,
        max_position_embeddings=256,
    )
    make_tokenizer(swept_models.VOCABULARY).save_pretrained(source)
    tensors = open_checkpoint(source).tensors
    block = 4 * sum(math.prod(t.shape) for name, t in tensors.items() if ".layers." in name)
    assert experts * SecondMoments.nbytes_of(width) > 6 * block
    moments = 4 * width * width  # of q, k and v
    activations = 4 * samples * 256 * width
    peak = peak_bytes(source, tmp_path / "packed", text, samples, few_tokens=True)
    assert peak <= 2 * block + moments + activations + 2**30
