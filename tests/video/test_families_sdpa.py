"""Families whose processors call torch's attention, and Open-Sora, are supported in full."""

import pytest
from family_checks import CHECKS
from sdpa_cases import CASES


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_full_support(case, check):
    check(case)
