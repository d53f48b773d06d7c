"""Handwritten digits: the 8x8 set of scikit-learn, redrawn with sharp strokes at 16x16 pixels.

The source images are 4x4 block averages of a binary drawing. Interpolated on a fine canvas and
passed through a steep threshold they give the strokes back; geometry and stroke thickness are varied
on that canvas, and only then is the image averaged down to its final size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor

IMAGE_SIZE = 16
NUM_CLASSES = 10
SUPERSAMPLING = 4
CANVAS_SIZE = IMAGE_SIZE * SUPERSAMPLING
HELD_OUT_FRACTION = 0.2
SOURCE_LEVELS = 16.0

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Augmentation:
    """Ranges of a random redrawing; every quantity is uniform in plus or minus its bound.

    Attributes:
        rotation: degrees.
        shift: pixels of the final image.
        scale: relative to the nominal size.
        shear: horizontal displacement per unit of height.
        thickness: shift of the stroke threshold, in units of the ink density (0 to 1).
    """

    rotation: float = 8.0
    shift: float = 0.8
    scale: float = 0.08
    shear: float = 0.1
    thickness: float = 0.07


NO_AUGMENTATION = Augmentation(rotation=0.0, shift=0.0, scale=0.0, shear=0.0, thickness=0.0)
NOMINAL_SCALE = 0.88
NOMINAL_ASPECT = 1.15
STROKE_THRESHOLD = 0.53
STROKE_SOFTNESS = 0.07


@dataclass(frozen=True)
class Digits:
    """Ink densities on the fine canvas with their labels.

    Attributes:
        canvases: float32 of shape (N, 1, CANVAS_SIZE, CANVAS_SIZE), 0 is paper and 1 is ink.
        labels: int64 of shape (N,), the digit drawn.
    """

    canvases: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def images(self) -> Tensor:
        """All images without augmentation, (N, 1, IMAGE_SIZE, IMAGE_SIZE) in [-1, 1]."""
        generator = torch.Generator().manual_seed(0)
        return redraw(self.canvases, NO_AUGMENTATION, generator)

    def batch(
        self, size: int, generator: torch.Generator, augmentation: Augmentation | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw `size` augmented digits with replacement.

        Returns:
            images (size, 1, IMAGE_SIZE, IMAGE_SIZE) in [-1, 1] and int64 labels (size,).
        """
        index = torch.randint(len(self), (size,), generator=generator)
        images = redraw(self.canvases[index], augmentation or Augmentation(), generator)
        return images, self.labels[index]


def load_split(split: Split, seed: int = 0) -> Digits:
    """One part of the data set; the partition depends on `seed` alone."""
    source = load_digits()
    order = np.random.default_rng(seed).permutation(len(source.target))
    held_out = round(HELD_OUT_FRACTION * len(order))
    chosen = order[:held_out] if split == "held_out" else order[held_out:]
    ink = torch.from_numpy(source.images[chosen]).float().unsqueeze(1) / SOURCE_LEVELS
    labels = torch.from_numpy(source.target[chosen]).long()
    return Digits(_enlarge(ink), labels)


def redraw(canvases: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Warp, threshold and average down.

    Args:
        canvases: ink density, (N, 1, CANVAS_SIZE, CANVAS_SIZE).

    Returns:
        images (N, 1, IMAGE_SIZE, IMAGE_SIZE) in [-1, 1], ink at +1.
    """
    return F.avg_pool2d(strokes(canvases, augmentation, generator), SUPERSAMPLING) * 2 - 1


def strokes(canvases: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Warp and threshold ink densities (N, 1, CANVAS_SIZE, CANVAS_SIZE); the same shape, in 0 to 1."""
    count = canvases.shape[0]
    grid = F.affine_grid(_affine(count, augmentation, generator), list(canvases.shape), align_corners=False)
    warped = F.grid_sample(canvases, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    threshold = STROKE_THRESHOLD + _uniform(count, augmentation.thickness, generator).view(-1, 1, 1, 1)
    return torch.sigmoid((warped - threshold) / STROKE_SOFTNESS)


def _enlarge(ink: Tensor) -> Tensor:
    """(N, 1, 8, 8) to (N, 1, CANVAS_SIZE, CANVAS_SIZE), padded first so that strokes close at the border."""
    border = 1
    factor = CANVAS_SIZE // ink.shape[-1]
    padded = F.pad(ink, (border,) * 4)
    fine = F.interpolate(padded, scale_factor=factor, mode="bicubic", align_corners=False)
    return fine[..., border * factor : -border * factor, border * factor : -border * factor].contiguous()


def _affine(count: int, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Inverse maps from output to input coordinates, (count, 2, 3) in the units of `affine_grid`."""
    angle = _uniform(count, math.radians(augmentation.rotation), generator)
    scale = NOMINAL_SCALE * (1 + _uniform(count, augmentation.scale, generator))
    shear = _uniform(count, augmentation.shear, generator)
    reach = augmentation.shift * 2 / IMAGE_SIZE
    shift = torch.stack([_uniform(count, reach, generator) for _ in range(2)], dim=1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    linear = torch.stack([cos, cos * shear - sin, sin, sin * shear + cos], dim=1).view(-1, 2, 2)
    linear = torch.tensor([[1 / NOMINAL_ASPECT], [1.0]]) * linear
    return torch.cat([linear, -(linear @ shift.unsqueeze(-1))], dim=2)


def _uniform(count: int, bound: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(count, generator=generator) * 2 - 1) * bound
