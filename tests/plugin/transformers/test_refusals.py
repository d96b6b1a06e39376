"""Checkpoints and options that do not fit: one sentence each, never a random weight."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dialect_plugin.checkpoint.reader import CheckpointError
from dialect_plugin.scheme import SchemeError
from dialect_plugin.transformers import BlockDialectConfig
from tests.support.conversions import edit_config

UP = "model.layers.1.mlp.up_proj"


def edit(path, change):
    """Change the tensors of a checkpoint, a dict, in place."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"})


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name])})


def refused(match, *arguments, error=CheckpointError, **options):
    with pytest.raises(error, match=match) as caught:
        AutoModelForCausalLM.from_pretrained(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop(f"{UP}.weight_packed"), rf"{UP}\.weight_packed: the checkpoint does not hold it"),
        (drop(f"{UP}.weight_meta"), rf"{UP}\.weight_meta: the checkpoint does not hold it"),
        (drop(f"{UP}.weight_row_exponent"), rf"{UP}\.weight_row_exponent: the checkpoint does"),
        (drop("model.norm.weight"), r"model\.norm\.weight: the checkpoint does not hold it"),
        (drop("lm_head.weight"), r"lm_head\.weight: the checkpoint does not hold it"),
        (put("model.norm.weight", lambda t: t[:-1]), r"model\.norm\.weight: .* \[127\] where"),
        (put(f"{UP}.weight_packed", lambda t: t[:-1]), rf"{UP}\.weight: .*\[255, 128\] where"),
        (put(f"{UP}.weight_meta", lambda t: t[:, :-1]), rf"{UP}\.weight_meta: .*\[256, 3\] where"),
        (put(f"{UP}.weight_meta", lambda t: t.to(torch.int8)), rf"{UP}: meta: torch\.int8"),
        (
            put(f"{UP}.weight_row_exponent", lambda t: t.fill_(-128)),
            rf"{UP}\.weight_row_exponent: -128 at \[0\]",
        ),
        (
            lambda tensors: tensors.update({f"{UP}.weight": torch.zeros(256, 128)}),
            rf"{UP} is stored packed although .* a 16-bit weight is stored too",
        ),
    ],
)
def test_damaged_tensors(damaged, change, match):
    edit(damaged, change)
    refused(match, damaged)


def test_a_reserved_byte_of_the_book_of_16(packed, tmp_path):
    copy = Path(shutil.copytree(packed(book="dialect_fp4"), tmp_path / "copy"))
    edit(copy, put(f"{UP}.weight_meta", lambda t: t | 0xF0))
    refused(rf"{UP}\.weight_meta: byte .* reserved", copy)


def test_a_layer_that_transformers_does_not_have(damaged):
    edit_config(damaged, num_hidden_layers=1)
    refused(r"layers\.1\..*: is packed, but LlamaForCausalLM of transformers has no such", damaged)


def test_a_layer_that_is_no_linear_one(tiny_model, packed, tmp_path):
    """A copy whose config.json says GPT-2, which has Conv1D where others have linear layers."""
    config = transformers.GPT2Config(vocab_size=320, n_embd=128, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    refused(
        r"stored as \[inputs, outputs\] \(Conv1D\)",
        tmp_path,
        quantization_config=BlockDialectConfig(),
    )


def test_a_new_head_may_be_missing(packed):
    model = AutoModelForSequenceClassification.from_pretrained(packed(), num_labels=3)
    assert model.score.weight.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"colour": 1}, "the key 'colour' is not known"),
        ({"format_version": 9}, "this release reads versions up to"),
        ({"block_size": 48}, "block_size is 48"),
    ],
)
def test_a_bad_scheme(damaged, changes, match):
    scheme = json.loads((damaged / "config.json").read_text())["quantization_config"]
    edit_config(damaged, quantization_config=scheme | changes)
    refused(match, damaged, error=SchemeError)


def test_a_scheme_without_serialized(damaged):
    edit_config(damaged, quantization_config={"quant_method": "blockdialect"})
    refused("serialized is missing", damaged, error=SchemeError)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_size": 16}, "block_size is given, but this checkpoint is packed already"),
        ({"activation_format": "int8"}, "activation_format is 'int8'"),
        ({"accumulation": "fast"}, "accumulation is 'fast'; allowed are"),
        ({"bits": 4}, "the key 'bits' is not known"),
    ],
)
def test_options_for_a_packed_checkpoint(packed, options, match):
    with pytest.raises(SchemeError, match=match):
        AutoModelForCausalLM.from_pretrained(
            packed(), quantization_config=BlockDialectConfig(**options)
        )


