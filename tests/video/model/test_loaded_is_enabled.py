"""A model that is loaded quantized answers like one that was enabled, bit for bit, in every dtype.

For every video transformer of diffusers: quantized while it loads from a 16-bit folder, and loaded
from a folder that was saved quantized. diffusers keeps parts of some classes in float32.
"""

import pytest
import torch
from torch.utils._pytree import tree_map

import diffusers_hook
from diffusers_hook import SemanticDialectConfig
from diffusers_hook.layers.fp8 import Fp8Linear
from diffusers_hook.model.attach import attached
from tests.video.support.video_transformers import tiny_models

PARTLY_IN_FLOAT32 = ("WanTransformer3DModel", "Kandinsky6Transformer3DModel")


def in_dtype(arguments, dtype):
    def cast(x):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tree_map(cast, arguments)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in tiny_models()),
        *((name, torch.float16) for name in PARTLY_IN_FLOAT32),
    ],
)
def test_both_ways_of_loading_equal_enabling(name, dtype, tmp_path):
    case = tiny_models()[name]
    options = {"block_size": case.block_size, "seda": True}
    case.build().save_pretrained(tmp_path / "plain")
    model_class, arguments = type(case.build()), in_dtype(case.arguments(2), dtype)

    def load(folder, **more):
        return model_class.from_pretrained(folder, torch_dtype=dtype, **more).eval()

    enabled = load(tmp_path / "plain")
    before = case.run(enabled, arguments)
    diffusers_hook.enable(enabled, progress=False, **options)
    expected = case.run(enabled, arguments)
    assert expected.isfinite().all()
    assert not torch.equal(expected, before)
    enabled.save_pretrained(tmp_path / "packed")
    online = load(tmp_path / "plain", quantization_config=SemanticDialectConfig(**options))
    packed = load(tmp_path / "packed")
    for loaded in (online, packed):
        assert _dtypes(loaded) == _dtypes(enabled)
        assert torch.equal(case.run(loaded, arguments), expected)


def _dtypes(model):
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def _in_fp8(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, Fp8Linear)]


def test_modulation_in_float32_is_fp8_on_request_only():
    case = tiny_models()["Kandinsky5Transformer3DModel"]
    model = diffusers_hook.enable(case.build(), progress=False)
    assert not _in_fp8(model)
    config = attached(model).config
    assert (config.modulation, config.ignore) == ("16bit", ())
    requested = diffusers_hook.enable(case.build(), progress=False, modulation="fp8")
    assert _in_fp8(requested)


def test_modulation_partly_in_float32():
    """The other layers become FP8, and the saved configuration names those that do not."""
    model = tiny_models()["Kandinsky6Transformer3DModel"].build()
    diffusers_hook.enable(model, progress=False)
    config = attached(model).config
    kept = [name for name in config.ignore if "modulation" in name.split(".")]
    assert config.modulation == "fp8"
    assert kept == list(config.ignore) != []
    found = _in_fp8(model)
    assert found
    assert not any("modulation" in name.split(".") for name in found)
