"""CogVideoX, Mochi, EasyAnimate, Latte, Allegro, Cosmos and Kandinsky are supported in full."""

import pytest

from tests.video.support import joint_cases, kandinsky_cases, separate_cases
from tests.video.support.family_checks import CHECKS

CASES = (*joint_cases.CASES, *separate_cases.CASES, *kandinsky_cases.CASES)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_full_support(case, check):
    check(case)
