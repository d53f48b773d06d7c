"""Classifier-free guided sampling of pictures: a plain loop with one model call per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.emoji.data import CHANNELS, IMAGE_SIZE
from examples.emoji.model import no_conditions
from examples.noise import initial_noise


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    scheduler: Any,
    captions: Tensor,
    *,
    steps: int,
    guidance: float = 3.0,
    seed: int = 0,
    side: int = IMAGE_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Generate a picture per caption; the batch is [unconditional; conditional], as in diffusers' pipelines.

    Args:
        model: anything with the call signature of `PixArtTransformer2DModel`.
        scheduler: a diffusers flow-matching scheduler, reset here.
        captions: of `EmojiModel.captions`, (N, TOKENS, CAPTION_CHANNELS).
        steps: number of model calls.
        guidance: classifier-free guidance scale; 1 is the conditional model alone.
        seed: of the initial noise.
        side: height and width; the model was trained for the default alone.
        progress: called after each step with (steps done, steps in all).

    Returns:
        pictures (N, 3, side, side) in [-1, 1].
    """
    latents = initial_noise(len(captions), (CHANNELS, side, side), seed)
    text = torch.cat([torch.zeros_like(captions), captions])
    scheduler.set_timesteps(steps)
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        batch = torch.cat([latents, latents])
        velocity = model(
            hidden_states=batch,
            encoder_hidden_states=text,
            timestep=timestep.expand(len(batch)),
            added_cond_kwargs=no_conditions(),
            return_dict=False,
        )[0]
        unconditional, conditional = velocity.chunk(2)
        velocity = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        if progress is not None:
            progress(done, steps)
    return latents.clamp(-1, 1)
