"""Which steps to compute: the best set of every size, by dynamic programming over pairs of steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphcache.analysis.handovers import turns
from graphcache.analysis.sensitivity import effect, feature_error, fitted

NONE = -1
"""In place of the computed step before the first one."""


@dataclass(frozen=True)
class SiteProducts:
    """A site's products at pairs of steps, as in `Profile`: gram (steps, steps), effects (steps, window + 1,
    probes, samples). Values that are `reused` are taken as they are, others are fitted to two entries. At the
    steps of `handovers` another model takes over, which finds nothing of what was before."""

    name: str
    gram: np.ndarray
    effects: np.ndarray
    reused: bool = False
    handovers: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        return int(self.gram.shape[0])

    @property
    def window(self) -> int:
        return int(self.effects.shape[1]) - 1

    def reusing(self, share: float) -> "SiteProducts":
        """The same where this share of the value is taken from the cache, as it is there."""
        return replace(self, gram=share**2 * self.gram, effects=share * self.effects, reused=True)

    def stand_ins(self) -> np.ndarray:
        """Effects (newest, gap − 1, behind, probes, samples) of a stand-in at the step newest + gap, made of
        the value at `newest` and, where it is within the window, of the one that lies `behind` it; 0 is none.
        """
        return self._over_gaps(lambda *made: effect(self.effects, *made))

    def distances(self) -> np.ndarray:
        """Squared distances (newest, gap − 1, behind) of the same stand-ins to the value."""
        return self._over_gaps(lambda *made: feature_error(self.gram, *made))

    def _over_gaps(self, measured: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        newest, gap, behind, paired = _gaps(self.steps, self.window, self.handovers)
        # beyond the last step there is nothing to replace; its place is filled and never looked at
        step = np.minimum(newest + gap, self.steps - 1)
        newest = np.minimum(newest, step - 1).clip(min=0)
        single = np.broadcast_to(newest, step.shape)[..., None]
        alone = measured(step, single, self._weights(step, single))
        if self.reused or self.window < 2:
            return np.repeat(alone, max(self.window, 1), axis=2)
        pairs = np.stack(np.broadcast_arrays(newest, np.where(paired, newest - behind, newest)), axis=-1)
        step = np.broadcast_to(step, paired.shape)
        both = measured(step, pairs, self._weights(step, pairs))
        return np.where(paired.reshape(paired.shape + (1,) * (both.ndim - 3)), both, alone)

    def _weights(self, step: np.ndarray, entries: np.ndarray) -> np.ndarray:
        return np.ones(entries.shape) if self.reused else fitted(self.gram, step, entries)


def _gaps(
    steps: int, window: int, handovers: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Open grids of a gap's newest computed step, its length and how far the one before lies behind, and
    where that one is within the window, and its value of the same turn."""
    newest, gap, behind = np.ogrid[:steps, 1 : window + 1, : max(window, 1)]
    turn = turns(steps, handovers)
    alike = turn[newest] == turn[(newest - behind).clip(min=0)]
    return newest, gap, behind, alike & (behind > 0) & (behind <= newest) & (gap + behind <= window)


def gap_squares(tables: Sequence[SiteProducts]) -> np.ndarray:
    """Estimated squared errors (newest, gap − 1, behind) of leaving out the steps up to newest + gap.

    Effects within a gap add up with their signs, since they continue one another; gaps are taken for
    independent.
    """
    totals = np.cumsum(sum(table.stand_ins() for table in tables), axis=1)
    squares: np.ndarray = (totals**2).mean(axis=-2).sum(axis=-1)
    return squares


STRENGTH = 4
"""Measurements that nearby gaps count for."""
NEARBY = (2, 1)
"""Steps, and lengths of a gap, that are nearby."""


def steadied(squares: np.ndarray, tables: Sequence[SiteProducts]) -> np.ndarray:
    """What `gap_squares` gives, drawn towards what nearby gaps make likely, to choose sets by.

    A few probes of a few samples leave every gap's error uncertain, and the best of very many sets is the
    one that chance favours. How far values move in a gap is known exactly; how much of it the result feels
    is much the same for gaps nearby. Each error is the mean of its own measurements and of `STRENGTH` more
    that say what that gives.
    """
    steps, window, probes, samples = tables[0].effects.shape
    measurements = probes * samples
    newest, gap, behind, paired = _gaps(steps, window - 1, tables[0].handovers)
    turn = turns(steps, tables[0].handovers)
    lengths = np.cumsum(np.sqrt(sum(table.distances() for table in tables)), axis=1) ** 2
    inside = turn[newest] == turn[np.minimum(newest + gap, steps - 1)]
    known = (newest + gap < steps) & inside & (lengths > 0)
    pair, single = (
        _nearby(squares, lengths, known & alike, turn)[..., None] for alike in (paired, behind == 0)
    )
    likely = np.where(paired, pair, single) * lengths
    steady: np.ndarray = (measurements * squares + STRENGTH * likely) / (measurements + STRENGTH)
    return steady


