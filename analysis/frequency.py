"""Two bands of spatial frequency of the guidance difference: FasterCache's CFG-Cache (arXiv 2410.19355).

The published method takes a 2-D Fourier transform of each frame and channel, keeps a disc around the mean,
and transforms back. The disc is symmetric: the same band comes from real matrices of the frequencies kept.
"""

import math
from collections.abc import Sequence

import torch

from graphcache.ir.letter import Letter


def radius(height: int, width: int, divisor: int) -> int:
    """Of the low band's disc, in cycles per frame."""
    return min(height, width) // divisor


def basis(size: int, radius: int) -> torch.Tensor:
    """Orthonormal cosines and sines of 0 to `radius` cycles over `size` samples.

    Float64 (2·radius + 1, size): the mean, then cosine and sine of each frequency. Needs 2·radius < size.
    """
    rows = [torch.full((size,), size**-0.5, dtype=torch.float64)]
    samples = torch.arange(size)
    for cycles in range(1, radius + 1):
        angle = 2 * math.pi / size * (samples * cycles % size).double()
        rows += [angle.cos() * (2 / size) ** 0.5, angle.sin() * (2 / size) ** 0.5]
    return torch.stack(rows)


def disc(radius: int) -> torch.Tensor:
    """1 where the two frequencies of rows of `basis` lie in the disc, else 0: float64, square."""
    cycles = (torch.arange(2 * radius + 1) + 1) // 2
    return (cycles[:, None] ** 2 + cycles[None] ** 2 <= radius**2).double()


def factors(letter: Letter, step: int, since: Sequence[int]) -> tuple[float, float]:
    """What the low and the high band are multiplied by at a one-branch step.

    `since` are the steps, this one included, that weighed the bands since the difference was measured. The
    paper (section 3.3) weighs each step by itself; the released code multiplies the stored bands each time.
    """
    steps = since if letter.option("weighting") == "released" else (step,)
    low, high = float(letter.option("low")), float(letter.option("high"))
    until, start = int(letter.option("low_until")), int(letter.option("high_from"))
    return (
        math.prod(low for s in steps if s + 1 <= until),
        math.prod(high for s in steps if s + 1 >= start),
    )