@pytest.mark.parametrize(
    ("options", "match", "error"),
    [
        ({"ignore": ["model.layers.0.mlp.upproj"]}, "matches no layer", SchemeError),
        ({"serialized": True}, "serialized is true, but the checkpoint's config.json", SchemeError),
        ({"overrides": {UP: {"block_size": 16}}}, "engines run these as one matrix", SchemeError),
    ],
)
def test_options_for_a_16_bit_checkpoint(tiny_model, options, match, error):
    config = BlockDialectConfig(**options)
    refused(match, tiny_model(), error=error, quantization_config=config)


EXPERTS = "model.layers.1.block_sparse_moe.experts"


@pytest.mark.parametrize(
    ("change", "config", "match"),
    [
        (
            drop(f"{EXPERTS}.2.up_proj.weight_meta"),
            {},
            rf"{EXPERTS}\.2\.up_proj\.weight_meta: the checkpoint does not hold it; convert",
        ),
        (
            put(f"{EXPERTS}.2.up_proj.weight_packed", lambda t: t[:-1]),
            {},
            rf"{EXPERTS}\.2\.up_proj\.weight_packed: .*\[255, 64\] where .*\[256, 64\]",
        ),
        (
            put(f"{EXPERTS}.2.down_proj.weight_row_exponent", lambda t: t.fill_(-128)),
            {},
            r"mlp\.experts\.down_proj of expert 2\.weight_row_exponent: -128 at \[0\]",
        ),
        (None, {"num_local_experts": 3}, r"experts\.3\.\w+: transformers' model has 3 experts"),
        (None, {"num_local_experts": 5}, r"experts\.4\.\w+\.weight_packed: the checkpoint does"),
        (
            None,
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            r"LlamaForCausalLM of transformers has nothing in the place of these experts, .*"
            "--no-experts or ignore",
        ),
    ],
)
def test_packed_experts(packed, tmp_path, change, config, match):
    copy = Path(shutil.copytree(packed("MixtralForCausalLM"), tmp_path / "copy"))
    if change is not None:
        edit(copy, change)
    edit_config(copy, **config)
    refused(match, copy)


def test_experts_that_disagree(packed, tmp_path):
    copy = Path(shutil.copytree(packed("MixtralForCausalLM"), tmp_path / "copy"))
    scheme = json.loads((copy / "config.json").read_text())["quantization_config"]
    overrides = {f"{EXPERTS}.1.up_proj": {"activation_format": "fp8"}}
    edit_config(copy, quantization_config=scheme | {"overrides": overrides, "format_version": 2})
    refused(rf"the experts of {EXPERTS} disagree \(", copy, error=SchemeError)


def test_nan_in_an_expert(tiny_model, tmp_path):
    source = Path(shutil.copytree(tiny_model("MixtralForCausalLM"), tmp_path / "source"))

    def spoil(weight):
        weight[3, 4] = torch.nan
        return weight

    edit(source, put(f"{EXPERTS}.1.w2.weight", spoil))
    refused(
        rf"{EXPERTS}\.1\.down_proj\.weight: nan at \[3, 4\]",
        source,
        quantization_config=BlockDialectConfig(),
    )


def test_pickled_weights(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    refused("only safetensors are read", tmp_path, quantization_config=BlockDialectConfig())


def test_a_state_dict_without_files(packed):
    config = transformers.AutoConfig.from_pretrained(packed())
    with pytest.raises(CheckpointError, match="state_dict: packed weights are read from files"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})


def test_inputs_of_another_width(packed):
    layer = AutoModelForCausalLM.from_pretrained(packed()).get_submodule(UP)
    with pytest.raises(ValueError, match=r"input: torch.float32 \[3, 64\]; it must be"):
        layer(torch.zeros(3, 64))
    with pytest.raises(ValueError, match=r"input: torch.float64"):
        layer(torch.zeros(3, 128, dtype=torch.float64))


def test_an_older_transformers():
    code = (
        "import sys\n"
        "sys.modules['transformers.core_model_loading'] = None\n"
        "import dialect_plugin.transformers\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: dialect_plugin.transformers: needs transformers 5.19 or")
    assert last.endswith("install it with pip install 'transformers>=5.19'")


def test_importing_registers_and_nothing_else_does():
    code = (
        "import dialect_plugin\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        "assert 'blockdialect' not in known\n"
        "import dialect_plugin.transformers\n"
        "assert 'blockdialect' in known\n"
        "import importlib; importlib.reload(dialect_plugin.transformers)\n"
        "import sys; assert 'vllm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
