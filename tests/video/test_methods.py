"""Importing diffusers_hook adds three methods and two table entries, and replaces nothing."""

import importlib
import pkgutil
import subprocess
import sys

import pytest


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_only_adds():
    python(
        "import sys\n"
        "import diffusers\n"
        "from diffusers.quantizers import auto\n"
        "from diffusers import models, pipelines\n"
        "pipe = diffusers.DiffusionPipeline\n"
        "before, tables = dict(vars(pipe)), dict(auto.AUTO_QUANTIZER_MAPPING)\n"
        "attend = diffusers.models.attention_dispatch.dispatch_attention_fn\n"
        "import diffusers_hook\n"
        "added = {'enable_semantic_dialect', 'disable_semantic_dialect', "
        "'semantic_dialect_summary'}\n"
        "assert set(vars(pipe)) - set(before) == added\n"
        "assert all(vars(pipe)[name] is value for name, value in before.items())\n"
        "assert set(auto.AUTO_QUANTIZER_MAPPING) - set(tables) == {'semantic_dialect'}\n"
        "assert diffusers.models.attention_dispatch.dispatch_attention_fn is attend\n"
        "assert hasattr(diffusers.WanPipeline, 'enable_semantic_dialect')\n"
        "assert not {'vllm', 'dialect_plugin'} & {name.split('.')[0] for name in sys.modules}\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )


def test_a_name_that_is_taken_is_not_overwritten():
    out = python(
        "import diffusers\n"
        "mine = lambda self: None\n"
        "diffusers.DiffusionPipeline.enable_semantic_dialect = mine\n"
        "try:\n"
        "    import diffusers_hook\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "assert diffusers.DiffusionPipeline.enable_semantic_dialect is mine\n"
    )
    assert "has a method enable_semantic_dialect from __main__ already" in out


def test_no_function_hides_a_module():
    """`diffusers_hook.summary` is a function, and there is no module of that name; and so on."""
    import diffusers_hook

    parts = pkgutil.walk_packages(diffusers_hook.__path__, "diffusers_hook.")
    found = [part.name for part in parts]
    assert "diffusers_hook.layouts.families.wan" in found
    for name in found:
        importlib.import_module(name)
        package, _, leaf = name.rpartition(".")
        assert getattr(sys.modules[package], leaf) is sys.modules[name]


@pytest.mark.parametrize("name", ["Layout", "SemanticDialectConfig", "enable", "summary"])
def test_the_public_names_are_documented(name):
    import diffusers_hook

    assert name in diffusers_hook.__all__
    assert getattr(diffusers_hook, name).__doc__
