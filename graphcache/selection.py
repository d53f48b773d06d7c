"""Which tokens the steps of a cycle compute, chosen once, where their site was computed whole."""

import math
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


@dataclass(frozen=True)
class Tokens:
    """The tokens of a site: how many rows of how many there are, where, and how they lie in the picture."""

    rows: int
    count: int
    device: torch.device
    grid: tuple[int, int, int] | None = None


def choose(
    selection: Selection, tokens: Tokens, step: int, site: int, score: Tensor | None = None
) -> dict[int, Choice]:
    """The choice of every step of a cycle.

    Nothing here waits for the device, and no row's choice depends on other rows.

    Args:
        selection: which steps, by which letters.
        tokens: of the site.
        step: at which the site was computed whole.
        site: its number among the model's sites; with seed, step and row it makes random numbers its own.
        score: of each token, (rows or half of them, tokens); of clusters the site's value (rows, tokens,
            channels). Half the rows: both halves of the batch take the same tokens.

    Raises:
        PlanError: a spread over the grid of tokens, which is not known.
    """
    letter = selection.steps[0][1]
    by = letter.option("by")
    if by == "cluster":
        assert score is not None
        letters = dict.fromkeys(item for _, item in selection.steps)
        made = {item: _clustered(item, score, tokens, step, site) for item in letters}
        return {number: made[item] for number, item in selection.steps}
    if by == "random":
        return _permuted(selection, _noise(letter, tokens, step, site))
    if by == "stratified":
        return _stratified(selection, _noise(letter, tokens, step, site))
    assert score is not None
    return _ranked(selection, score, tokens)


def _choice(places: Tensor) -> Choice:
    return Choice(places, places.new_empty(0))


def _noise(letter: Letter, tokens: Tokens, step: int, site: int) -> Tensor:
    """Uniform numbers (rows, tokens), each row from a generator of its own."""
    rows = []
    for row in range(tokens.rows):
        seed = 0
        for number in (int(letter.option("seed")), step, site, row):
            seed = (seed * _STRIDE + number) % 2**63
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(tokens.count, generator=generator))
    return torch.stack(rows).to(tokens.device, non_blocking=True)


def _permuted(selection: Selection, noise: Tensor) -> dict[int, Choice]:
    """Consecutive stretches of one random order: no token twice before every other one once."""
    order = noise.argsort(dim=1, stable=True)
    count = order.shape[1]
    twice = torch.cat([order, order], 1)
    choices, first = {}, 0
    for step, letter in selection.steps:
        budget = Budget.of(letter).among(count)
        choices[step] = _choice(twice[:, first : first + budget].sort(dim=1).values)
        first = (first + budget) % count
    return choices


def _stratified(selection: Selection, noise: Tensor) -> dict[int, Choice]:
    """One token from each of as many equal stretches as there are tokens to choose; another one each step."""
    count = noise.shape[1]
    choices = {}
    for number, (step, letter) in enumerate(selection.steps):
        budget = Budget.of(letter).among(count)
        bounds = torch.arange(budget + 1, device=noise.device) * count // max(budget, 1)
        lengths = bounds[1:] - bounds[:-1]
        part = (noise[:, :budget] + number / len(selection.steps)) % 1
        choices[step] = _choice(bounds[:-1] + (part * lengths).long().clamp(max=lengths - 1))
    return choices


def _ranked(selection: Selection, score: Tensor, tokens: Tokens) -> dict[int, Choice]:
    """The best ones, by their score and by the steps since they were computed."""
    rows, count = score.shape
    missed = torch.zeros_like(score)
    choices = {}
    for step, letter in selection.steps:
        budget = Budget.of(letter).among(count)
        total = score + float(letter.option("staleness")) * missed / selection.cycle
        total = _spread(total, letter, tokens)
        best = total.argsort(dim=1, descending=True, stable=True)[:, :budget].sort(dim=1).values
        choices[step] = _choice(best.repeat(tokens.rows // rows, 1))
        missed = (missed + 1).scatter(1, best, 0.0)
    return choices


def _spread(score: Tensor, letter: Letter, tokens: Tokens) -> Tensor:
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
    first = F.one_hot(blocks.argmax(-1), side * side)
    blocks = blocks * (1 + float(letter.option("bonus")) * first)
    squares = blocks.view(*blocks.shape[:-1], side, side)
    whole = squares.transpose(3, 4).reshape(whole.shape)
    return whole[:, :, :height, :width].reshape(score.shape)


def _grid(tokens: Tokens) -> tuple[int, int, int]:
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


def _clustered(letter: Letter, value: Tensor, tokens: Tokens, step: int, site: int) -> Choice:
    """k-means of the cached value; the token next to each mean stands for its cluster (ClusCa)."""
    budget = Budget.of(letter).among(tokens.count)
    features = value.float().view(tokens.rows, tokens.count, -1)
    start = _noise(letter, tokens, step, site).argsort(dim=1, stable=True)[:, :budget]
    means = features.gather(1, start[:, :, None].expand(-1, -1, features.shape[2]))
    for _ in range(_ROUNDS):
        member = F.one_hot(torch.cdist(features, means).argmin(2), budget).float()
        sizes = member.sum(1)[:, :, None]
        means = torch.where(sizes > 0, member.transpose(1, 2) @ features / sizes.clamp(min=1), means)
    apart = torch.cdist(features, means)
    member = apart.argmin(2)
    own = F.one_hot(member, budget).bool()
    nearest = apart.masked_fill(~own, math.inf).argmin(1)
    order = nearest.argsort(dim=1, stable=True)
    return Choice(nearest.gather(1, order), order.argsort(dim=1).gather(1, member))
