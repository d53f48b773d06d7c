"""The noise that a generation starts from."""

from collections.abc import Sequence

import torch
from torch import Tensor

_SEED_STRIDE = 1_000_003


def initial_noise(count: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Standard normal latents (count, *shape); sample i depends on `seed` and i alone."""
    samples = []
    for index in range(count):
        generator = torch.Generator().manual_seed(seed * _SEED_STRIDE + index)
        samples.append(torch.randn(*shape, generator=generator))
    return torch.stack(samples)
