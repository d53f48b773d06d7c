"""Token budgets of few sizes, in place of a different one for every layer and step."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Numbers: TypeAlias = NDArray[np.float64]

WORK_TOLERANCE = 0.03
"""Relative: of the tokens computed in all."""
_CUTS = 24
"""Places at most where one group of steps may end and the next begin."""
_CANDIDATES = 16
"""Sizes at most that are tried."""
_PRICES = 12
"""Bisections of the price of a computed token."""


@dataclass(frozen=True)
class Budgets:
    """Sizes for layers and steps: `sizes[step][layer]`, and how far they are from what was wanted.

    `work` is the computed tokens' relative excess, `distance` Σ|k − k_raw| / Σ k_raw.
    """

    sizes: tuple[tuple[int, ...], ...]
    work: float
    distance: float


def assign(raw: Sequence[Sequence[int]], tokens: int, groups: int, multiple: int = 16) -> Budgets:
    """Contiguous groups of steps, in each of which every layer has one of {0, small, large, all}.

    A dynamic programme over the steps finds, for a pair of sizes, the groups with the smallest Σ|k − k_raw|;
    a price on computed tokens, found by bisection, holds the work to that of `raw`. The best pair is taken.

    Args:
        raw: wanted tokens, `raw[step][layer]`.
        tokens: in all.
        groups: of steps, at most.
        multiple: of which the two sizes are.
    """
    if len(raw) > 1 and len(set(map(tuple, raw))) == 1:
        one = assign(raw[:1], tokens, groups, multiple)
        return Budgets(one.sizes * len(raw), one.work, one.distance)
    if not raw or not any(map(any, raw)):
        return Budgets(tuple(tuple(0 for _ in row) for row in raw), 0.0, 0.0)
    wanted = np.array(raw, dtype=np.float64)
    pairs = combinations(_candidates(torch.from_numpy(wanted), tokens, multiple), 2)
    stretches = _Stretches(wanted)
    best = _best([_Search(stretches, (0, *pair, tokens), min(groups, len(raw))).best() for pair in pairs])
    sizes = tuple(tuple(int(size) for size in row) for row in best.given.tolist())
    return Budgets(sizes, best.work, best.distance)


def _candidates(wanted: Tensor, tokens: int, multiple: int) -> list[int]:
    """Multiples around the wanted numbers: their quantiles, rounded both ways."""
    shares = torch.linspace(0, 1, _CANDIDATES, dtype=torch.float64)
    positive = wanted[wanted > 0]
    around = {float(q) // multiple * multiple for q in torch.quantile(positive, shares)}
    sizes = {int(size) + offset for size in around for offset in (0, multiple)}
    return sorted(size for size in sizes if 0 < size <= tokens)


@dataclass(frozen=True)
class _Found:
    """Sizes `given` to steps and layers, with the `work` and `distance` of Budgets."""

    given: _Numbers
    work: float
    distance: float


def _best(found: Sequence[_Found]) -> _Found:
    """The nearest to what is wanted among those with its work; the nearest in work if there are none."""
    fitting = [item for item in found if abs(item.work) <= WORK_TOLERANCE]
    return min(fitting, key=lambda f: f.distance) if fitting else min(found, key=lambda f: abs(f.work))


class _Stretches:
    """The steps between any two cuts.

    Attributes:
        wanted: tokens, (step, layer).
        total: of them.
        cuts: steps, in order.
        places: of the stretch from one cut to another, both by number, among all stretches.
        steps: how many a stretch has.
    """

    def __init__(self, wanted: _Numbers) -> None:
        count = len(wanted)
        self.wanted, self.total = wanted, float(wanted.sum())
        self.cuts = sorted({round(i * count / min(count, _CUTS)) for i in range(min(count, _CUTS) + 1)})
        self._first, self._last = np.triu_indices(len(self.cuts), 1)
        bounds = zip(self._first.tolist(), self._last.tolist(), strict=True)
        self.places = {pair: place for place, pair in enumerate(bounds)}
        self.steps = np.diff(np.array(self.cuts)[[self._first, self._last]], axis=0)[0]
        self._distances: dict[int, _Numbers] = {}

    def distances(self, size: int) -> _Numbers:
        """Σ|size − wanted|: (stretch, layer)."""
        if size not in self._distances:
            each = abs(self.wanted - size)
            upto = np.concatenate([np.zeros_like(each[:1]), each.cumsum(0)])[self.cuts]
            self._distances[size] = upto[self._last] - upto[self._first]
        return self._distances[size]


class _Search:
    """The groups for one pair of sizes."""

    def __init__(self, stretches: _Stretches, sizes: tuple[int, ...], groups: int) -> None:
        self.stretches, self.groups = stretches, groups
        self.sizes = np.array(sizes, dtype=np.float64)
        self.distances = np.stack([stretches.distances(size) for size in sizes])  # (size, stretch, layer)
        self.work = (self.sizes[:, None] * stretches.steps)[:, :, None]

    def best(self) -> _Found:
        low, high = -4.0, 4.0
        results = []
        for _ in range(_PRICES):
            price = (low + high) / 2
            results.append(self._priced(price))
            low, high = (price, high) if results[-1].work > 0 else (low, price)
        return _best([*results, *self._mixed(results)])

    def _mixed(self, results: list[_Found]) -> list[_Found]:
        """Layers that are alike get one size together at any price: the first ones take the larger, then."""
        less = [item for item in results if item.work < 0]
        more = [item for item in results if item.work > 0]
        if not less or not more:
            return []
        small = max(less, key=lambda f: f.work).given
        large = min(more, key=lambda f: f.work).given
        changes = [(given[1:] != given[:-1]).any(1) for given in (small, large)]
        if not np.array_equal(*changes):
            return []
        layers = range(1, small.shape[1])
        return [self._measured(np.concatenate([large[:, :n], small[:, n:]], 1)) for n in layers]

    def _priced(self, price: float) -> _Found:
        cost = self.distances + price * self.work
        bounds = self._groups(cost.min(0).sum(-1).tolist())
        groups = [self.stretches.places[pair] for pair in pairwise(bounds)]
        sizes = self.sizes[cost[:, groups].argmin(0)]
        return self._measured(sizes.repeat(self.stretches.steps[groups], axis=0))

    def _measured(self, given: _Numbers) -> _Found:
        total = self.stretches.total
        distance = float(abs(given - self.stretches.wanted).sum()) / total
        return _Found(given, float(given.sum()) / total - 1, distance)

    def _groups(self, cost: list[float]) -> list[int]:
        """The cuts, by number, at which the cheapest groups begin and end."""
        last, places = len(self.stretches.cuts) - 1, self.stretches.places
        paths: list[dict[int, tuple[float, list[int]]]] = [{0: (0.0, [0])}]
        for _ in range(self.groups):
            reached: dict[int, tuple[float, list[int]]] = {}
            for end in range(1, last + 1):
                options = [
                    (spent + cost[places[begin, end]], path)
                    for begin, (spent, path) in paths[-1].items()
                    if begin < end
                ]
                if options:
                    spent, path = min(options)
                    reached[end] = spent, [*path, end]
            paths.append(reached)
        return min(layer[last] for layer in paths if last in layer)[1]
