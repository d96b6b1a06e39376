"""CogVideoX, Mochi, EasyAnimate, Latte, Allegro, Cosmos and Kandinsky are supported in full."""

import joint_cases
import kandinsky_cases
import pytest
import separate_cases
from family_checks import CHECKS

CASES = (*joint_cases.CASES, *separate_cases.CASES, *kandinsky_cases.CASES)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_full_support(case, check):
    check(case)
