"""Models without a softmax to score tokens by are quantized without it, after one warning."""

import logging

import pytest

import diffusers_hook
from diffusers_hook import LayoutError
from diffusers_hook.model.attach import attached
from tests.video.support.family_checks import check_names, check_restored
from tests.video.support.unscored_cases import CASES


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("check", [check_names, check_restored], ids=lambda c: c.__name__)
def test_quantized_and_restored(case, check):
    check(case)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_one_warning_says_why(case, caplog):
    model = case.build()
    with caplog.at_level(logging.WARNING, logger="diffusers_hook"):
        diffusers_hook.enable(model, **case.options)
        case.run(model)
    [message] = [text for text in caplog.messages if "without salient tokens" in text]
    assert type(model).__name__ in message
    assert "without salient tokens and groups: " in message
    assert len(message.split("groups: ")[1]) > 20  # the reason
    state = attached(model).state
    assert not state.config.decomposes
    assert not state.config.groups
    assert state.meter.counts["decomposed rows"] == 0


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_refused_where_that_is_asked_for(case):
    model = case.build()
    before = case.run(model)
    with pytest.raises(LayoutError, match="has no attention from which salient tokens could be"):
        diffusers_hook.enable(model, strict=True, progress=False)
    assert attached(model) is None
    assert case.run(model).equal(before)
