"""Judge clips frame by frame: the digit is cut out around its ink and shown to the digit classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.digits.data import IMAGE_SIZE, load_split
from examples.digits.evaluate import SampleQuality, sample_quality
from examples.digits.model import Classifier
from examples.moving_digits.data import ENLARGED, FRAME_SIZE, FRAMES, Clips

REFERENCE_COUNT = 256
"""Clips of held-out digits that distances are taken to."""

_SIDE = round(IMAGE_SIZE * ENLARGED)
"""Of a digit in a clip, pixels."""


def clip_quality(classifier: Classifier, clips: Tensor, labels: Tensor) -> SampleQuality:
    """Judge `clips` (N, 1, FRAMES, FRAME_SIZE, FRAME_SIZE) in [-1, 1] that were asked to show `labels` (N,).

    Accuracy is the share of frames that are read as asked for; the distance is to frames of held-out clips.
    """
    reference, _ = Clips(load_split("held_out")).batch(REFERENCE_COUNT, torch.Generator().manual_seed(0))
    frames = digits_of(clips), labels.repeat_interleave(FRAMES)
    return sample_quality(classifier, *frames, digits_of(reference))


def digits_of(clips: Tensor) -> Tensor:
    """The digit of every frame at the size of still images, (N · FRAMES, 1, IMAGE_SIZE, IMAGE_SIZE)."""
    frames = clips.transpose(1, 2).flatten(0, 1)
    ink = ((frames + 1) / 2).clamp(min=0)
    places = torch.arange(FRAME_SIZE) + 0.5
    weights = ink.sum(dim=(1, 2, 3)).clamp(min=1e-6)
    rows = (ink.sum(dim=(1, 3)) @ places) / weights
    columns = (ink.sum(dim=(1, 2)) @ places) / weights
    # the grid of affine_grid runs from -1 to 1 over the frame
    theta = torch.zeros(len(frames), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = _SIDE / FRAME_SIZE
    theta[:, 0, 2], theta[:, 1, 2] = (2 * centre / FRAME_SIZE - 1 for centre in (columns, rows))
    size = [len(frames), 1, _SIDE, _SIDE]
    cut = F.grid_sample(frames + 1, F.affine_grid(theta, size, align_corners=False), align_corners=False) - 1
    return F.interpolate(cut, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
