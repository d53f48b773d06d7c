"""Which steps to compute: the best set of every size, by dynamic programming over pairs of steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphcache.analysis.sensitivity import effect, fitted

NONE = -1
"""In place of the computed step before the first one."""


@dataclass(frozen=True)
class Table:
    """A site's products at pairs of steps, as in `Profile`: gram (steps, steps), effects (steps, window + 1,
    probes, samples)."""

    name: str
    gram: np.ndarray
    effects: np.ndarray

    @property
    def window(self) -> int:
        return int(self.effects.shape[1]) - 1

    def entries(self, step: int, newest: int, older: int) -> tuple[int, ...]:
        """The history entries that are used at a step: those within the window."""
        near = older != NONE and step - older <= self.window
        return (newest, older) if near else (newest,)


def gap_effects(tables: Sequence[Table], newest: int, older: int, end: int) -> np.ndarray:
    """Effects of all sites together at the steps from `newest` + 1 to `end` − 1: (steps, probes, samples)."""
    totals = []
    for step in range(newest + 1, end):
        parts = []
        for table in tables:
            entries = table.entries(step, newest, older)
            parts.append(effect(table.effects, step, entries, fitted(table.gram, step, entries)))
        totals.append(np.sum(parts, axis=0))
    return np.stack(totals)


def gap_errors(tables: Sequence[Table]) -> np.ndarray:
    """Estimated squared error of leaving out the steps between two computed ones, given the one before both.

    Effects within a gap add up with their signs, since they continue one another; gaps are taken for
    independent.

    Returns:
        float64 (older, newest, end) with steps + 1 places each: `older` 0 stands for none and o + 1 for the
        step o; `end` may be the number of steps. Infinite where a gap is wider than the window.
    """
    steps, window = tables[0].gram.shape[0], tables[0].window
    errors = np.full((steps + 1, steps + 1, steps + 1), np.inf)
    for newest in range(steps):
        last = min(newest + window + 1, steps)
        for older in [NONE, *range(newest)]:
            errors[older + 1, newest, newest + 1] = 0.0
            if last <= newest + 1:
                continue
            if older == NONE or newest + 1 - older <= window:
                found = gap_effects(tables, newest, older, last)
            totals = np.cumsum(found, axis=0)
            errors[older + 1, newest, newest + 2 : last + 1] = (totals**2).mean(axis=1).sum(axis=-1)
    return errors


@dataclass(frozen=True)
class Choice:
    """A set of computed steps and the squared error that is estimated for it, summed over the samples."""

    steps: tuple[int, ...]
    error: float


def best_steps(errors: np.ndarray, most: int) -> dict[int, Choice]:
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
    found: dict[int, Choice] = {}
    for size in range(1, most + 1):
        ends = best + errors[:, :count, count]
        older, newest = np.unravel_index(int(np.argmin(ends)), ends.shape)
        if np.isfinite(ends[older, newest]):
            chosen = _traced(origins, int(older), int(newest))
            found[size] = Choice(chosen, float(ends[older, newest]))
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
