"""How alike images are in structure, and how close two sets of features are in distribution."""

import torch
from torch import Tensor

from graphcache.ir.errors import GraphCacheError
from graphcache.libraries.extras import require
from graphcache.runtime.closeness import check_pair


def ssim(images: Tensor, reference: Tensor, data_range: float = 2.0, *, sigma: float = 0.75) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each image, by torchmetrics.

    The Gaussian window has a side of 2·⌊3.5·sigma + 0.5⌋ + 1 pixels; images are mirrored at their borders.
    The default's 7 pixels suit images as small as 16x16; the paper's sigma of 1.5 has 11.

    Args:
        images: (N, C, H, W), sides no smaller than the window.
        reference: of the same shape.
        data_range: largest minus smallest possible value; 2 for images in [-1, 1].
        sigma: of the Gaussian window, in pixels.

    Returns:
        float64 (N,), at most 1.
    """
    check_pair(images, reference, data_range)
    side = 2 * int(3.5 * sigma + 0.5) + 1
    if images.ndim != 4 or min(images.shape[-2:]) < side:
        raise GraphCacheError(
            f"ssim takes (N, C, H, W) of at least {side}x{side} pixels, not {tuple(images.shape)}; "
            "a smaller sigma has a smaller window"
        )
    values: Tensor = require(
        "torchmetrics.functional.image", "examples", "ssim"
    ).structural_similarity_index_measure(
        images.double(), reference.double(), sigma=sigma, data_range=data_range, reduction="none"
    )
    return values.reshape(-1)


def frechet_distance(features: Tensor, reference_features: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of features (Heusel et al. 2017).

    |m₁ - m₂|² + tr(C₁) + tr(C₂) - 2·tr((C₁^½ C₂ C₁^½)^½), in float64. Covariances have the divisor N - 1,
    as in FID. Few samples bias the distance upwards, so compare only values of equal N.

    Args:
        features: (N, D), N at least 2.
        reference_features: (M, D), M at least 2.

    Returns:
        the distance in squared units of the features, at least 0.
    """
    first, second = features.double(), reference_features.double()
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise GraphCacheError(
            f"frechet_distance takes features (N, D) and (M, D), not {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    if min(len(first), len(second)) < 2:
        raise GraphCacheError("frechet_distance needs at least two samples on each side for a covariance")
    gap = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    covariance, other = _covariance(first), _covariance(second)
    root = _symmetric_root(covariance)
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(gap + covariance.trace() + other.trace() - 2 * cross))


def _covariance(samples: Tensor) -> Tensor:
    centred = samples - samples.mean(dim=0)
    return centred.T @ centred / (len(samples) - 1)


def _symmetric_root(matrix: Tensor) -> Tensor:
    """Square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
