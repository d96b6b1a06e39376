"""Other tools that exchange linear layers or wrap `forward`, over an enabled model."""

import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import ModelHook as DiffusersHook
from torch import nn

import diffusers_hook
from tests.video.support.tiny_video import generate, run, wan, wan_pipeline

MODEL = "WanTransformer3DModel"


def quantize_as_torchao_does(model):
    """torchao's `quantize_`, without torchao: down the tree, a new weight for each layer."""
    for child in list(model.named_children()):
        quantize_as_torchao_does(child[1])
    if isinstance(model, nn.Linear):
        model.weight = nn.Parameter(model.weight.detach() * 2, requires_grad=False)


def quantize_as_quanto_does(model):
    """quanto's `quantize`, without quanto: along the list of modules, a new layer for each."""
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            parent, _, own = name.rpartition(".")
            new = nn.Linear(part.in_features, part.out_features)
            new.weight = part.weight
            setattr(model.get_submodule(parent), own, new)


def of_module(function, name):
    """The function as if that module had defined it."""
    space = {**globals(), "__name__": name}
    moved = types.FunctionType(function.__code__, space)
    space[function.__name__] = moved
    return moved


def real_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def real_quanto(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)


TOOLS = {
    "torchao": of_module(quantize_as_torchao_does, "torchao.quantization.quant_api"),
    "optimum.quanto": of_module(quantize_as_quanto_does, "optimum.quanto.quantize"),
    "torchao itself": real_torchao,
    "optimum.quanto itself": real_quanto,
}


def tensors(model):
    return {name: (id(tensor), tensor._version) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("tool", TOOLS)
def test_other_quantizers_are_refused_before_anything_changes(tool):
    model = wan()
    diffusers_hook.enable(model, progress=False)
    before, held = run(model), tensors(model)
    name = tool.removesuffix(" itself")
    with pytest.raises(RuntimeError) as caught:
        TOOLS[tool](model)
    assert str(caught.value) == (
        f"{MODEL}: {name} cannot quantize its linear layers, which SemanticDialect has quantized; "
        "call disable_semantic_dialect() first, or quantize other components"
    )
    assert tensors(model) == held
    assert torch.equal(run(model), before)
    diffusers_hook.disable(model)
    assert "named_modules" not in vars(model)
    TOOLS[tool](model)


@pytest.mark.parametrize("tool", ["torchao", "torchao itself"])
def test_a_single_block_is_refused_at_its_first_layer(tool):
    model = wan()
    diffusers_hook.enable(model, progress=False)
    before = run(model)
    with pytest.raises(RuntimeError, match="the weight of a quantized layer cannot be replaced; c"):
        TOOLS[tool](model.blocks[0])
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("tool", TOOLS)
def test_other_components_are_theirs(tool):
    pipe = wan_pipeline()
    pipe.enable_semantic_dialect(progress=False)
    before = generate(pipe)
    TOOLS[tool](pipe.text_encoder)
    after = generate(pipe)
    assert after.isfinite().all()
    assert not torch.equal(after, before)


class Counting(ModelHook):
    """A hook of accelerate's."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def by_accelerate(model):
    hook = Counting()
    add_hook_to_module(model, hook, append=True)
    return lambda: hook.calls, lambda: remove_hook_from_module(model)


def by_method(model):
    """As cache-dit and others do: they take the method out of `forward` and put one into it."""
    calls, inner = [], model.forward
    function = inner.__func__  # a functools.partial has none

    def forward(self, *args, **kwargs):
        calls.append(1)
        return function(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)

    def unwrap():
        if inner == types.MethodType(type(model).forward, model):
            del model.forward
        else:
            model.forward = inner

    return lambda: len(calls), unwrap


def by_diffusers(model):
    calls = []

    class Hook(DiffusersHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(Hook(), "counting")
    return lambda: len(calls), lambda: registry.remove_hook("counting", recurse=False)


def by_class(model):
    """A forward that the class gets while the model is enabled."""
    calls, original = [], WanTransformer3DModel.forward

    def forward(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs)

    WanTransformer3DModel.forward = forward
    return lambda: len(calls), lambda: setattr(WanTransformer3DModel, "forward", original)


WRAPPERS = {
    "accelerate": by_accelerate,
    "method": by_method,
    "diffusers": by_diffusers,
    "class": by_class,
}


def test_forward_stays_the_method_that_it_was():
    model = wan()
    diffusers_hook.enable(model, progress=False)
    assert model.forward == types.MethodType(WanTransformer3DModel.forward, model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("last", ["unwrap", "disable"])
@pytest.mark.parametrize("first", ["wrap", "enable"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_forward_is_wrapped_and_unwrapped_in_any_order(wrapper, first, last):
    model = wan()
    before = run(model, context="cond")
    if first == "enable":
        diffusers_hook.enable(model, progress=False, seda=True)
    calls, unwrap = WRAPPERS[wrapper](model)
    if first == "wrap":
        diffusers_hook.enable(model, progress=False, seda=True)
    try:
        quantized = run(model, context="cond")
        assert calls() == 1
        assert not torch.equal(quantized, before)
        if last == "unwrap":
            diffusers_hook.disable(model)
            assert torch.equal(run(model, context="cond"), before)
            assert calls() == 2
    finally:
        unwrap()
    if last == "disable":
        assert torch.equal(run(model, context="cond"), quantized)
        assert calls() == 1
        diffusers_hook.disable(model)
    assert torch.equal(run(model, context="cond"), before)
    assert model.forward.__func__ is WanTransformer3DModel.forward


@pytest.mark.parametrize("first", ["cache", "enable"])
def test_a_cache_of_diffusers_comes_and_goes_around_the_hook(first):
    model = wan()
    before = run(model, context="cond")
    steps = [lambda: model.enable_cache(FirstBlockCacheConfig(threshold=0.0))]
    steps.insert(first == "cache", lambda: diffusers_hook.enable(model, progress=False))
    for step in steps:
        step()
    assert not torch.equal(run(model, context="cond"), before)
    diffusers_hook.disable(model)
    model.disable_cache()
    assert torch.equal(run(model, context="cond"), before)


@pytest.mark.parametrize("last", ["cache", "hook"])
@pytest.mark.parametrize("first", ["cache", "hook"])
def test_cache_dit_around_the_hook(first, last):
    cache_dit = pytest.importorskip("cache_dit")
    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2)
    pipe = wan_pipeline()
    before = generate(pipe, num_inference_steps=6)
    on = {
        "cache": lambda: cache_dit.enable_cache(pipe, cache_config=config),
        "hook": lambda: pipe.enable_semantic_dialect(progress=False),
    }
    off = {
        "cache": lambda: cache_dit.disable_cache(pipe),
        "hook": lambda: pipe.disable_semantic_dialect(),
    }
    for step in sorted(on, key=lambda name: name != first):
        on[step]()
    found = generate(pipe, num_inference_steps=6)
    assert found.isfinite().all()
    assert not torch.equal(found, before)
    for step in sorted(off, key=lambda name: name == last):
        off[step]()
    assert torch.equal(generate(pipe, num_inference_steps=6), before)
