"""How close results are to a reference, in decibels."""

from collections.abc import Iterable

import torch
from torch import Tensor

from graphcache.ir.errors import GraphCacheError

LEAST_ERROR = 1e-20
"""Mean square error; equal results would have infinite decibels."""


def psnr(images: Tensor, reference: Tensor, data_range: float = 2.0, least: float = 0.0) -> Tensor:
    """Peak signal-to-noise ratio of each image.

    Args:
        images: (N, ...), any shape after the first dimension.
        reference: of the same shape.
        data_range: largest minus smallest possible value; 2 for images in [-1, 1].
        least: mean square error that smaller ones are taken for.

    Returns:
        decibels, float64 (N,); infinite where an image equals its reference and `least` is 0.
    """
    check_pair(images, reference, data_range)
    error = (images.double() - reference.double()).flatten(1).square().mean(dim=1)
    return 10 * torch.log10(data_range**2 / error.clamp(min=least))


def decibels(results: Iterable[Tensor], references: Iterable[Tensor], data_range: float = 2.0) -> list[float]:
    """PSNR of every sample of some batches, in a row; those that are equal have 200 or more."""
    pairs = zip(results, references, strict=True)
    return torch.cat([psnr(*pair, data_range, LEAST_ERROR) for pair in pairs]).tolist()


def check_pair(images: Tensor, reference: Tensor, data_range: float) -> None:
    """Raise GraphCacheError unless two batches can be compared."""
    if images.shape != reference.shape:
        raise GraphCacheError(f"shapes differ: {tuple(images.shape)} and {tuple(reference.shape)}")
    if images.ndim < 2:
        raise GraphCacheError(f"a batch of images is expected, not a tensor {tuple(images.shape)}")
    if not data_range > 0:
        raise GraphCacheError(f"data_range={data_range}: must be above 0")
