"""Tiny random video transformers and pipelines, made without any download."""

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "fox", "in", "snow", "blue", "ball")
TEXT_WIDTH = 32
LAYERS = 2


def wan(layers=LAYERS, **options):
    """A Wan transformer [latent channels 4, patches 1 x 2 x 2], about 0.2 M parameters."""
    torch.manual_seed(0)
    sizes = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 32,
        "ffn_dim": 128,
        "num_layers": layers,
        "rope_max_seq_len": 64,
    }
    return WanTransformer3DModel(**{**sizes, **options}).eval()


def wan_inputs(batch=1, frames=5, size=8, timestep=500, dtype=torch.float32, seed=1):
    """Arguments of one call: frames x (size / 2) x (size / 2) video tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, frames, size, size, generator=generator).to(dtype),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": torch.randn(batch, 7, TEXT_WIDTH, generator=generator).to(dtype),
    }


@torch.no_grad()
def run(model, context=None, **options):
    """The model's output for :func:`wan_inputs`."""
    if context is None:
        return model(**wan_inputs(**options)).sample
    with model.cache_context(context):
        return model(**wan_inputs(**options)).sample


def wan_pipeline(two=False):
    """A Wan 2.1 pipeline, or with `two` a Wan 2.2 pipeline with its two transformers."""
    transformers = {"transformer": wan(), "transformer_2": wan() if two else None}
    options = {"boundary_ratio": 0.5} if two else {}
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    text = UMT5Config(
        vocab_size=len(WORDS), d_model=TEXT_WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4
    )
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pipe = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **transformers,
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **options):
    """A video [1, frames, 3, 16, 16] as a tensor."""
    settings = {"num_frames": 9, "height": 16, "width": 16, "num_inference_steps": 3}
    return pipe(
        "a red fox in snow",
        negative_prompt="a blue ball",
        guidance_scale=3.0,
        max_sequence_length=16,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        **{**settings, **options},
    ).frames
