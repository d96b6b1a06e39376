"""The card of a packed checkpoint, word for word."""

from dialect_kernels import __version__
from dialect_plugin.checkpoint.convert import convert
from tests.support.conversions import options_of

EXPECTED = f"""\
---
library_name: vllm
tags: [blockdialect, 4-bit]
---

# LlamaForCausalLM, packed with BlockDialect

2 layers (53,248 weights) are stored in the format `semantic_32` at 4.538 bits per weight; \
everything else is as in the source.

| | |
|---|---|
| architecture | LlamaForCausalLM |
| format | `blockdialect` version 1, book `semantic_32` |
| block size | 32, 2 layers differ |
| activations | W4A8 by default |
| selection of dialects | exact squared error |
| SQNR of all quantized weights | SQNR dB |
| written by | blockdialect {__version__} |

## Serving

With vLLM and `blockdialect` installed:

```
vllm serve DIRECTORY                                     # activations as in the table
vllm serve DIRECTORY --quantization blockdialect_w4a8    # FP8 activations
vllm serve DIRECTORY --quantization blockdialect_w4a16   # 16-bit activations
```

## Layers

| layer | shape | block | SQNR, dB |
|---|---|---:|---:|
| model.layers.0.mlp.down_proj | 128 x 208 | 16 | SQNR |
| model.layers.1.mlp.down_proj | 128 x 208 | 16 | SQNR |

The block size does not divide the columns of these layers, which have another one: \
model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj.
"""


def test_the_card(tiny_model, tmp_path):
    source = tiny_model(intermediate_size=208)
    options = options_of(targets=["re:.*down_proj"], activation_format="fp8")
    result = convert(source, tmp_path / "packed", options)
    card = (tmp_path / "packed" / "README.md").read_text(encoding="utf-8")
    for layer in result.layers:
        sqnr = f"{layer.sqnr_db:.2f}"
        assert card.count(f"| {layer.name} | 128 x 208 | 16 | {sqnr} |") == 1
        card = card.replace(f"16 | {sqnr} |", "16 | SQNR |")
    start = card.index("weights | ") + len("weights | ")
    total = card[start : card.index(" dB", start)]
    assert 15 < float(total) < 30
    assert card.replace(f"{total} dB", "SQNR dB", 1) == EXPECTED
