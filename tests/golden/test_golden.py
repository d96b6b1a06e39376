"""Format version 1 is frozen: the golden files come from the brute force and must always be met."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dialect_kernels import PackedTensor, ops
from dialect_kernels.formatbook import NAN_ROW
from dialect_kernels.verify import (
    Implementation,
    available_backends,
    golden_vectors,
    verify,
    verify_one,
)
from dialect_plugin.checkpoint.reader import open_packed
from tests.golden import make_rotation_golden
from tests.support.scripts import load_script

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint_v1"


@pytest.fixture(scope="module")
def make_golden():
    return load_script("make_golden", HERE)


def test_vectors_are_what_the_brute_force_says(make_golden):
    assert make_golden.VECTORS.read_text(encoding="utf-8") == make_golden.vectors_text()


def test_vectors_of_rotated_layers_are_what_the_brute_force_says():
    text = make_rotation_golden.VECTORS.read_text(encoding="utf-8")
    assert text == make_rotation_golden.vectors_text()


def test_the_vectors_of_rotated_layers_reach_what_they_are_for():
    cases = json.loads(make_rotation_golden.VECTORS.read_text(encoding="utf-8"))["cases"]
    kinds = {case["kind"] for case in cases.values()}
    assert kinds == {"quantize", "round_activation", "linear"}
    rotated = [case for case in cases.values() if case["kind"] != "linear"]
    assert {case["rotation"] for case in rotated} == {"hadamard_32"}
    assert set(cases) < set(golden_vectors()["cases"])
    finite = [name for name in cases if name.startswith("linear") and "broken" not in name]
    assert {name.split()[1].rstrip(",") for name in finite} == {"dialect", "fp8", "none"}


def test_checkpoint_is_what_the_brute_force_says(make_golden):
    files = make_golden.checkpoint_files()
    assert {path.name for path in CHECKPOINT.iterdir()} == set(files)
    for name, content in files.items():
        assert (CHECKPOINT / name).read_bytes() == content, name


def test_the_vectors_reach_what_they_are_for():
    cases = golden_vectors()["cases"].values()
    quantized = [case for case in cases if case["kind"] == "quantize"]
    combinations = {(c["book"], c["rule"], c["block_size"]) for c in quantized}
    assert len(combinations) == 4 * 3
    for book, id_bits, dialects in (("dialect_fp4", 4, 16), ("semantic_32", 5, 32)):
        meta = b"".join(
            bytes.fromhex(c["expected"]["meta"]["hex"]) for c in quantized if c["book"] == book
        )
        assert {byte & (dialects - 1) for byte in meta} == set(range(dialects))
        largest = {"dialect_fp4": 13, "semantic_32": 7}[book]
        assert {0, 1, largest} <= {byte >> id_bits for byte in meta}
        assert max(byte >> id_bits for byte in meta) == largest
    formats = {case["activation_format"] for case in cases if case["kind"] == "linear"}
    assert formats == {"dialect", "fp8", "none"}
    dtypes = {array["dtype"] for array in golden_vectors()["inputs"].values()}
    assert dtypes == {"float32", "bfloat16", "float16"}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_vector_on(backend):
    failed = [result for result in verify([backend]) if not result.passed]
    assert not failed
    assert len(verify([backend])) == len(golden_vectors()["cases"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_vector_on_cuda():
    assert not [result for result in verify(["cuda"]) if not result.passed]


def test_all_available_back_ends_are_the_default():
    assert {result.backend for result in verify()} == set(available_backends())


def test_an_unknown_back_end_is_refused():
    with pytest.raises(ValueError, match=r"backend: 'abacus' is not available here; .*'reference'"):
        verify(["abacus"])


def broken(change) -> Implementation:
    """The public functions with a fault in the packed tensors they make."""

    def quantize(*arguments, **options) -> PackedTensor:
        return change(ops.quantize(*arguments, **options))

    return Implementation("broken", torch.device("cpu"), quantize, ops.dialect_linear)


def other_id(p: PackedTensor) -> PackedTensor:
    return dataclasses.replace(p, meta=p.meta ^ 1)


def other_sign(p: PackedTensor) -> PackedTensor:
    codes = p.codes.clone()
    codes[-1:, -1:] ^= 0x80
    return dataclasses.replace(p, codes=codes)


def other_exponent(p: PackedTensor) -> PackedTensor:
    return dataclasses.replace(p, row_exponent=p.row_exponent ^ 1)


@pytest.mark.parametrize(
    ("change", "detail"),
    [(other_id, "meta[0, 0] is"), (other_sign, "codes["), (other_exponent, "row_exponent[0] is")],
)
def test_one_wrong_byte_fails_and_is_named(change, detail):
    results = verify_one(broken(change))
    failed = [r for r in results if not r.passed and r.case.startswith("quantize ")]
    assert len(failed) > 100
    assert any(result.detail.startswith(detail) for result in failed)
    assert all(result.passed == (result.detail == "") for result in results)


def test_a_rotation_that_is_forgotten_fails():
    def unrotated(*arguments, rotation="none") -> PackedTensor:
        return ops.quantize(*arguments)

    def of_plain_tokens(x, p, *arguments, **options):
        return ops.dialect_linear(x, dataclasses.replace(p, rotation="none"), *arguments, **options)

    cpu = torch.device("cpu")
    for quantize, linear, kind in (
        (unrotated, ops.dialect_linear, "quantize"),
        (ops.quantize, of_plain_tokens, "linear"),
        (ops.quantize, of_plain_tokens, "round_activation"),
    ):
        results = verify_one(Implementation("plain", cpu, quantize, linear))
        failed = {result.case for result in results if not result.passed}
        assert all("rotated" in case for case in failed)
        named = [result.case for result in results if result.case.startswith(kind)]
        assert len([case for case in named if case in failed]) > 5


def test_a_wrong_output_bit_and_a_lost_nan_fail():
    def one_ulp_up(x, p, bias=None, activation_format="dialect", accumulation="default"):
        y = ops.dialect_linear(x, p, bias, activation_format, accumulation)
        return torch.nextafter(y, torch.full_like(y, 1e30)) if y.dtype == torch.float32 else y

    def without_nan(x, p, bias=None, activation_format="dialect", accumulation="default"):
        return ops.dialect_linear(x, p, bias, activation_format, accumulation).nan_to_num(0.0)

    for fault, failing in ((one_ulp_up, "tokens float32"), (without_nan, "broken tokens")):
        backend = Implementation("faulty", torch.device("cpu"), ops.quantize, fault)
        failed = [result.case for result in verify_one(backend) if not result.passed]
        assert any(case.startswith("linear") and failing in case for case in failed)
        assert any(case.startswith("round_activation") and failing in case for case in failed)


def test_a_back_end_that_raises_fails_every_case_and_the_rest_still_runs():
    def refuse(*arguments, **options):
        raise RuntimeError("no such instruction")

    backend = Implementation("raising", torch.device("cpu"), refuse, ops.dialect_linear)
    results = verify_one(backend)
    assert len(results) == len(golden_vectors()["cases"])
    details = {r.detail for r in results if r.case.startswith("quantize ")}
    assert details == {"RuntimeError: no such instruction"}
    assert all(result.passed for result in results if result.case.startswith("decode"))


def test_the_golden_checkpoint_is_read_and_has_the_recorded_values():
    expected = json.loads((CHECKPOINT / "expected.json").read_text())["sha256"]
    packed = open_packed(CHECKPOINT)
    assert set(packed.layers) == set(expected)
    assert packed.scheme.format_version == 1
    for layer, digest in expected.items():
        values = packed.read(layer).dequantize(torch.float32).numpy().astype("<f4")
        assert hashlib.sha256(values.tobytes()).hexdigest() == digest, layer
        e4m3, scale = packed.read(layer).to_e4m3()
        same = (e4m3.to(torch.float32) * scale[:, None]).numpy().astype("<f4")
        assert hashlib.sha256(same.tobytes()).hexdigest() == digest, layer


def test_the_golden_checkpoint_is_small_ordinary_safetensors():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 28 * 1024
    with safe_open(CHECKPOINT / "model.safetensors", framework="np") as file:
        names = set(file.keys())
        rows = file.get_tensor("model.layers.0.mlp.down_proj.weight_row_exponent")
        meta = file.get_tensor("model.layers.0.mlp.down_proj.weight_meta")
    assert rows.dtype == np.int8
    assert NAN_ROW not in rows
    assert meta.shape == (64, 96 // 16)  # its override says blocks of 16
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
