"""What the tiny models of several families have in common."""

import torch
from torch import nn

from tests.video.support.family_checks import CONTEXT, VIDEO

GRID = (3, 4, 2)
TEXT_TOKENS = 7


def made(name, awake=(), **config):
    """Builds diffusers' class of that name, with the same weights every time.

    `awake`: endings of parameters' names that are zero at first, which would hide the rest.
    """

    def build():
        import diffusers

        torch.manual_seed(0)
        model = getattr(diffusers, name)(**config).eval()
        for path, parameter in model.named_parameters():
            if path.endswith(tuple(awake)):
                nn.init.normal_(parameter, std=0.2)
        return model

    return build


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention_of(name, stream, *linears):
    return {f"{name}.{linear}": stream for linear in linears}


def self_attention(stream, name="attn1"):
    return attention_of(name, stream, "to_q", "to_k", "to_v", "to_out.0")


def cross_attention(name="attn2"):
    return {
        **attention_of(name, VIDEO, "to_q"),
        **attention_of(name, CONTEXT, "to_k", "to_v"),
        **attention_of(name, VIDEO, "to_out.0"),
    }


def feed_forward(stream, name="ff"):
    return {f"{name}.net.0.proj": stream, f"{name}.net.2": stream}


def attentions(*paths, count=2, name="attn1"):
    return tuple(f"{path}.{i}.{name}" for i in range(count) for path in paths)


def call(batch, grid=GRID, text=TEXT_TOKENS, width=32):
    """Arguments that most families have in common: patches of 1 x 2 x 2 pixels."""
    frames, rows, columns = grid
    return {
        "hidden_states": noise(batch, 4, frames, 2 * rows, 2 * columns),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, text, width, seed=2),
    }


def text_mask(batch, tokens):
    """The last sample of several has three tokens less."""
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    if batch > 1:
        mask[-1, -3:] = 0
    return mask
