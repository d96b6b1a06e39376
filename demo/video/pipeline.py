"""The pipeline around the small video model: four words in, a video out, in pixels.

It is an ordinary diffusers pipeline with a Wan transformer, but without a VAE: 24 x 24 pixels need
none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .scenes import FRAMES, SIZE, WORDS, parse

__all__ = ["MODEL", "MovingShapesOutput", "MovingShapesPipeline", "WordEmbedder"]

MODEL = Path(__file__).resolve().parent / "model"
"""The model that ships with the project."""


class WordEmbedder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """One vector for each word of :data:`~demo.video.scenes.WORDS`."""

    @register_to_config
    def __init__(self, words: int = len(WORDS), width: int = 64) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(words, width)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """int64 [B, 4] -> [B, 4, width]; word 0 means that the prompt leaves the aspect open."""
        embedded: torch.Tensor = self.table(words)
        return embedded


class MovingShapesOutput(BaseOutput):  # type: ignore[misc]
    """``frames``: float32 [B, F, 3, H, W] in 0..1."""

    frames: torch.Tensor


class MovingShapesPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Videos of one moving shape, for example "a red circle moves up-left, fast".

    Args:
        transformer: the video transformer, on 3 channels of pixels.
        text_encoder: the words' vectors.
        scheduler: flow matching.
    """

    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        text_encoder: WordEmbedder,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 16,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], Any] | None = None,
    ) -> MovingShapesOutput:
        """Generate one video for each prompt.

        Args:
            prompt: one or several; each names a colour, a shape, a direction and a speed.
            num_inference_steps: steps of the sampler.
            guidance_scale: of classifier-free guidance; 1 switches it off.
            generator: source of the noise; a list holds one for each prompt.
            callback_on_step_end: called as in diffusers' own pipelines; its result is ignored.

        Raises:
            ValueError: if a prompt lacks one of the four words, or names two.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        words = torch.tensor([parse(each).words for each in prompts], device=self.device)
        asked, anything = self.text_encoder(words), self.text_encoder(torch.zeros_like(words))
        dtype = self.transformer.dtype
        shape = (len(prompts), 3, FRAMES, SIZE, SIZE)
        latents = randn_tensor(shape, generator, self.device, torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_input = latents.to(dtype)
            times = timestep.expand(len(prompts))
            with self.transformer.cache_context("cond"):
                velocity = self.transformer(model_input, times, asked).sample.float()
            if guidance_scale != 1:
                with self.transformer.cache_context("uncond"):
                    free = self.transformer(model_input, times, anything).sample.float()
                velocity = free + guidance_scale * (velocity - free)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, timestep, {"latents": latents})
        self.maybe_free_model_hooks()
        frames = (latents.clamp(-1, 1) + 1) / 2
        return MovingShapesOutput(frames=frames.transpose(1, 2))
