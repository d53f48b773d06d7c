"""Classifier-free guided sampling: a plain loop with one model call per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.digits.data import IMAGE_SIZE
from examples.digits.model import NULL_LABEL
from examples.noise import initial_noise


def guided(prediction: Tensor, guidance: float) -> Tensor:
    """Combine the halves of a [conditional; unconditional] batch, (2N, ...) to (N, ...)."""
    conditional, unconditional = prediction.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    scheduler: Any,
    labels: Tensor,
    *,
    steps: int,
    guidance: float = 1.5,
    seed: int = 0,
    side: int = IMAGE_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Generate one image per label.

    Args:
        model: anything with the call signature of `DiTTransformer2DModel`.
        scheduler: a diffusers scheduler, reset here.
        labels: int64 (N,), digits 0 to 9.
        steps: number of scheduler steps, which is the number of model calls.
        guidance: classifier-free guidance scale; 1 is the conditional model alone.
        seed: of the initial noise.
        side: height and width; the model was trained for the default alone.
        progress: called after each step with (steps done, steps in all).

    Returns:
        images (N, 1, side, side) in [-1, 1].
    """
    count = labels.shape[0]
    latents: Tensor = initial_noise(count, (1, side, side), seed).to(labels.device)
    class_labels = torch.cat([labels, torch.full_like(labels, NULL_LABEL)])
    scheduler.set_timesteps(steps)
    latents = latents * scheduler.init_noise_sigma
    timesteps = [int(timestep) for timestep in scheduler.timesteps]
    for done, timestep in enumerate(timesteps, start=1):
        inputs = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        t_batch = torch.full((2 * count,), timestep, dtype=torch.long, device=labels.device)
        prediction = model(inputs, timestep=t_batch, class_labels=class_labels, return_dict=False)[0]
        latents = scheduler.step(guided(prediction, guidance), timestep, latents, return_dict=False)[0]
        if progress is not None:
            progress(done, len(timesteps))
    return latents.clamp(-1, 1)
