"""Real pipelines of diffusers around tiny transformers, from embeddings to latents.

Every function returns (pipeline, seed and options of its call -> latents).
"""

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LTX2Pipeline,
    MochiPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from tests.video.support.joint_cases import MOCHI
from tests.video.support.ltx_cases import CASES as LTX_CASES
from tests.video.support.separate_cases import LATTE_CONFIG
from tests.video.support.tiny_parts import made, noise
from tests.video.support.tiny_video import TEXT_WIDTH, wan_pipeline


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _embedded(tokens=7, width=32, masks=False):
    """Arguments of a pipeline in the place of the two prompts."""
    given = {"prompt": None, "negative_prompt": None}
    for seed, name in enumerate(("prompt", "negative_prompt")):
        given[f"{name}_embeds"] = noise(1, tokens, width, seed=seed)
        if masks:
            given[f"{name}_attention_mask"] = torch.ones(1, tokens, dtype=torch.int64)
    return given


def _latents(pipe, seed, **options):
    seeded = torch.Generator().manual_seed(seed)
    return pipe(generator=seeded, output_type="latent", return_dict=False, **options)[0]


def latte():
    """Batched guidance, and no names for the branches."""
    pipe = LattePipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=made("LatteTransformer3DModel", **LATTE_CONFIG, out_channels=8)(),
        scheduler=DDIMScheduler(),
    )
    size = {"video_length": 3, "height": 64, "width": 32, "num_inference_steps": 4}

    def generate(seed=0, **options):
        return _latents(pipe, seed, **{**_embedded(), **size, **options})

    return _quiet(pipe), generate


def ltx2():
    """Its default guidance: two samples, then one without attention, then one without audio."""
    torch.manual_seed(0)
    attention = {
        f"{stream}_connector_{name}": value
        for stream in ("video", "audio")
        for name, value in (
            ("num_attention_heads", 2),
            ("attention_head_dim", 16),
            ("num_layers", 1),
            ("num_learnable_registers", None),
        )
    }
    pipe = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTX2Video(
            latent_channels=8, patch_size=8, downsample_type=("spatial",),
            block_out_channels=(8,), layers_per_block=(1,), spatio_temporal_scaling=(True,),
            decoder_block_out_channels=(8,), decoder_layers_per_block=(1, 1),
            decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
            upsample_residual=(False,), upsample_factor=(1,),
        ),
        audio_vae=AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8,
            resolution=32,
        ),
        text_encoder=None,
        tokenizer=None,
        connectors=LTX2TextConnectors(caption_channels=32, text_proj_in_factor=1, **attention),
        transformer=next(case for case in LTX_CASES if case.name == "LTX-2").build(),
        vocoder=None,
    )  # fmt: skip
    size = {"num_frames": 5, "height": 64, "width": 32, "num_inference_steps": 4}

    def generate(seed=0, **options):
        own = {"spatio_temporal_guidance_blocks": [1]}
        return _latents(pipe, seed, **{**_embedded(masks=True), **own, **size, **options})

    return _quiet(pipe), generate


def mochi():
    """Its timestep rises."""
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=MOCHI.build(),
    )
    size = {"num_frames": 13, "height": 64, "width": 32, "num_inference_steps": 4}

    def generate(seed=0, **options):
        return _latents(pipe, seed, **{**_embedded(masks=True), **size, **options})

    return _quiet(pipe), generate


def skyreels():
    """Diffusion forcing: every frame has a noise level of its own."""
    base = wan_pipeline()
    pipe = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        transformer=made(
            "SkyReelsV2Transformer3DModel",
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=128,
            num_layers=2,
            rope_max_seq_len=64,
            inject_sample_info=True,
        )(),
        vae=base.vae,
        scheduler=UniPCMultistepScheduler(
            flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    )
    size = {"num_frames": 17, "height": 16, "width": 16, "num_inference_steps": 8, "fps": 24}

    def generate(seed=0, **options):
        return _latents(pipe, seed, **{**_embedded(), "guidance_scale": 3.0, **size, **options})

    return _quiet(pipe), generate
