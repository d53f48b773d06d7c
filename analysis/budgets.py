"""Token budgets of few sizes, in place of a different one for every layer and step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise

import torch
from torch import Tensor

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
    wanted = torch.tensor(raw, dtype=torch.float64)
    pairs = list(combinations(_candidates(wanted, tokens, multiple), 2))
    found = [_Search(wanted, (0, *pair, tokens), min(groups, len(raw))).best() for pair in pairs]
    fitting = [item for item in found if abs(item.work) <= WORK_TOLERANCE]
    return min(fitting, key=lambda b: b.distance) if fitting else min(found, key=lambda b: abs(b.work))


def _candidates(wanted: Tensor, tokens: int, multiple: int) -> list[int]:
    """Multiples around the wanted numbers: their quantiles, rounded both ways."""
    shares = torch.linspace(0, 1, _CANDIDATES, dtype=torch.float64)
    positive = wanted[wanted > 0]
    around = {float(q) // multiple * multiple for q in torch.quantile(positive, shares)}
    sizes = {int(size) + offset for size in around for offset in (0, multiple)}
    return sorted(size for size in sizes if 0 < size <= tokens)


@dataclass(frozen=True)
class _Search:
    """The groups for one pair of sizes."""

    wanted: Tensor
    sizes: tuple[int, ...]
    groups: int

    @cached_property
    def cuts(self) -> list[int]:
        count = len(self.wanted)
        return sorted({round(i * count / min(count, _CUTS)) for i in range(min(count, _CUTS) + 1)})

    @cached_property
    def distances(self) -> Tensor:
        """Σ|size − wanted| of every stretch between two cuts: (from, to, layer, size)."""
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        each = (self.wanted[:, :, None] - sizes).abs()
        upto = torch.cat([torch.zeros_like(each[:1]), each.cumsum(0)])[self.cuts]
        return upto[None] - upto[:, None]

    @cached_property
    def work(self) -> Tensor:
        """Computed tokens of every stretch: (from, to, 1, size)."""
        cuts = torch.tensor(self.cuts, dtype=torch.float64)
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        return (cuts[None] - cuts[:, None])[:, :, None, None] * sizes

    def best(self) -> Budgets:
        low, high = -4.0, 4.0
        results = []
        for _ in range(_PRICES):
            price = (low + high) / 2
            results.append(self._priced(price))
            low, high = (price, high) if results[-1].work > 0 else (low, price)
        results += self._mixed(results)
        fitting = [item for item in results if abs(item.work) <= WORK_TOLERANCE]
        return min(fitting, key=lambda b: b.distance) if fitting else min(results, key=lambda b: abs(b.work))

    def _mixed(self, results: list[Budgets]) -> list[Budgets]:
        """Layers that are alike get one size together at any price: the first ones take the larger, then."""
        less = [item for item in results if item.work < 0]
        more = [item for item in results if item.work > 0]
        if not less or not more:
            return []
        small = max(less, key=lambda b: b.work)
        large = min(more, key=lambda b: b.work)
        bounds = [[i for i, (a, b) in enumerate(pairwise(item.sizes)) if a != b] for item in (small, large)]
        if bounds[0] != bounds[1]:
            return []
        rows = zip(small.sizes, large.sizes, strict=True)
        pairs = list(rows)
        layers = len(small.sizes[0])
        return [self._measured([b[:n] + a[n:] for a, b in pairs]) for n in range(1, layers)]

    def _priced(self, price: float) -> Budgets:
        cost, choice = (self.distances + price * self.work).min(-1)
        bounds = self._groups(cost.sum(-1).tolist())
        rows: list[tuple[int, ...]] = []
        for first, last in pairwise(bounds):
            sizes = tuple(self.sizes[i] for i in choice[first, last].tolist())
            rows += [sizes] * (self.cuts[last] - self.cuts[first])
        return self._measured(rows)

    def _measured(self, rows: list[tuple[int, ...]]) -> Budgets:
        given = torch.tensor(rows, dtype=torch.float64)
        total = float(self.wanted.sum())
        distance = float((given - self.wanted).abs().sum()) / total
        return Budgets(tuple(rows), float(given.sum()) / total - 1, distance)

    def _groups(self, cost: list[list[float]]) -> list[int]:
        """The cuts at which the cheapest groups begin and end."""
        last = len(self.cuts) - 1
        paths: list[dict[int, tuple[float, list[int]]]] = [{0: (0.0, [0])}]
        for _ in range(self.groups):
            reached: dict[int, tuple[float, list[int]]] = {}
            for end in range(1, last + 1):
                options = [
                    (spent + cost[begin][end], [*path, end])
                    for begin, (spent, path) in paths[-1].items()
                    if begin < end
                ]
                if options:
                    reached[end] = min(options)
            paths.append(reached)
        return min(layer[last] for layer in paths if last in layer)[1]
