"""The video model and its noise schedule.

A diffusers `LatteTransformer3DModel` that predicts the velocity of a rectified flow. Its text input carries
the digit: one token, the digit's place in a row of ten, all zeros for the unconditional branch of guidance.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, LatteTransformer3DModel
from torch import Tensor, nn

from examples.digits.data import NUM_CLASSES
from examples.digits.model import load_weights
from examples.moving_digits.data import FRAME_SIZE, FRAMES

WEIGHTS = Path(__file__).parent / "weights" / "latte.safetensors"

LAYERS = 4
"""Pairs of a spatial and a temporal block."""
HEADS = 4
HEAD_WIDTH = 32
PATCH_SIZE = 4
TRAIN_TIMESTEPS = 1000
SHIFT = 3.0
"""Towards noise, at which a clip's digit and its way are settled (arXiv 2403.03206, equation 23)."""


def build_model() -> nn.Module:
    """A `LatteTransformer3DModel` with random weights, in eval mode.

    Called with latents (N, 1, 16, 32, 32), `timestep` (N,) in (0, 1000] and `encoder_hidden_states`
    (N, 1, 10); returns the velocity (noise minus data), of the latents' shape.
    """
    width = HEADS * HEAD_WIDTH
    model = LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=1,
        out_channels=1,
        num_layers=LAYERS,
        cross_attention_dim=width,
        attention_bias=True,
        sample_size=FRAME_SIZE,
        patch_size=PATCH_SIZE,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=NUM_CLASSES,
        video_length=FRAMES,
    )
    return cast(nn.Module, model).eval()


def load_model(path: Path | str = WEIGHTS) -> nn.Module:
    """The trained video model in float32 and eval mode."""
    model = build_model()
    load_weights(model, path)
    return model


def captions(labels: Tensor) -> Tensor:
    """The text input that asks for digits (N,): float32 (N, 1, 10); a label of -1 asks for none."""
    asked = F.one_hot(labels.clamp(min=0), NUM_CLASSES) * (labels >= 0)[:, None]
    return asked[:, None].float()


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler's method on the rectified flow, shifted as in training."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=SHIFT)


def shifted(position: Tensor, shift: float) -> Tensor:
    """Noise levels in 0 to 1 of positions spread evenly from 0 to 1."""
    return shift * position / (1 + (shift - 1) * position)
