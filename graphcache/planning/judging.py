"""What is kept of a comparison's generations: how near each came to the plain model's result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from graphcache.planning.metrics import ssim
from graphcache.runtime.closeness import decibels


@dataclass(frozen=True)
class Measured:
    """One contender's generation from one sample."""

    seconds: float
    result: Tensor
    ideal: float | None


@dataclass(frozen=True)
class Judged:
    """What is kept of one contender's generation: `decibels` of every result, `ssim` of every frame."""

    seconds: float
    ideal: float | None
    decibels: Sequence[float]
    ssim: Sequence[float]
    features: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Judge:
    """Compares generations from one sample with the plain model's result."""

    plain: Tensor
    data_range: float
    features: Callable[[Tensor], Tensor] | None

    def __call__(self, one: Measured) -> Judged:
        reached = decibels([one.result], [self.plain], self.data_range)
        made, wanted = _frames(one.result), _frames(self.plain)
        alike: list[float] = []
        if made.dim() == 4 and min(made.shape[-2:]) >= 7:
            alike = ssim(made, wanted, self.data_range).tolist()
        found = None if self.features is None else (self.features(made), self.features(wanted))
        return Judged(one.seconds, one.ideal, reached, alike, found)


def _frames(results: Tensor) -> Tensor:
    """Images as they are; clips (N, C, T, H, W) frame by frame."""
    return results.transpose(1, 2).flatten(0, 1) if results.dim() == 5 else results
