"""One 16-bit LLaMA in the formats of other engines: GGUF files, and compressed-tensors checkpoints.

No format is calibrated. GGUF files have no tokenizer: engines are given token ids.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..lib.harness import ROOT

__all__ = ["LLAMA_PYTHON", "stored_bytes", "write_compressed", "write_gguf"]

LLAMA_PYTHON = ROOT / ".cache" / "peers" / "llama" / "bin" / "python"
"""Python of the environment in which llama-cpp-python is installed."""

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GROUP = 32
"""Inputs that share a scale in 4 bits; with groups of 128 most layers of a small model fail."""


def write_gguf(model: Path, target: Path, kind: str) -> None:
    """Write a checkpoint as a GGUF file.

    Args:
        model: directory of a LLaMA in bfloat16.
        target: the file.
        kind: ``"bf16"``, or a type that llama.cpp then quantizes it to.

    Raises:
        RuntimeError: if llama.cpp cannot quantize it.
    """
    if kind == "bf16":
        _write_bf16_gguf(model, target)
        return
    source = target.with_name("bf16.gguf")
    if not source.exists():
        _write_bf16_gguf(model, source)
    module = "benchmarks.language.engines.llama_engine"
    command = [str(LLAMA_PYTHON), "-m", module, "quantize", str(source), str(target), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"llama.cpp cannot quantize to {kind}: {done.stderr[-500:]}")


def _write_bf16_gguf(model: Path, target: Path) -> None:
    # here, because rendering the tables needs none of it
    import gguf

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters", config)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    for name, tensor in _tensors(model):
        found = _GGUF_OUTER_NAMES.get(name) or _layer_name(name)
        if ".attn_q." in found or ".attn_k." in found:
            tensor = _interleaved(tensor, heads if ".attn_q." in found else key_heads)
        if tensor.ndim == 1:
            writer.add_tensor(found, tensor.float().numpy())
        else:
            stored = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(found, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _layer_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys as llama.cpp rotates them: pairs of neighbours, not of halves."""
    rows, columns = weight.shape
    pairs = weight.view(heads, 2, rows // heads // 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def write_compressed(model: Path, target: Path, bits: int) -> None:
    """Write a checkpoint in compressed-tensors, its decoder layers rounded to the nearest.

    Args:
        model: directory of a LLaMA in bfloat16.
        target: is made; it must not exist.
        bits: 8 for int8 weights, a scale for each row, and int8 activations, a scale for each
            token; 4 for int4 weights, a scale for every `GROUP` inputs, and 16-bit activations.
    """
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(model):
        if name.endswith("_proj.weight"):
            rounded = _int8(tensor) if bits == 8 else _int4(tensor)
            tensors |= {name.replace("weight", part): value for part, value in rounded.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _compressed_config(bits)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-9) / 127
    codes = (weight.float() / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}


def _int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes -8..7 plus 8, eight to an int32, the first one lowest."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, GROUP)
    scale = (groups.abs().amax(dim=2, keepdim=True).clamp_min(1e-9) / 7.5).to(torch.bfloat16)
    codes = (groups / scale.float()).round().clamp(-8, 7).to(torch.int64) + 8
    words = codes.view(rows, columns // 8, 8) << (4 * torch.arange(8))
    packed = words.sum(dim=2)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    return {
        "weight_packed": packed,
        "weight_scale": scale[..., 0].contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _compressed_config(bits: int) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True}
    weights |= {"strategy": "channel"} if bits == 8 else {"strategy": "group", "group_size": GROUP}
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    activations = token if bits == 8 else None
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
            }
        },
    }


def stored_bytes(model: Path) -> int:
    """Bytes of all tensors of a checkpoint's directory or of a GGUF file."""
    if model.suffix == ".gguf":
        import gguf

        return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(model).tensors)
    return sum(tensor.nbytes for _, tensor in _tensors(model))


def _tensors(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                yield name, file.get_tensor(name)
