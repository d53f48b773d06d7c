"""How far each token of a site moves from a step to the next, and whether its length foretells that."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from graphcache.compiler.exchanges import total
from graphcache.ir.ranks import Ranks
from graphcache.planning.holdings import Holding
from graphcache.runtime.session import CallSlot

Some = tuple[Tensor, Tensor]
"""Of all tokens those that are looked at, one out of every stretch, and the stretches' sizes."""


@dataclass
class Moves:
    """The moves of one generation.

    Attributes:
        steps: evaluations of a branch.
        mesh: the ranks that share every evaluation. Of each token they exchange its length and how far it has
            moved, and so get the same numbers.
        drift: by site (tokens,), the sum over steps; see `Profile`.
        ranking: by site (steps,).
    """

    steps: int
    mesh: Sequence[Ranks] = ()
    drift: dict[str, np.ndarray] = field(default_factory=dict)
    ranking: dict[str, np.ndarray] = field(default_factory=dict)
    _last: dict[tuple[str, CallSlot], Tensor] = field(default_factory=dict)
    _parts: dict[Holding, "TokensOfPart"] = field(default_factory=dict)

    def saw(
        self, step: int, name: str, branch: CallSlot, value: Tensor, some: Some | None, held: Holding | None
    ) -> None:
        """Note a site's value (rows, tokens, channels), or the rank's part of it."""
        count = value.shape[1] if held is None else held.shape[1]
        part = None if held is None else self._part(held)
        places = None if some is None else some[0].to(value.device)
        own = places if places is None or part is None else part.among(places)
        value = (value if own is None else value.index_select(1, own)).detach().float()
        before = self._last.get((name, branch))
        self._last[name, branch] = value
        if before is None or before.shape != value.shape:
            return
        tensors = value, before, value - before
        if part is None:
            length, then, moved = (item.norm(dim=-1) for item in tensors)
        else:
            whole = total(torch.stack([part.squares(item, own) for item in tensors]), self.mesh).sqrt()
            length, then, moved = whole if places is None else whole.index_select(2, places)
        size = length.mean().clamp(min=1e-20)
        found = (moved.square().mean(dim=0).sqrt() / size).cpu().double().numpy()
        if some is not None:
            found = np.repeat(found, some[1].numpy())
        self.drift[name] = by_token([self.drift.get(name, np.zeros(count)), found])
        ranks = self.ranking.setdefault(name, np.zeros(self.steps))
        ranks[step] += _spearman(then, moved)

    def forget(self) -> None:
        """The next value of every site has moved from nowhere."""
        self._last.clear()

    def _part(self, held: Holding) -> "TokensOfPart":
        if held not in self._parts:
            self._parts[held] = TokensOfPart(held)
        return self._parts[held]


class TokensOfPart:
    """Which tokens a rank's part has, and which of their numbers are counted by it."""

    def __init__(self, held: Holding) -> None:
        self.shape = held.shape[:2]
        self.rows, self.tokens = (torch.tensor(held.entries(dim)) for dim in range(2))
        self.counted = held.counted(torch.ones(held.shape, dtype=torch.bool))

    def among(self, places: Tensor) -> Tensor:
        """Where the part has those of these tokens that it has."""
        return torch.isin(self.tokens.to(places.device), places).nonzero()[:, 0]

    def squares(self, value: Tensor, own: Tensor | None) -> Tensor:
        """The rank's share of every token's squared length, laid out as the whole: shares add up.

        `value` has all of the part's tokens, or those at `own`.
        """
        self.rows, self.tokens, self.counted = (
            item.to(value.device) for item in (self.rows, self.tokens, self.counted)
        )
        counted, tokens = self.counted, self.tokens
        if own is not None:
            counted, tokens = counted.index_select(1, own), tokens.index_select(0, own)
        whole = value.new_zeros(self.shape)
        whole[self.rows[:, None], tokens] = (value.square() * counted).sum(dim=-1)
        return whole


def by_token(tables: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of numbers of each token, of calls that have more of them or less."""
    found = np.zeros(max(map(len, tables)))
    for table in tables:
        found[: len(table)] += table
    return found


def _spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation over the last dimension, the mean over the first."""
    ranks = [item.argsort(dim=-1).argsort(dim=-1).double() for item in (one, other)]
    centred = [rank - rank.mean(dim=-1, keepdim=True) for rank in ranks]
    product = (centred[0] * centred[1]).sum(dim=-1)
    return float((product / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1)).clamp(min=1e-20)).mean())
