"""A tiny model of every video transformer class of diffusers."""

import functools

from tests.video.support import (
    hunyuan_cases,
    joint_cases,
    kandinsky_cases,
    ltx_cases,
    separate_cases,
    unscored_cases,
    wan_cases,
)

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


@functools.cache
def tiny_models():
    """Class name -> the first case that builds it."""
    found = {}
    for case in (*FULL, *UNSCORED):
        found.setdefault(type(case.build()).__name__, case)
    return found
