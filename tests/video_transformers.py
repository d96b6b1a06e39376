"""A tiny model of every video transformer class of diffusers: the families' and the refused."""

import functools

import hunyuan_cases
import joint_cases
import kandinsky_cases
import ltx_cases
import separate_cases
import torch
import unscored_cases
import wan_cases
from family_checks import Case
from tiny_parts import GRID, TEXT_TOKENS, call, made, noise

FULL = (
    *wan_cases.CASES,
    *hunyuan_cases.CASES,
    *ltx_cases.CASES,
    *joint_cases.CASES,
    *separate_cases.CASES,
    *kandinsky_cases.CASES,
)
"""What the families' tests prove to be supported in full."""

UNSCORED = unscored_cases.CASES
"""What is tested to work without salient tokens and groups."""

JOYIMAGE = {
    "in_channels": 4,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "text_dim": 32,
    "num_layers": 2,
    "rope_dim_list": [8, 12, 12],
}


def patches_of_pictures(batch):
    """A picture to be made and one to be edited, 4 x 2 patches each."""
    pictures = [(1, 4, 2), (1, 4, 2)]
    return {
        "hidden_states": noise(batch, 16, 4, 1, 2, 2),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, TEXT_TOKENS, 32, seed=2),
        "shape_list": [pictures] * batch,
    }


def refused_case(name, model, arguments):
    return Case(
        name=name,
        build=made(model, **JOYIMAGE),
        arguments=arguments,
        streams={},
        kept=(),
        attentions=(),
        grid=GRID,
        touch_video=None,
    )


REFUSED = (
    refused_case("joyimage edit", "JoyImageEditTransformer3DModel", call),
    refused_case("joyimage edit plus", "JoyImageEditPlusTransformer3DModel", patches_of_pictures),
)


@functools.cache
def tiny_models():
    """Class name -> the first case that builds it."""
    found = {}
    for case in (*FULL, *UNSCORED, *REFUSED):
        found.setdefault(type(case.build()).__name__, case)
    return found
