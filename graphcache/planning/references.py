"""Results without a cache, which search, tuning and judging compare with: each is made once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from graphcache.ir.errors import GraphCacheError
from graphcache.planning.convergence import converged
from graphcache.planning.sampling import Sampling, refuse_random

Aim = Literal["uncached", "converged"]


@dataclass
class References:
    """What samples give without a cache; each is made when it is asked for, and held.

    Attributes:
        sampling: how the model is run.
        steps: of a generation.
        aim: "uncached", the same run computed whole; "converged", the limit of many steps.
    """

    sampling: Sampling
    steps: int
    aim: Aim = "uncached"
    _made: list[tuple[Any, Tensor]] = field(default_factory=list)
    _first: Tensor | None = None
    _calls: int = 1

    def of(self, samples: Sequence[Any]) -> list[Tensor]:
        """The results of some samples, which are told apart as objects.

        Raises:
            GraphCacheError: a converged one is not reached.
        """
        return [self._of(sample) for sample in samples]

    def begun(self, sample: Any) -> tuple[Tensor, int]:
        """The uncached result of the first sample that this was asked of, and how many calls a step makes.

        Raises:
            GraphCacheError: the sampler draws random numbers.
        """
        if self._first is None:
            first = self._of(sample) if self.aim == "uncached" else self._uncached(sample)
            refuse_random(self.sampling, sample, self.steps, first)
            self._first = first
        return self._first, self._calls

    def held_with(self, samples: Sequence[Any]) -> int:
        """How many are held once these samples' are made."""
        return len(self._made) + sum(self._known(sample) is None for sample in samples)

    def _of(self, sample: Any) -> Tensor:
        result = self._known(sample)
        if result is None:
            if self.aim == "converged":
                result = converged(self.sampling, sample, self.steps)
            else:
                result = self._uncached(sample)
            self._made.append((sample, result))
        return result

    def _known(self, sample: Any) -> Tensor | None:
        return next((result for known, result in self._made if known is sample), None)

    def _uncached(self, sample: Any) -> Tensor:
        result, self._calls = self.sampling.uncached(sample, self.steps)
        return result


def made_for(reference: Aim | References, sampling: Sampling, steps: int) -> References:
    """What is given, or none yet of an aim.

    Raises:
        GraphCacheError: what is given is of another run.
    """
    if isinstance(reference, str):
        return References(sampling, steps, reference)
    if reference.sampling is not sampling or reference.steps != steps:
        raise GraphCacheError(
            f"reference= holds results of {reference.steps} steps, or of another Sampling; the plan has "
            f"{steps} steps: make References of the Sampling that is tuned, and of as many"
        )
    return reference
