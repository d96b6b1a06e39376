"""A tiny model of every video transformer class of diffusers."""

import functools

import hunyuan_cases
import joint_cases
import kandinsky_cases
import ltx_cases
import separate_cases
import unscored_cases
import wan_cases

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
