"""What tests compute of single experts by themselves: their weights, and what lies between them."""

import json

import torch

from . import swept_models
from .tiny_models import make_tokenizer


def silu(gate, up):
    return torch.nn.functional.silu(gate) * up


def gpt_oss(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def squared(up):
    return torch.relu(up).square()


MIXTURES = {  # what lies between an expert's matrices; experts stored one by one and in one tensor
    "Qwen3MoeForCausalLM": (silu, {}),
    "MixtralForCausalLM": (silu, {}),
    "GptOssForCausalLM": (gpt_oss, {}),
    "GraniteMoeForCausalLM": (silu, {}),
    "NemotronHForCausalLM": (
        squared,
        {
            "layers_block_type": ["moe", "full_attention"],
            "n_routed_experts": 4,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
}


def weight_of(checkpoint, layer):
    return torch.cat([*checkpoint.read_rows(layer, 1 << 20)]).float()


def biases_of(checkpoint, prefix, number):
    """Those of gate, up and down as GPT-OSS stores them; 0 for the others."""
    name = f"{prefix}.gate_up_proj_bias"
    if name not in checkpoint.tensors:
        return 0.0, 0.0
    with checkpoint.open_shard(checkpoint.tensors[name].shard) as file:
        both = file.get_tensor(name)[number].float()
    return both[0::2], both[1::2]


def maker(folder):
    """Architecture, and how its config differs -> a tiny checkpoint; each is made once."""
    made = {}

    def get(architecture, **differing):
        key = architecture, json.dumps(differing)
        if key not in made:
            path = folder / str(len(made)) / architecture
            made[key] = swept_models.build(architecture, path, **differing)
            make_tokenizer(swept_models.VOCABULARY).save_pretrained(path)
        return made[key]

    return get
