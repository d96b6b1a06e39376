"""The check of a vLLM version sees every kind of thing that the plugin can miss there."""

from __future__ import annotations

import zipfile

import pytest

from tests.support.scripts import load_script

check = load_script("check_vllm_api")

PACKAGE = {
    "__init__.py": "",
    "layers/__init__.py": "from .linear import Layer as Layer, tune as tune",
    "layers/linear.py": """
from abc import ABC, abstractmethod

SIZES = (1, 2)

class Base(ABC):
    @abstractmethod
    def apply(self, layer, x, bias=None): ...

class Layer(Base):
    def __init__(self, size, *, dtype=None): ...

    def load(self, name, *, strict=False): ...

    @abstractmethod
    def create(self, rows): ...

def tune(layer, *sizes, seed): ...

def register(name, **options): ...
""",
}
FITS = """
from engine.layers import Layer, tune
from engine.layers import linear as module
from engine.layers.linear import SIZES, register

class Mine(Layer):
    def apply(self, layer, x, bias=None): ...
    def load(self, name, **options): ...
    def create(self, rows): ...

made = Layer(4, dtype=None)
tune(made, 1, 2, 3, seed=0)
module.register("a", anything=1)
try:
    from engine.layers import Later
except ImportError:
    Later = None
"""


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    root = tmp_path_factory.mktemp("api")
    with zipfile.ZipFile(root / "engine.whl", "w") as wheel:
        for name, text in PACKAGE.items():
            wheel.writestr(f"engine/{name}", text)
        wheel.extractall(root)
    return check.Api(root, "engine")


def found(api, directory, text):
    (directory / "plugin.py").write_text(text, encoding="utf-8")
    sources = check.read_sources(directory, "engine")
    return [fault for source in sources for fault in check.faults(source, api)]


def test_a_plugin_that_fits_has_no_faults(api, tmp_path):
    assert found(api, tmp_path, FITS) == []


@pytest.mark.parametrize(
    ("fits", "changed", "fault"),
    [
        ("SIZES, register", "SIZE, register", "engine.layers.linear.SIZE does not exist"),
        ("import Layer, tune", "import Layer, gone, tune", "engine.layers.gone does not exist"),
        ("module.register", "module.enrol", "engine.layers.linear.enrol does not exist"),
        ("dtype=None)", "device=None)", "engine.layers.linear.Layer has no parameter 'device'"),
        ("Layer(4,", "Layer(4, 5,", "engine.layers.linear.Layer takes 1 arguments by place"),
        ("tune(made, 1, 2, 3, seed=0)", "tune(made)", "engine.layers.linear.tune needs 'seed'"),
        (
            "def load(self, name, **options)",
            "def load(self, name)",
            "Mine.load does not take 'strict' of engine.layers.linear.Layer.load",
        ),
        (
            "apply(self, layer, x, bias=None)",
            "apply(self, layer, x)",
            "Mine.apply does not take 'bias' of engine.layers.linear.Base.apply",
        ),
        (
            "    def create(self, rows): ...\n",
            "",
            "Mine lacks engine.layers.linear.Layer.create",
        ),
    ],
)
def test_what_is_missing_is_told(api, tmp_path, fits, changed, fault):
    assert FITS.count(fits) == 1
    (sentence,) = found(api, tmp_path, FITS.replace(fits, changed))
    assert sentence.endswith(fault)
    assert sentence.startswith(f"{tmp_path.name}/plugin.py:")


def test_all_of_the_plugin_is_read():
    names = {name for source in check.read_sources(check.PLUGIN, "vllm") for name in source.lines}
    assert "vllm.model_executor.layers.linear.LinearMethodBase" in names
    assert "vllm.config.get_current_vllm_config_or_none" in names  # imported inside a function