def _nearby(squares: np.ndarray, lengths: np.ndarray, known: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Mean of squares / lengths over nearby gaps (newest, gap − 1) of the same turn."""
    ratios = np.divide(squares, lengths, out=np.zeros_like(squares), where=known)
    total, count = (_neighbourhood(item.sum(axis=2), turn) for item in (ratios, known))
    mean: np.ndarray = total / np.maximum(count, 1)
    return mean


def _neighbourhood(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Sums of the values that are nearby."""
    steps, gaps = (np.abs(np.subtract.outer(*[np.arange(size)] * 2)) for size in values.shape)
    near = (steps <= NEARBY[0]) & np.equal.outer(turn, turn)
    sums: np.ndarray = near.astype(float) @ values @ (gaps <= NEARBY[1]).astype(float)
    return sums


def gap_errors(squares: np.ndarray, handovers: Sequence[int] = ()) -> np.ndarray:
    """Squared errors of the gap between two computed steps, given the one before both.

    Args:
        squares: (newest, gap − 1, behind).
        handovers: steps that are computed whatever is chosen, and behind which nothing from before is read.

    Returns:
        float64 (older, newest, end) with steps + 1 places each: `older` 0 stands for none and o + 1 for the
        step o; `end` may be the number of steps. Infinite where a gap is wider than the window, or has a
        handover in it.
    """
    steps, window = squares.shape[:2]
    errors = np.full((steps + 1, steps + 1, steps + 1), np.inf)
    turn = turns(steps, handovers)
    for newest in range(steps):
        errors[: newest + 1, newest, newest + 1] = 0.0
        own = np.flatnonzero(turn == turn[newest])
        last = min(window, int(own[-1]) - newest)
        for older in range(NONE, newest):
            behind = newest - older
            found = squares[newest, :last, behind if older >= own[0] and behind < window else 0]
            errors[older + 1, newest, newest + 2 : newest + 2 + last] = found
    return errors


def set_error(errors: np.ndarray, chosen: Sequence[int]) -> float:
    """The sum of the gap errors of a set of computed steps."""
    before, ends = (NONE, *chosen[:-1]), (*chosen[1:], errors.shape[0] - 1)
    gaps = zip(before, chosen, ends, strict=True)
    return sum(float(errors[older + 1, newest, end]) for older, newest, end in gaps)


@dataclass(frozen=True)
class ComputedSteps:
    """A set of computed steps and the squared error that is estimated for it, summed over the samples."""

    steps: tuple[int, ...]
    error: float


def best_steps(errors: np.ndarray, most: int) -> dict[int, ComputedSteps]:
    """For every number of computed steps up to `most`, the set with the least sum of gap errors.

    Args:
        errors: of `gap_errors`.
        most: the largest number asked for.

    Returns:
        by number of computed steps; numbers that no set within the window has are left out. The first step is
        always computed.
    """
    count = errors.shape[0] - 1
    # best[o, n]: least error of all gaps before n, of sets whose two latest steps are o and n
    best = np.full((count + 1, count), np.inf)
    best[0, 0] = 0.0
    origins: list[np.ndarray] = []
    found: dict[int, ComputedSteps] = {}
    for size in range(1, most + 1):
        ends = best + errors[:, :count, count]
        older, newest = np.unravel_index(int(np.argmin(ends)), ends.shape)
        if np.isfinite(ends[older, newest]):
            chosen = _traced(origins, int(older), int(newest))
            found[size] = ComputedSteps(chosen, float(ends[older, newest]))
        # (o, n) -> (n, e): the step before n is forgotten
        through = best[:, :, None] + errors[:, :count, :count]
        origin = np.argmin(through, axis=0)
        following = np.full_like(best, np.inf)
        following[1:] = np.min(through, axis=0)
        origins.append(origin)
        best = following
    return found


def _traced(origins: Sequence[np.ndarray], older: int, newest: int) -> tuple[int, ...]:
    """Walk back from the two latest steps; `older` counts from 1, 0 is none."""
    chosen = [newest]
    for origin in reversed(origins):
        before = older - 1
        chosen.append(before)
        older, newest = int(origin[before, newest]), before
    return tuple(reversed(chosen))
