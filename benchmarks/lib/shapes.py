"""The dimensions of the language models that benchmarks measure.

Weights are random wherever a benchmark uses these: neither speed nor size depends on their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "GEMMA3_270M",
    "LLAMA_1B",
    "LLAMA_8B",
    "LLAMA_70B",
    "MIXTURE_1B",
    "SMOLLM2_135M",
    "SPARSE_1B",
    "TINY",
    "Llama",
    "Mixture",
]


@dataclass(frozen=True)
class Llama:
    """The dimensions of a LLaMA.

    Attributes:
        name: in tables and headings.
        hidden, intermediate: channels between the layers, and inside of an MLP.
        layers: decoder layers.
        heads, key_value_heads, head: attention heads, those of keys and values, channels of one.
        vocabulary: token ids.
        tied: whether the output layer shares the embedding's weight.
        context: the longest text, in tokens.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head: int
    vocabulary: int = 128_256
    tied: bool = False
    context: int = 8192

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> Llama:
        """The dimensions that a checkpoint's config.json states."""
        return cls(
            name,
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            key_value_heads=config["num_key_value_heads"],
            head=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            vocabulary=config["vocab_size"],
            tied=config["tie_word_embeddings"],
            context=config["max_position_embeddings"],
        )

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says of such a model in bfloat16."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Shapes [N, K] of a decoder layer's linear layers, by their names in a checkpoint."""
        query, key = self.heads * self.head, self.key_value_heads * self.head
        return {
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.k_proj": (key, self.hidden),
            "self_attn.v_proj": (key, self.hidden),
            "self_attn.o_proj": (self.hidden, query),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def fused_projections(self) -> dict[str, tuple[int, int]]:
        """The same shapes [N, K] as vLLM fuses them into four layers."""
        query, key = self.heads * self.head, self.key_value_heads * self.head
        return {
            "qkv": (query + 2 * key, self.hidden),
            "o": (self.hidden, query),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def routers(self) -> dict[str, tuple[int, int]]:
        """Shapes of a decoder layer's matrices that stay in 16 bit."""
        return {}

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers of all decoder layers."""
        return self.layers * sum(rows * columns for rows, columns in self.projections.values())


@dataclass(frozen=True)
class SparseLlama(Llama):
    """The dimensions of a LLaMA whose MLPs are mixtures of experts, as Mixtral's are.

    Attributes:
        intermediate: channels inside of one expert.
        experts, active: experts of a decoder layer, and those that each token goes to.
    """

    experts: int = 0
    active: int = 0

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> SparseLlama:
        """The dimensions that a checkpoint's config.json states."""
        counts = {
            "experts": config["num_local_experts"],
            "active": config["num_experts_per_tok"],
        }
        return cls(**vars(Llama.from_config(name, config)), **counts)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says of such a model in bfloat16."""
        return super().config | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.active,
            "sliding_window": None,
        }

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Shapes [N, K] of a decoder layer's linear layers, each expert's among them."""
        found = {n: shape for n, shape in super().projections.items() if not n.startswith("mlp.")}
        gate, down = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        for expert in range(self.experts):
            for part, shape in (("w1", gate), ("w3", gate), ("w2", down)):
                found[f"block_sparse_moe.experts.{expert}.{part}"] = shape
        return found

    @property
    def fused_projections(self) -> dict[str, tuple[int, int]]:
        """The same shapes [N, K] as vLLM fuses them, the experts' one above the other."""
        fused = super().fused_projections
        for stack in ("gate_up", "down"):
            rows, columns = fused[stack]
            fused[stack] = self.experts * rows, columns
        return fused

    @property
    def routers(self) -> dict[str, tuple[int, int]]:
        """Shapes of a decoder layer's matrices that stay in 16 bit."""
        return {"block_sparse_moe.gate": (self.experts, self.hidden)}


SMOLLM2_135M = Llama("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49_152, tied=True)
GEMMA3_270M = Llama("Gemma-3-270M", 640, 2048, 18, 4, 1, 256, 262_144, tied=True)
"""Its norms apart, which are more than a LLaMA's, but less than 0.02 % of the weights."""
LLAMA_1B = Llama("LLaMA-3.2-1B", 2048, 8192, 16, 32, 8, 64, tied=True)
LLAMA_8B = Llama("LLaMA-3-8B", 4096, 14336, 32, 32, 8, 128)
SPARSE_1B = SparseLlama(
    "a mixture, 4 of 32 experts", 2048, 1024, 8, 32, 8, 64, tied=True, experts=32, active=4
)
"""Experts as those of :data:`MIXTURE_1B` in a third of the layers, so that it fits into 8 GB."""
LLAMA_70B = Llama("LLaMA-3-70B", 8192, 28672, 80, 64, 8, 128)
TINY = Llama("tiny", 64, 128, 2, 2, 1, 32, vocabulary=64, context=64)
"""For files, whose readers do not care what is in them."""


@dataclass(frozen=True)
class Mixture:
    """The dimensions of a layer of experts.

    Attributes:
        hidden: channels between the layers.
        width: channels inside of one expert.
        experts, active: experts of the layer, and those that each token goes to.
    """

    hidden: int
    width: int
    experts: int
    active: int

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Shapes [N, K] of an expert's matrices, gate and up as one."""
        return {"gate_up": (2 * self.width, self.hidden), "down": (self.hidden, self.width)}

    @property
    def weights(self) -> int:
        """Weights of all experts."""
        return self.experts * sum(rows * columns for rows, columns in self.projections.values())


MIXTURE_1B = Mixture(hidden=2048, width=1024, experts=32, active=4)
"""About a billion active parameters with 24 such layers."""
