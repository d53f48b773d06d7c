"""Which tokens the steps of a cycle compute, chosen once, where their site was computed whole.

Rounding decides nothing here. What differs by no more than `_TIED`, relative to the size of what is compared,
is tied, and of those tied the first one wins: the token that comes first, the cluster whose random start came
first. Tied with the best are those within reach of the best itself, so that a tie never hangs on where a
grid's lines lie. Random numbers are drawn on the CPU and compared as they are.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphcache.ir.errors import PlanError
from graphcache.ir.letter import Letter
from graphcache.ir.schedule import Budget, Selection
from graphcache.ir.state import Choice

_STRIDE = 1_000_003
_ROUNDS = 4
"""Of k-means; its clusters change little afterwards."""
_TIED = 2.0**-17
"""64 units in the last place of a float32: sums over thousands of channels, in any order, differ by less."""


@dataclass(frozen=True)
class SiteTokens:
    """The tokens of a site: how many rows of how many there are, where, and how they lie in the picture."""

    rows: int
    count: int
    device: torch.device
    grid: tuple[int, int, int] | None = None


def choose(
    selection: Selection, tokens: SiteTokens, step: int, sites: Sequence[int], scores: Sequence[Tensor]
) -> list[dict[int, Choice]]:
    """The choice of every step of a cycle, for each of several sites that differ in nothing else.

    Nothing here waits for the device, and no row's choice depends on other rows or sites. The sites are
    ordered together, because a sort of few tokens costs a device no more than its launch.

    Args:
        selection: which steps, by which letters.
        tokens: of each site.
        step: at which the sites were computed whole.
        sites: their numbers among the model's; with seed, step and row one makes random numbers its own.
        scores: of each site's tokens, (rows or half of them, tokens); of clusters the site's value (rows,
            tokens, channels). Half the rows: both halves of the batch take the same tokens. What is drawn at
            random looks at none.

    Raises:
        PlanError: a spread over the grid of tokens, which is not known.
    """
    letter = selection.steps[0][1]
    by = letter.option("by")
    if by == "cluster":
        pairs = zip(sites, scores, strict=True)
        return [_clusters(selection, value, tokens, step, site) for site, value in pairs]
    if by == "random":
        places = _permuted(selection, _noise(letter, tokens, step, sites))
    elif by == "stratified":
        places = _stratified(selection, _noise(letter, tokens, step, sites))
    else:
        places = _ranked(selection, torch.stack(list(scores)), tokens)
    none = torch.empty(0, dtype=torch.int64, device=tokens.device)
    return [
        {number: Choice(each[index], none) for number, each in places.items()} for index in range(len(sites))
    ]


def _noise(letter: Letter, tokens: SiteTokens, step: int, sites: Sequence[int]) -> Tensor:
    """Uniform numbers (sites, rows, tokens), each row from a generator of its own."""
    # from memory that is not pinned, the copy would wait for the device
    pinned = tokens.device.type == "cuda"
    drawn = torch.empty(len(sites), tokens.rows, tokens.count, pin_memory=pinned)
    for index, row in itertools.product(range(len(sites)), range(tokens.rows)):
        seed = 0
        for number in (int(letter.option("seed")), step, sites[index], row):
            seed = (seed * _STRIDE + number) % 2**63
        torch.rand(tokens.count, generator=torch.Generator().manual_seed(seed), out=drawn[index, row])
    return drawn.to(tokens.device, non_blocking=True)


def _permuted(selection: Selection, noise: Tensor) -> dict[int, Tensor]:
    """Consecutive stretches of one random order: no token twice before every other one once."""
    order = noise.argsort(stable=True)
    count = order.shape[-1]
    twice = torch.cat([order, order], -1)
    places, first = {}, 0
    for step, letter in selection.steps:
        budget = Budget.of(letter).among(count)
        places[step] = twice[..., first : first + budget].sort().values
        first = (first + budget) % count
    return places


def _stratified(selection: Selection, noise: Tensor) -> dict[int, Tensor]:
    """One token from each of as many equal stretches as there are tokens to choose; another one each step."""
    count = noise.shape[-1]
    places = {}
    for number, (step, letter) in enumerate(selection.steps):
        budget = Budget.of(letter).among(count)
        bounds = torch.arange(budget + 1, device=noise.device) * count // max(budget, 1)
        lengths = bounds[1:] - bounds[:-1]
        part = (noise[..., :budget] + number / len(selection.steps)) % 1
        places[step] = bounds[:-1] + (part * lengths).long().clamp(max=lengths - 1)
    return places


def _ranked(selection: Selection, score: Tensor, tokens: SiteTokens) -> dict[int, Tensor]:
    """The best ones, by their score and by the steps since they were computed."""
    score = score.float()
    _, rows, count = score.shape
    missed = torch.zeros_like(score)
    period = int(selection.steps[0][1].option("period")) or selection.cycle
    places = {}
    for step, letter in selection.steps:
        budget = Budget.of(letter).among(count)
        total = score + float(letter.option("staleness")) * missed / period
        best = _best(_spread(total, letter, tokens), budget)
        places[step] = best.repeat(1, tokens.rows // rows, 1)
        missed = (missed + 1).scatter(-1, best, 0.0)
    return places


def _best(score: Tensor, budget: int) -> Tensor:
    """The places of the largest scores, rising; of those tied with the last one chosen, the first."""
    last = score.sort(descending=True).values[..., max(budget, 1) - 1, None]
    reach = _TIED * last.abs()
    above = (score > last + reach).int() + (score >= last - reach).int()
    return above.argsort(descending=True, stable=True)[..., :budget].sort().values


def _first_least(cost: Tensor, reach: Tensor, dim: int) -> Tensor:
    """The place of the first value that is no larger than the least one by more than its reach."""
    tied = cost - reach <= cost.amin(dim, keepdim=True)
    return tied.int().argmax(dim)


def _spread(score: Tensor, letter: Letter, tokens: SiteTokens) -> Tensor:
    """The best token of each block of the grid counts for more (ToCa's fourth score, arXiv 2410.05317)."""
    side = int(letter.option("spread"))
    if side < 2:
        return score
    frames, height, width = _grid(tokens)
    margins = (0, -width % side, 0, -height % side)
    whole = F.pad(score.view(-1, frames, height, width), margins, value=-math.inf)
    frames, height_, width_ = whole.shape[1:]
    blocks = whole.view(-1, frames, height_ // side, side, width_ // side, side)
    blocks = blocks.transpose(3, 4).flatten(-2)
    first = F.one_hot(_first_least(-blocks, _TIED * blocks.abs(), -1), side * side)
    blocks = blocks * (1 + float(letter.option("bonus")) * first)
    squares = blocks.view(*blocks.shape[:-1], side, side)
    whole = squares.transpose(3, 4).reshape(whole.shape)
    return whole[:, :, :height, :width].reshape(score.shape)


def _grid(tokens: SiteTokens) -> tuple[int, int, int]:
    side = round(tokens.count**0.5)
    if tokens.grid is not None and tokens.count % (tokens.grid[1] * tokens.grid[2]) == 0:
        frames = tokens.count // (tokens.grid[1] * tokens.grid[2])
        return frames, tokens.grid[1], tokens.grid[2]
    if side * side == tokens.count:
        return 1, side, side
    raise PlanError(
        f"tokens spread over blocks: {tokens.count} tokens are no square; name their frames, height and "
        "width with grid= in the plan's header, or use spread=0"
    )


def _clusters(
    selection: Selection, value: Tensor, tokens: SiteTokens, step: int, site: int
) -> dict[int, Choice]:
    letters = dict.fromkeys(letter for _, letter in selection.steps)
    made = {letter: _clustered(letter, value, tokens, step, site) for letter in letters}
    return {number: made[letter] for number, letter in selection.steps}


def _clustered(letter: Letter, value: Tensor, tokens: SiteTokens, step: int, site: int) -> Choice:
    """k-means of the cached value; the token next to each mean stands for its cluster (ClusCa)."""
    budget = Budget.of(letter).among(tokens.count)
    # neither autocast nor TF32 narrows what is computed in float64
    features = value.detach().double().view(tokens.rows, tokens.count, -1)
    start = _noise(letter, tokens, step, [site])[0].argsort(dim=1, stable=True)[:, :budget]
    means = features.gather(1, start[:, :, None].expand(-1, -1, features.shape[2]))
    for _ in range(_ROUNDS):
        member = F.one_hot(_first_least(*_apart(features, means), 2), budget).to(features)
        sizes = member.sum(1)[:, :, None]
        means = torch.where(sizes > 0, member.transpose(1, 2) @ features / sizes.clamp(min=1), means)
    apart, reach = _apart(features, means)
    member = _first_least(apart, reach, 2)
    own = F.one_hot(member, budget).bool()
    nearest = _first_least(apart.masked_fill(~own, math.inf), reach, 1)
    order = nearest.argsort(dim=1, stable=True)
    return Choice(nearest.gather(1, order), order.argsort(dim=1).gather(1, member))


def _apart(features: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of every token from every mean, and by how much rounding may have changed it."""
    apart = torch.cdist(features, means)
    return apart, _TIED * (apart + means.norm(dim=2)[:, None])
