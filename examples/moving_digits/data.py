"""Clips of a handwritten digit that moves and bounces, made as Moving-MNIST (arXiv 1502.04681) is.

Each clip shows one redrawn digit of `examples.digits.data` in a larger frame. It moves straight on at
constant speed and turns back at the walls; its position is known to a quarter of a pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.digits.data import CANVAS_SIZE, SUPERSAMPLING, Augmentation, Digits, strokes

FRAMES = 16
FRAME_SIZE = 32
SLOWEST, FASTEST = 0.4, 1.2
"""Speeds in pixels per frame."""

ENLARGED = 1.5
"""The digits' size here, by their size as still images: 24 pixels."""

_SIDE = round(CANVAS_SIZE * ENLARGED)
_ROOM = FRAME_SIZE * SUPERSAMPLING - _SIDE
"""Positions of a digit's corner along one axis, in quarters of a pixel."""


@dataclass(frozen=True)
class Clips:
    """Random clips of some digits, drawn with replacement."""

    digits: Digits

    def batch(self, size: int, generator: torch.Generator, *, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
        """Draw `size` clips.

        Returns:
            clips (size, 1, frames, FRAME_SIZE, FRAME_SIZE) in [-1, 1] and int64
            labels (size,).
        """
        index = torch.randint(len(self.digits), (size,), generator=generator)
        drawn = strokes(self.digits.canvases[index], Augmentation(), generator)
        drawn = F.interpolate(drawn, scale_factor=ENLARGED, mode="bilinear", align_corners=False)
        return render(drawn, random_paths(size, frames, generator)), self.digits.labels[index]


def random_paths(count: int, frames: int, generator: torch.Generator) -> Tensor:
    """Corners of digits in each frame, quarters of a pixel: int64 (count, frames, 2), row first."""
    start = torch.rand(count, 1, 2, generator=generator) * _ROOM
    angle = torch.rand(count, generator=generator) * 2 * math.pi
    speed = SLOWEST + (FASTEST - SLOWEST) * torch.rand(count, generator=generator)
    velocity = speed[:, None] * torch.stack([angle.sin(), angle.cos()], dim=1) * SUPERSAMPLING
    travelled = start + velocity[:, None] * torch.arange(frames)[None, :, None]
    return (_ROOM - (travelled % (2 * _ROOM) - _ROOM).abs()).round().long()


def render(drawn: Tensor, paths: Tensor) -> Tensor:
    """Move digits along their paths.

    Args:
        drawn: ink, (N, 1, side, side) in 0 to 1, a side of 24 pixels.
        paths: of `random_paths`, (N, frames, 2).

    Returns:
        clips (N, 1, frames, FRAME_SIZE, FRAME_SIZE) in [-1, 1].
    """
    count, frames, _ = paths.shape
    side = FRAME_SIZE * SUPERSAMPLING
    canvas = torch.zeros(count, frames, side, side)
    for clip in range(count):
        for frame, (row, column) in enumerate(paths[clip].tolist()):
            canvas[clip, frame, row : row + _SIDE, column : column + _SIDE] = drawn[clip, 0]
    return F.avg_pool2d(canvas, SUPERSAMPLING)[:, None] * 2 - 1
