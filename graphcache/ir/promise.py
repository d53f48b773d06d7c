"""What a plan promises: how near its results come to the untouched model's."""

import math
from dataclasses import dataclass

from graphcache.ir.errors import PlanError
from graphcache.ir.plantext import is_number, is_word

SAMPLER = "sampler"
"""In place of an `output_type`: what a sampler of the user's own returns."""


@dataclass(frozen=True, slots=True)
class Promise:
    """How near a plan's results came to the untouched model's, on samples that nothing was fitted to.

    It belongs to the plan that it was measured of: one that is changed has none.

    Attributes:
        mean: PSNR in decibels, the mean over the samples.
        worst: that of the worst sample. Of n samples: one in n + 1 further ones lies below it by chance.
        data_range: largest minus smallest value of a result, which decibels are counted from.
        samples: how many were measured; those of a batch count each.
        results: what was compared: the `output_type` of a pipeline, or "sampler" for what a function of the
            user's own returns.
        plan: the digest of the plan, which `Plan.promising` fills in.
    """

    mean: float
    worst: float
    data_range: float = 2.0
    samples: int = 1
    results: str = "latent"
    plan: str = "any"

    def __post_init__(self) -> None:
        if not (is_number(self.mean) and is_number(self.worst) and self.worst <= self.mean):
            raise PlanError(
                f"promise: mean={self.mean} and worst={self.worst} must be decibels, worst no more than mean"
            )
        if not (is_number(self.data_range) and self.data_range > 0):
            raise PlanError(f"promise: data_range={self.data_range} must be above 0")
        if not is_number(self.samples) or not isinstance(self.samples, int) or self.samples < 1:
            raise PlanError(f"promise: samples={self.samples} must be a whole number of at least 1")
        for name in ("results", "plan"):
            if not is_word(getattr(self, name)):
                raise PlanError(f"promise: {name}={getattr(self, name)!r} is no name")

    @classmethod
    def of(cls, decibels: list[float], data_range: float, results: str) -> "Promise":
        """What was measured, rounded down to hundredths of a decibel.

        Raises:
            PlanError: something measured is not finite.
        """
        if not decibels or not all(map(math.isfinite, decibels)):
            raise PlanError(
                "results under the plan are not finite: it can promise nothing, take a slower one"
            )
        mean, worst = (
            math.floor(100 * value) / 100 for value in (math.fsum(decibels) / len(decibels), min(decibels))
        )
        return cls(mean, worst, float(data_range), len(decibels), results)

    def __str__(self) -> str:
        return (
            f"{self.worst:.2f} dB at worst and {self.mean:.2f} on the mean of {self.samples} held-out "
            f"sample{'s' * (self.samples > 1)}"
        )
