"""How far videos are from those of the 16-bit model, and whether they follow their prompts."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from .pictures import SCALE, enlarged
from .scenes import Scene, read

__all__ = ["follow_prompts", "frame_change_error", "psnr", "sqnr", "ssim", "vmaf"]

_WINDOW = 7


def psnr(frames: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """dB for each video of [B, F, 3, H, W] in 0..1, against those of the 16-bit model."""
    return [
        float(peak_signal_noise_ratio(r.numpy(), f.numpy(), data_range=1.0))
        for f, r in zip(frames, reference, strict=True)
    ]


def ssim(frames: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Structural similarity of each video, the mean over its frames; windows of 7 x 7 pixels."""
    return [
        sum(
            float(structural_similarity(
                r.numpy(), f.numpy(), data_range=1.0, channel_axis=0, win_size=_WINDOW))
            for f, r in zip(video, wanted, strict=True)
        ) / len(video)
        for video, wanted in zip(frames, reference, strict=True)
    ]  # fmt: skip


def frame_change_error(frames: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Temporal consistency: how differently a video changes from frame to frame.

    The root mean square of the difference between its frame-to-frame changes and those of the
    16-bit model's video, in percent of full scale. Something that flickers scores high, a constant
    shift of colour does not. Ours.
    """
    change = frames.diff(dim=1) - reference.diff(dim=1)
    return [100 * float(video.square().mean().sqrt()) for video in change]


def sqnr(output: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """dB for each sample [B, ...]: the reference's energy over that of the difference."""
    error = (output - reference).flatten(1).double().square().sum(1)
    return (10 * torch.log10(reference.flatten(1).double().square().sum(1) / error)).tolist()


def follow_prompts(frames: torch.Tensor, scenes: Sequence[Scene]) -> list[bool]:
    """Whether each video [F, 3, H, W] shows the colour and the direction of its scene."""
    seen = read(frames.transpose(1, 2) * 2 - 1)
    return [
        found.is_colour_of(scene) and found.is_direction_of(scene)
        for found, scene in zip(seen, scenes, strict=True)
    ]


def vmaf(frames: torch.Tensor, reference: torch.Tensor) -> float | None:
    """VMAF, 0..100, the mean over all frames of videos [B, F, 3, H, W] in 0..1.

    Computed on enlarged videos by ffmpeg's filter; None where ffmpeg was built without it.
    """
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    listed = subprocess.run([ffmpeg, "-filters"], capture_output=True, text=True, check=True)
    if " libvmaf " not in listed.stdout:
        return None
    height, width = (SCALE * size for size in frames.shape[-2:])
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-i")
    with tempfile.TemporaryDirectory() as folder:
        for name, videos in (("ours", frames), ("wanted", reference)):
            (Path(folder) / name).write_bytes(enlarged(videos.flatten(0, 1)).numpy().tobytes())
        graph = (
            "[0]format=yuv420p[a];[1]format=yuv420p[b];"
            "[a][b]libvmaf=log_fmt=json:log_path=vmaf.json"
        )
        command = [ffmpeg, "-v", "error", *raw, "ours", *raw, "wanted", "-lavfi", graph]
        subprocess.run([*command, "-f", "null", "-"], cwd=folder, check=True)
        found = json.loads((Path(folder) / "vmaf.json").read_text(encoding="utf-8"))
    return float(found["pooled_metrics"]["vmaf"]["mean"])
