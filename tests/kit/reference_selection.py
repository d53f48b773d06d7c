"""Which tokens are chosen, said a second time: row by row and token by token, in Python's own numbers.

Two numbers are tied if rounding could have made the difference: if they differ by no more than 64 units in
the last place of a float32 of their size. A tie goes to the token, or to the cluster, with the lower number.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from graphcache.ir.letter import Letter
from graphcache.ir.schedule import Budget, Selection
from graphcache.ir.state import Choice
from graphcache.runtime.selection import SiteTokens

TIED = 64 * torch.finfo(torch.float32).eps
Vector = list[float]


def chosen(
    selection: Selection, tokens: SiteTokens, step: int, site: int, score: Tensor
) -> dict[int, Choice]:
    """The choice of every step of one site's cycle; `score` is as for the library."""
    by = selection.steps[0][1].option("by")
    if by == "cluster":
        return {at: _clusters(letter, tokens, step, site, score) for at, letter in selection.steps}
    if by in ("random", "stratified"):
        draw = _permuted if by == "random" else _stratified
        seed = int(selection.steps[0][1].option("seed"))
        rows = [
            draw(selection, drawn(seed, step, site, row, tokens.count), tokens) for row in range(tokens.rows)
        ]
    else:
        rows = [_ranked(selection, scores, tokens) for scores in score.double().tolist()]
        rows = rows * (tokens.rows // len(rows))
    none = torch.empty(0, dtype=torch.int64, device=tokens.device)
    steps = [at for at, _ in selection.steps]
    places = {
        at: torch.tensor([row[i] for row in rows], dtype=torch.int64, device=tokens.device)
        for i, at in enumerate(steps)
    }
    return {at: Choice(place, none) for at, place in places.items()}


def drawn(seed: int, step: int, site: int, row: int, count: int) -> Tensor:
    """A uniform number for each token, from a generator that this row of this site has at this step alone."""
    made = ((seed * 1_000_003 + step) * 1_000_003 + site) * 1_000_003 + row
    return torch.rand(count, generator=torch.Generator().manual_seed(made % 2**63))


def _permuted(selection: Selection, noise: Tensor, tokens: SiteTokens) -> list[list[int]]:
    values = noise.tolist()
    order = sorted(range(tokens.count), key=lambda token: (values[token], token))
    rows, first = [], 0
    for _, letter in selection.steps:
        budget = Budget.of(letter).among(tokens.count)
        rows.append(sorted(order[(first + i) % tokens.count] for i in range(budget)))
        first += budget
    return rows


def _stratified(selection: Selection, noise: Tensor, tokens: SiteTokens) -> list[list[int]]:
    """The parts of a stretch are computed in float32, as they would be with the noise itself."""
    rows = []
    for number, (_, letter) in enumerate(selection.steps):
        budget = Budget.of(letter).among(tokens.count)
        ends = [i * tokens.count // max(budget, 1) for i in range(budget + 1)]
        row = []
        for i in range(budget):
            part = (noise[i] + number / len(selection.steps)) % 1
            length = ends[i + 1] - ends[i]
            row.append(ends[i] + min(int(part * length), length - 1))
        rows.append(row)
    return rows


def _ranked(selection: Selection, score: Vector, tokens: SiteTokens) -> list[list[int]]:
    missed, rows = [0] * tokens.count, []
    for _, letter in selection.steps:
        budget = Budget.of(letter).among(tokens.count)
        stale = float(letter.option("staleness")) / (letter.option("period") or selection.cycle)
        total = [value + stale * count for value, count in zip(score, missed, strict=True)]
        best = _best(_with_bonus(total, letter, tokens), budget)
        rows.append(best)
        missed = [0 if token in best else count + 1 for token, count in enumerate(missed)]
    return rows


def _best(score: Vector, budget: int) -> list[int]:
    """Those clearly above the last one that there is room for; then, in order, those tied with it."""
    if budget == 0:
        return []
    last = sorted(score)[-budget]
    above = [token for token, value in enumerate(score) if value - last > TIED * abs(last)]
    tied = [token for token, value in enumerate(score) if abs(value - last) <= TIED * abs(last)]
    return sorted((above + tied)[:budget])


def _with_bonus(score: Vector, letter: Letter, tokens: SiteTokens) -> Vector:
    """The first of the best tokens of every block of the grid has its score raised."""
    side = int(letter.option("spread"))
    if side < 2:
        return score
    square = math.isqrt(tokens.count)
    _, height, width = tokens.grid or (1, square, square)
    blocks: dict[tuple[int, int, int], list[int]] = {}
    for token in range(tokens.count):
        frame, place = divmod(token, height * width)
        blocks.setdefault((frame, place // width // side, place % width // side), []).append(token)
    raised = list(score)
    for block in blocks.values():
        top = max(score[token] for token in block)
        winner = next(token for token in block if top - score[token] <= TIED * abs(score[token]))
        raised[winner] *= 1 + float(letter.option("bonus"))
    return raised


def _clusters(letter: Letter, tokens: SiteTokens, step: int, site: int, value: Tensor) -> Choice:
    budget = Budget.of(letter).among(tokens.count)
    places, clusters = [], []
    for row, features in enumerate(value.double().view(tokens.rows, tokens.count, -1).tolist()):
        noise = drawn(int(letter.option("seed")), step, site, row, tokens.count).tolist()
        order = sorted(range(tokens.count), key=lambda token: (noise[token], token))
        nearest, member = _means_of(features, [features[token] for token in order[:budget]])
        renamed = sorted(range(budget), key=lambda cluster: (nearest[cluster], cluster))
        places.append([nearest[cluster] for cluster in renamed])
        clusters.append([renamed.index(cluster) for cluster in member])
    return Choice(torch.tensor(places).to(tokens.device), torch.tensor(clusters).to(tokens.device))


def _means_of(features: list[Vector], means: list[Vector]) -> tuple[list[int], list[int]]:
    """Four rounds of k-means; the token that stands for each cluster, and the cluster of each token.

    A cluster without tokens keeps its mean, and token 0 stands for it.
    """
    for _ in range(4):
        member = [_nearest_mean(token, means) for token in features]
        for cluster, mean in enumerate(means):
            own = [token for token, at in zip(features, member, strict=True) if at == cluster]
            means[cluster] = [math.fsum(parts) / len(own) for parts in zip(*own, strict=True)] or mean
    member = [_nearest_mean(token, means) for token in features]
    nearest = []
    for cluster, mean in enumerate(means):
        own = [place for place, at in enumerate(member) if at == cluster]
        away = [math.dist(features[place], mean) for place in own]
        nearest.append(own[_first_least(away, [math.hypot(*mean)] * len(own))] if own else 0)
    return nearest, member


def _nearest_mean(token: Vector, means: Sequence[Vector]) -> int:
    return _first_least([math.dist(token, mean) for mean in means], [math.hypot(*mean) for mean in means])


def _first_least(away: Vector, sizes: Vector) -> int:
    """The first distance that rounding could have made the least; it rounds as what it is measured from."""
    least = min(away)
    pairs = zip(away, sizes, strict=True)
    return next(i for i, (far, size) in enumerate(pairs) if far - least <= TIED * (far + size))
