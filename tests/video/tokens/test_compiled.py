"""torch.compile of repeated blocks: one graph, no break, no recompilation, the same numbers."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import diffusers_hook
from diffusers_hook.layers.quantized import QuantizedLinear
from diffusers_hook.model.attach import attached
from diffusers_hook.tokens import ops
from tests.video.support.tiny_video import generate, run, wan, wan_pipeline

# random: the choice does not hang on the last bit of a score, which compilers change
OPTIONS = {
    "seda": True,
    "progress": False,
    "salient_refresh": 2,
    "seda_refresh": 3,
    "selection": "random",
    "protected_steps": [2, 5],
}


def generation(model, steps):
    """Both branches of every step; the salient tokens change with the inputs."""
    return [
        run(model, context=branch, timestep=900 - step, seed=10 * step + len(branch))
        for step in range(steps)
        for branch in ("cond", "uncond")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_blocks_compile_once_and_give_the_same_video(backend):
    torch._dynamo.reset()
    counters.clear()
    with fresh_cache():
        _compiles_once(backend)


def _compiles_once(backend):
    model = wan(layers=3)
    diffusers_hook.enable(model, **OPTIONS)
    expected = generation(model, 7)
    sets = attached(model).state.blocks[0].branches["cond"].salient
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = generation(model, 7)
    assert counters["stats"]["unique_graphs"] == 1  # three blocks share it
    assert not counters["graph_break"]
    assert diffusers_hook.summary(model).transformers[0].salient_refreshes == 2 * 2 * 4 * 3
    assert torch.equal(attached(model).state.blocks[0].branches["cond"].salient, sets)
    # a layer moved across its block's attention would see other salient tokens: an error of 0.01
    limit = 0 if backend == "aot_eager" else 1e-3
    for a, b in zip(compiled, expected, strict=True):
        assert (a - b).norm() <= limit * b.norm()


@pytest.mark.parametrize("first", ["enable", "compile"])
def test_a_compiled_transformer_is_enabled_and_disabled(first):
    """`pipe.transformer = torch.compile(pipe.transformer)` puts another module around it."""
    torch._dynamo.reset()
    pipe = wan_pipeline()
    inner, before = pipe.transformer, generate(pipe)

    def compiled():
        pipe.transformer = torch.compile(inner, backend="eager")

    if first == "compile":
        compiled()
    pipe.enable_semantic_dialect(progress=False)
    if first == "enable":
        compiled()
    assert [found.model for found in pipe.semantic_dialect_summary().transformers] == [
        "WanTransformer3DModel"
    ]
    quantized = generate(pipe)
    assert quantized.isfinite().all()
    assert not torch.equal(quantized, before)
    pipe.disable_semantic_dialect()
    assert not any(isinstance(part, QuantizedLinear) for part in inner.modules())
    assert torch.equal(generate(pipe), before)


def test_the_ops_have_the_schemas_that_compiled_models_rely_on():
    """Names, order and types of the arguments, and which one is written."""
    assert str(ops.linear.default._schema) == (
        "semantic_dialect::linear(Tensor x, Tensor codes, Tensor meta, Tensor row_exponent, "
        "Tensor? bias, Tensor(a5!) slot, SymInt in_features, str book, SymInt block_size, "
        'str activation_format, str stream, str rotation="none") -> Tensor'
    )
    assert str(ops.linears.default._schema) == (
        "semantic_dialect::linears(Tensor x, Tensor[] codes, Tensor[] meta, Tensor[] row_exponent, "
        "Tensor[] bias, Tensor(a5!) slot, SymInt in_features, str book, SymInt block_size, "
        'str activation_format, str stream, str rotation="none") -> Tensor[]'
    )
    assert str(ops.observe.default._schema) == (
        "semantic_dialect::observe(Tensor query, Tensor key, Tensor? mask, Tensor(a3!) slot, "
        "float? scale) -> ()"
    )


def test_the_ops_pass_opcheck():
    model = wan(layers=1)
    diffusers_hook.enable(model, **OPTIONS)
    layer = model.blocks[0].attn1.to_q
    x = torch.randn(2, 5, 64)
    arguments = (
        x, layer.weight_packed, layer.weight_meta, layer.weight_row_exponent, layer.bias,
        torch.tensor([-1, 0]), 64, "semantic_32", 32, "dialect", "video",
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.linear, arguments, test_utils=tests)
    query = torch.randn(1, 2, 5, 16)
    torch.library.opcheck(
        ops.observe,
        (query, query.clone(), None, torch.tensor([-1, 0]), None),
        test_utils=("test_schema", "test_faketensor"),
    )
