"""Open-Sora 2.0's MMDiT, by a stand-in: supported in full through a layout."""

import pytest
import torch

import diffusers_hook
from benchmarks.video.open_sora_stand_in import MMDiTModel
from diffusers_hook import LayoutError
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.layers.fp8 import Fp8Linear
from diffusers_hook.model.attach import attached
from tests.video.support.family_checks import (
    CHECKS,
    JOINT,
    TEXT,
    VIDEO,
    Case,
    spread,
    touch_argument,
)

GRID = (3, 4, 2)
TEXT_TOKENS = 7


def made(**options):
    def build():
        torch.manual_seed(0)
        return MMDiTModel(**options).eval()

    return build


def places(grid, batch=1, dtype=torch.float32):
    """(frame, row, column) of every token, [batch, tokens, 3]."""
    return torch.cartesian_prod(*map(torch.arange, grid)).to(dtype).expand(batch, -1, -1)


def arguments(batch, grid=GRID, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    ids = places(grid, batch, dtype)
    return {
        "img": noise(batch, ids.shape[1], 16),
        "img_ids": ids,
        "txt": noise(batch, TEXT_TOKENS, 32),
        "txt_ids": torch.zeros(batch, TEXT_TOKENS, 3),
        "timesteps": torch.full((batch,), 0.9),
        "y_vec": noise(batch, 16),
    }


def touch_token(given, token):
    """Change the token at that place, wherever it is."""
    here = (given["img_ids"][0] == torch.tensor(token)).all(dim=1)
    assert here.sum() == 1
    img = given["img"].clone()
    img[:, here] = -2 * img[:, here] - 1
    return {**given, "img": img}


def double_block(*projections):
    return {
        **{f"img_attn.{name}": VIDEO for name in projections},
        **{f"txt_attn.{name}": TEXT for name in projections},
        "img_mlp.0": VIDEO,
        "img_mlp.2": VIDEO,
        "txt_mlp.0": TEXT,
        "txt_mlp.2": TEXT,
    }


def case(name, double, single, **options):
    return Case(
        name=name,
        build=made(**options),
        arguments=arguments,
        streams={
            **spread("double_blocks", 2, double_block(*double, "proj")),
            **spread("single_blocks", 2, dict.fromkeys((*single, "linear2"), JOINT)),
        },
        kept=(
            "img_in",
            "txt_in",
            *(f"{n}.{part}_layer" for n in ("time_in", "vector_in") for part in ("in", "out")),
            "final_layer.linear",
        ),
        modulation=MODULATION,
        attentions=tuple(f"{kind}_blocks.{i}" for kind in ("double", "single") for i in range(2)),
        grid=GRID,
        touch_video=touch_token,
        touch_text=touch_argument("txt"),
        output=lambda answer: answer,
        timestep="timesteps",
    )


MODULATION = (
    *(f"double_blocks.{i}.{stream}_mod.lin" for i in range(2) for stream in ("img", "txt")),
    *(f"single_blocks.{i}.modulation.lin" for i in range(2)),
    "final_layer.adaLN_modulation.1",
)
CASES = (
    case("unfused", ("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj", "v_mlp")),
    case("fused", ("qkv",), ("linear1",), fused_qkv=True),
)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_full_support(case, check):
    check(case)


@pytest.mark.parametrize("layout", [None, "open_sora"])
@torch.no_grad()
def test_defaults_quantize_everything_that_is_large(layout):
    """More than 5 % of the parameters are modulation: it becomes FP8."""
    model = CASES[0].build()
    before = model(**arguments(2))
    assert diffusers_hook.enable(model, layout=layout, progress=False, seda=True) is model
    kinds = {n: type(m) for n, m in model.named_modules() if type(m) in (DialectLinear, Fp8Linear)}
    assert kinds == {
        **dict.fromkeys(CASES[0].streams, DialectLinear),
        **dict.fromkeys(MODULATION, Fp8Linear),
    }
    later = {**arguments(2), "timesteps": torch.full((2,), 0.5)}
    after = [model(**arguments(2)), model(**later)]
    assert all(output.isfinite().all() for output in after)
    assert not torch.equal(after[0], before)
    counts = attached(model).state.meter.counts
    assert counts["salient refreshes"] == 4
    assert counts["group refreshes"] == 4
    diffusers_hook.disable(model)
    assert torch.equal(model(**arguments(2)), before)


@pytest.mark.parametrize("grid", [(1, 4, 2), (5, 1, 1), (2, 3, 1), (1, 1, 300)])
@torch.no_grad()
def test_the_grid_is_read_from_the_ids(grid):
    """In bfloat16 too, which cannot count to 300."""
    model = CASES[0].build()
    diffusers_hook.enable(model, progress=False)
    seen = []
    model.double_blocks[0].register_forward_pre_hook(
        lambda module, args: seen.append(attached(model).state.generation.grid)
    )
    model(**arguments(2, grid, dtype=torch.bfloat16))
    assert (seen[0].batch, seen[0].shape) == (2, grid)


@pytest.mark.parametrize(
    "order", [torch.randperm(24, generator=torch.Generator().manual_seed(0)), torch.arange(23)]
)
def test_ids_in_another_order_are_refused(order):
    given = arguments(1)
    given["img"], given["img_ids"] = given["img"][:, order], given["img_ids"][:, order]
    model = CASES[0].build()
    diffusers_hook.enable(model, progress=False)
    with pytest.raises(LayoutError, match=r"img_ids: the .* tokens do not follow each other"):
        model(**given)
