"""The result that a sampler comes to with more and more steps."""

from typing import Any

import torch
from torch import Tensor

from graphcache.ir.errors import GraphCacheError
from graphcache.planning.sampling import Sampling

MOST_DOUBLINGS = 6
CLOSER = 10.0
"""Decibels by which half of a reference's steps have to be closer to it than the uncached run is."""


def converged(sampling: Sampling, sample: Any, steps: int) -> Tensor:
    """The result of so many steps that half of them would not change it by much.

    Steps are doubled until half as many come 10 dB closer to the result than the `steps` asked for do.

    Raises:
        GraphCacheError: that is not reached, the sampler refuses so many steps, or a result is not finite.
    """
    uncached = before = sampling.generate(sampling.plain(steps), sample, steps)
    for doubling in range(1, MOST_DOUBLINGS + 1):
        count = steps * 2**doubling
        try:
            result = sampling.generate(sampling.plain(count), sample, count)
        except (ValueError, IndexError, RuntimeError) as error:
            raise GraphCacheError(
                f"no converged solution: the sampler fails at {count} steps ({error}); tune against the "
                "uncached run instead"
            ) from error
        if not torch.isfinite(result).all():
            raise GraphCacheError(f"no converged solution: the result of {count} steps is not finite")
        near, far = ((item.double() - result.double()).square().mean() for item in (before, uncached))
        if doubling > 1 and float(far) >= 10 ** (CLOSER / 10) * float(near):
            return result
        before = result
    raise GraphCacheError(
        f"no converged solution: results still change at {count} steps; tune against the uncached run instead"
    )
