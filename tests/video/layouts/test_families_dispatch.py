"""Families whose attention goes through diffusers' dispatcher are supported in full."""

import pytest

from tests.video.support.family_checks import CHECKS, check_scores
from tests.video.support.hunyuan_cases import CASES as HUNYUAN_CASES
from tests.video.support.ltx_cases import CASES as LTX_CASES
from tests.video.support.wan_cases import CASES as WAN_CASES
from tests.video.support.wan_cases import wan_case

CASES = (*WAN_CASES, *HUNYUAN_CASES, *LTX_CASES)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_full_support(case, check):
    check(case)


def test_scores_where_queries_are_sampled():
    """From 128 queries on, every second is looked at."""
    check_scores(wan_case("Wan, 128 tokens", grid=(4, 8, 4)))
