"""The table of video transformers in the docs is complete, and what each row says is true.

What counts as a video transformer of diffusers: a model defined in `diffusers.models.transformers`

* whose class name contains ``Transformer3D``, or
* that a pipeline names whose source also names a ``VideoProcessor``; a pipeline is a file of
  `diffusers.pipelines` or a folder of `diffusers.modular_pipelines`.
"""

import importlib
import inspect
import logging
import math
import pkgutil
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from diffusers.models import transformers
from torch import nn

import diffusers_hook
from diffusers_hook import LayoutError
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.layouts import layout_for
from diffusers_hook.model.attach import attached
from tests.video.support.family_checks import picture
from tests.video.support.video_transformers import FULL, UNSCORED, tiny_models

DOCUMENT = Path(__file__).parents[3] / "docs" / "reference" / "support-video.md"
LEVELS = {"full": FULL, "no saliency": UNSCORED}
ROW = re.compile(r"\| `(\w+)` \| (full|no saliency) \| (\S.*\S) \|")


def rows():
    """(class, level, what or why) of every row that begins with a class."""
    found = []
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            row = ROW.fullmatch(line)
            assert row, f"{DOCUMENT.name}: not a row of class, level and reason: {line}"
            found.append(row.groups())
    return found


def rows_of(level):
    chosen = [(name, text) for name, found, text in rows() if found == level]
    return pytest.mark.parametrize(("name", "text"), chosen, ids=[name for name, _ in chosen])


def models():
    """Names of all models defined in `diffusers.models.transformers`."""
    found = set()
    for part in pkgutil.iter_modules(transformers.__path__, f"{transformers.__name__}."):
        for name, member in vars(importlib.import_module(part.name)).items():
            if inspect.isclass(member) and member.__module__ == part.name:
                found |= {name} if issubclass(member, ModelMixin) else set()
    return found


def pipelines():
    """The sources of every pipeline."""
    root = Path(diffusers.__file__).parent
    for file in (root / "pipelines").rglob("*.py"):
        yield file.read_text(encoding="utf-8")
    for folder in (root / "modular_pipelines").iterdir():
        if folder.is_dir():
            yield "".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))


def video_transformers():
    """Names of the classes that count; see above."""
    known = models()
    found = {name for name in known if "Transformer3D" in name}
    for source in pipelines():
        if "VideoProcessor" in source:
            found |= known & set(re.findall(r"\w+", source))
    return found


def test_every_video_transformer_has_one_row():
    listed = [name for name, _, _ in rows()]
    found = video_transformers()
    assert found, "the rule finds nothing: diffusers has moved its files"
    new, gone = sorted(found - set(listed)), sorted(set(listed) - found)
    assert not new, (
        f"diffusers {diffusers.__version__} has video transformers without a row in "
        f"{DOCUMENT.name}: {new}; add the row, and a tiny model to "
        "tests/video/support/video_transformers.py"
    )
    assert not gone, (
        f"diffusers {diffusers.__version__} has no such video transformers any more: {gone}; "
        f"take their rows out of {DOCUMENT.name}"
    )
    assert listed == sorted(set(listed))


@pytest.mark.parametrize(("name", "level"), [row[:2] for row in rows()], ids=lambda text: text)
def test_level_is_that_of_the_families_tests(name, level):
    assert tiny_models()[name] in LEVELS[level]


@rows_of("full")
def test_full(name, text, caplog):
    """Asked to be strict it is not refused; one call finds salient tokens and groups."""
    case = tiny_models()[name]
    model = case.build()
    assert type(model).__name__ in layout_for(model).models
    with caplog.at_level(logging.WARNING, logger="diffusers_hook"):
        diffusers_hook.enable(model, **case.options, strict=True)
        video = case.run(model, batch=1)
    assert not warnings(caplog)
    assert video.isfinite().all()
    tokens = math.prod(case.grid)
    blocks = [block for block in attached(model).state.blocks if block.kind.attention is not None]
    assert len(blocks) == len(case.attentions)
    for block in blocks:
        [branch] = block.branches.values()
        assert branch.salient.shape == (1, math.ceil(0.1 * tokens))
        assert branch.group.shape == (1, tokens)
        assert (branch.group >= 0).any()
    [seen] = diffusers_hook.summary(model).transformers
    assert seen.salient_share > 0
    assert seen.salient_refreshes == seen.group_refreshes == len(blocks)
    for option in ({"salient_fraction": 0.0}, {"seda": False}):  # both change the video
        other = case.build()
        diffusers_hook.enable(other, **{**case.options, **option})
        assert not torch.equal(case.run(other, batch=1), video)


@rows_of("no saliency")
def test_no_saliency(name, text, caplog):
    """One warning with the row's reason; nothing but linear layers is replaced."""
    case = tiny_models()[name]
    model = case.build()
    kinds, processors = parts(model)
    with caplog.at_level(logging.WARNING, logger="diffusers_hook"):
        diffusers_hook.enable(model, **case.options)
        video = case.run(model, batch=1)
    assert warnings(caplog) == [f"{name}: quantized without salient tokens and groups: {text}"]
    assert video.isfinite().all()
    new_kinds, new_processors = parts(model)
    assert {n for n, kind in new_kinds.items() if kind is DialectLinear} == set(case.streams)
    for path in case.streams:
        assert kinds[path] is nn.Linear
        new_kinds[path] = nn.Linear
    assert new_kinds == kinds
    assert new_processors == processors
    [seen] = diffusers_hook.summary(model).transformers
    assert seen.calls == 1
    assert seen.salient_share == seen.salient_refreshes == seen.group_refreshes == 0


@rows_of("no saliency")
def test_strict_refuses_what_has_no_saliency(name, text):
    """One sentence with the row's reason, and the model is what it was."""
    case = tiny_models()[name]
    model = case.build()
    video, shape = case.run(model, batch=1), picture(model)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(LayoutError) as error:
        diffusers_hook.enable(model, progress=False, strict=True)
    message = str(error.value)
    assert f"({text})" in message
    assert name in message
    assert re.fullmatch(r"(?!.*\. )[^\n]*[^.\n]", message), message
    assert attached(model) is None
    assert picture(model) == shape
    after = model.state_dict()
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in tensors.items())
    assert torch.equal(case.run(model, batch=1), video)


def parts(model):
    """Every module's class, and every processor, by name."""
    modules = dict(model.named_modules())
    processors = {n: m.processor for n, m in modules.items() if hasattr(m, "processor")}
    return {name: type(module) for name, module in modules.items()}, processors


def warnings(caplog):
    """Those of the hook; that little is in 4 bit is true of tiny models only."""
    found = [r.getMessage() for r in caplog.records if r.name.startswith("diffusers_hook")]
    return [text for text in found if "of the parameters are in 4 bit" not in text]
