"""What vLLM's multimodal models call their towers and connectors: the converter's rule knows it.

Their names are read from the source: importing the models needs packages that a server may lack.
"""

import ast
from pathlib import Path

import vllm.model_executor.models

from dialect_plugin.architectures import candidate_layers

MODELS = Path(vllm.model_executor.models.__file__).parent
TEXT = "language_model.model.layers.0.mlp.up_proj"


def strings(node):
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and n.value]


def towers():
    """(file, name) of every `tower_model` and `connector` of a `get_mm_mapping`."""
    for path in sorted(MODELS.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for call in ast.walk(ast.parse(text)) if "from_string_field" in text else ():
            if getattr(getattr(call, "func", None), "attr", None) == "from_string_field":
                for keyword in call.keywords:
                    if keyword.arg in ("tower_model", "connector"):
                        yield from ((path.name, name) for name in strings(keyword.value))


def test_no_tower_holds_candidates():
    found = list(towers())
    assert len(found) > 100
    wrong = set()
    for file, name in found:
        inside = [
            f"{name.rstrip('.')}.{rest}" for rest in ("layers.0.mlp.fc1", "blocks.3.attn.qkv")
        ]
        if candidate_layers([TEXT, *inside]) != [TEXT]:
            wrong.add((file, name))
    assert not wrong
