"""The hooks that diffusers and accelerate put on single layers to offload a transformer."""

from __future__ import annotations

from typing import Any

from torch import nn

from .quantized import QuantizedLinear

__all__ = ["check_offloading", "renew_group_offloading"]


def check_offloading(name: str, module: nn.Module) -> None:
    """Raise RuntimeError if layers cannot be exchanged under the offloading in force.

    Args:
        name: what the error calls the transformer.
        module: the transformer.
    """
    if any(
        hook.config.offload_to_disk_path is not None for hook in _hooks(module, "group_offloading")
    ):
        raise RuntimeError(
            f"{name}: group offloading keeps the weights on disk, where they cannot be exchanged; "
            "load the pipeline again and enable SemanticDialect before offloading"
        )
    for layer in module.modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        if _offloads(getattr(layer, "_hf_hook", None)):
            raise RuntimeError(
                f"{name}: its layers are offloaded one by one; call pipe.remove_all_hooks(), then "
                "disable_semantic_dialect(), and offload again"
            )
        if _hooks(layer, "layerwise_casting"):
            raise RuntimeError(
                f"{name}: layerwise casting is on and diffusers cannot switch it off; load the "
                "pipeline again with from_pretrained"
            )


def renew_group_offloading(module: nn.Module) -> None:
    """Apply group offloading, where it is on, to the layers that are there now."""
    if _hooks(module, "group_offloading"):
        from diffusers.hooks import group_offloading

        # what diffusers itself does after it has loaded a LoRA
        group_offloading._maybe_remove_and_reapply_group_offloading(module)


def _hooks(module: nn.Module, name: str) -> list[Any]:
    """diffusers' hooks of that name on a module and all modules in it."""
    registries = [getattr(part, "_diffusers_hook", None) for part in module.modules()]
    found = [registry.get_hook(name) for registry in registries if registry is not None]
    return [hook for hook in found if hook is not None]


def _offloads(hook: Any) -> bool:
    """Whether a hook of accelerate's, or one of several, offloads a layer's tensors."""
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))
