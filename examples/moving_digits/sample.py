"""Classifier-free guided sampling of clips: a plain loop with one model call per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.moving_digits.data import FRAME_SIZE, FRAMES
from examples.moving_digits.model import captions
from examples.noise import initial_noise


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    scheduler: Any,
    labels: Tensor,
    *,
    steps: int,
    guidance: float = 3.0,
    seed: int = 0,
    side: int = FRAME_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Generate one clip per label; the batch is [unconditional; conditional], as in diffusers' pipelines.

    Args:
        model: anything with the call signature of `LatteTransformer3DModel`.
        scheduler: a diffusers flow-matching scheduler, reset here.
        labels: int64 (N,), digits 0 to 9.
        steps: number of model calls.
        guidance: classifier-free guidance scale; 1 is the conditional model alone.
        seed: of the initial noise.
        side: height and width; the model was trained for the default alone.
        progress: called after each step with (steps done, steps in all).

    Returns:
        clips (N, 1, FRAMES, side, side) in [-1, 1].
    """
    latents = initial_noise(len(labels), (1, FRAMES, side, side), seed)
    text = captions(torch.cat([torch.full_like(labels, -1), labels]))
    scheduler.set_timesteps(steps)
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        batch = torch.cat([latents, latents])
        times = timestep.expand(len(batch))
        velocity = model(batch, timestep=times, encoder_hidden_states=text, return_dict=False)[0]
        unconditional, conditional = velocity.chunk(2)
        velocity = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        if progress is not None:
            progress(done, steps)
    return latents.clamp(-1, 1)
