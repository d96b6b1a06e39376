"""`make video`: its figures, its files, and the formats that it compares."""

from __future__ import annotations

import io
import math

import imageio_ffmpeg
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from demo.rounded import RoundedLinear
from demo.video import run as demonstration
from demo.video.formats import FP8, MXFP4, NVFP4, PLAIN, Format, load, transformer_bytes
from demo.video.metrics import frame_change_error, psnr, sqnr, ssim, vmaf
from demo.video.scenes import SIZE
from dialect_kernels.baselines import quantize_mxfp4
from diffusers_hook.layers.dialect import DialectLinear

PROMPT = "a red circle moves up-left, fast"
BLOCK_LINEARS = 10  # of a Wan block: two attentions of four, two of the feed-forward layer
BLOCKS = 6


@pytest.fixture
def videos() -> torch.Tensor:
    return torch.rand(2, 8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("videos")
    console = Console(file=io.StringIO(), width=100)
    rows = demonstration.run([PROMPT, "a blue square moves down, slowly"], 0, 3, out, console)
    return out, rows, console.file.getvalue()


def test_every_format_leaves_its_videos(finished) -> None:
    out, rows, said = finished
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    names = ("a-blue-square-moves-down-slowly.mp4", "a-red-circle-moves-up-left-fast.mp4")
    folders = ("16-bit", "mxfp4", "semanticdialect")
    wanted = [f"{folder}/{name}" for folder in folders for name in names]
    assert files == sorted([*wanted, "comparison.gif", "comparison.png"])
    assert "3/3 SemanticDialect" in said
    assert "decomposed rows" in said
    assert [row.name for row in rows] == ["16 bit", "MXFP4", "SemanticDialect"]


def test_a_written_video_shows_the_frames(finished) -> None:
    out, rows, _ = finished
    path = out / "16-bit" / "a-red-circle-moves-up-left-fast.mp4"
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    assert meta["size"] == (8 * SIZE, 8 * SIZE)
    shown = [torch.frombuffer(bytearray(frame), dtype=torch.uint8) for frame in reader]
    assert len(shown) == 3 * 8
    first = shown[0].view(8 * SIZE, 8 * SIZE, 3)[4::8, 4::8].float() / 255
    assert (first - rows[0].frames[0, 0].permute(1, 2, 0)).abs().mean() < 0.03
    gif = Image.open(out / "comparison.gif")
    assert gif.n_frames == 8
    assert gif.size == (2 * 4 * (SIZE + 1), 3 * 4 * (SIZE + 1))


def test_the_formats_differ_and_are_compared_with_16_bit(finished) -> None:
    _, (plain, mxfp4, ours), _ = finished
    assert plain.psnr is None
    assert mxfp4.seconds is None  # an emulation's time says nothing
    for row in (mxfp4, ours):
        assert row.psnr == pytest.approx(sum(psnr(row.frames, plain.frames)) / 2)
        assert 10 < row.psnr < 60
        assert row.bytes < 0.36 * plain.bytes
    assert not torch.equal(mxfp4.frames, ours.frames)


def test_a_bad_prompt_is_refused_before_anything_is_written(tmp_path) -> None:
    arguments = ["--prompt", PROMPT, "--prompt", "a fox in snow", "--out", str(tmp_path / "out")]
    app = demonstration.typer.Typer()
    app.command()(demonstration.main)
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert "names no colour" in " ".join(found.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("emulated", [FP8, MXFP4, NVFP4], ids=["fp8", "mxfp4", "nvfp4"])
def test_an_emulation_replaces_the_very_layers_that_dialects_would(emulated) -> None:
    def layers(pipe, kind):
        return {n for n, layer in pipe.transformer.named_modules() if isinstance(layer, kind)}

    replaced = layers(load(Format(PLAIN, emulated)), RoundedLinear)
    assert replaced == layers(load(Format(PLAIN)), DialectLinear)
    assert len(replaced) == BLOCKS * BLOCK_LINEARS


def test_an_emulated_layer_multiplies_rounded_operands() -> None:
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    name = "blocks.3.attn1.to_q"
    plain = load(Format(None)).transformer.get_submodule(name)
    weight = quantize_mxfp4(plain.weight.detach())
    for activation, operand in (("dialect", quantize_mxfp4(x)), ("none", x.float())):
        format = Format({**PLAIN, "activation_format": activation}, MXFP4)
        y = load(format).transformer.get_submodule(name)(x)
        assert torch.equal(y, (operand @ weight.T + plain.bias.detach().float()).bfloat16())


def test_bytes_are_those_of_the_stored_format() -> None:
    plain, four = Format(None), Format(PLAIN, MXFP4)
    pipe = load(plain)
    linears = [
        pipe.transformer.get_submodule(name)
        for name, layer in load(four).transformer.named_modules()
        if isinstance(layer, RoundedLinear)
    ]
    modulation = pipe.transformer.condition_embedder.time_proj
    elements = sum(layer.weight.numel() for layer in linears)
    saved = elements * (2 - 4.25 / 8) + modulation.weight.numel() - 4 * modulation.out_features
    expected = transformer_bytes(pipe, plain) - saved
    assert transformer_bytes(load(four), four) == pytest.approx(expected, abs=1)


def test_equal_videos_have_no_error(videos) -> None:
    assert psnr(videos, videos) == [math.inf] * 2
    assert ssim(videos, videos) == pytest.approx([1.0] * 2)
    assert frame_change_error(videos, videos) == [0.0] * 2
    score = vmaf(videos, videos)
    assert score is None or score > 90


def test_known_errors(videos) -> None:
    shifted = videos + 0.1
    assert psnr(shifted, videos) == pytest.approx([20.0] * 2, abs=1e-4)
    assert frame_change_error(shifted, videos) == pytest.approx([0.0] * 2, abs=1e-4)
    flickering = videos.clone()
    flickering[:, ::2] += 0.1
    assert frame_change_error(flickering, videos) == pytest.approx([10.0] * 2, abs=1e-3)
    assert ssim(flickering, videos)[0] < 1
    assert sqnr(1.1 * videos, videos) == pytest.approx([20.0] * 2, abs=1e-4)
    worse = vmaf(videos.flip(1), videos)
    assert worse is None or worse < 80
