"""Weights that are kept elsewhere come to the device part by part, each while the part before runs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from graphcache.ir.home import Home
from graphcache.passes.transfer import ARRIVE, fetched


class Away(NamedTuple):
    """A weight that has to be fetched, and what stands for it in graphs."""

    home: Home
    stand_in: Tensor


class Arrivals:
    """Fetches what the parts of a graph read, in their order, into one call's table of values.

    Args:
        wanted: for each part that is the first to read any, the places of weights in the table.
        away: the weights by their places.
        values: the call's table.
    """

    def __init__(
        self, wanted: Mapping[int, Sequence[int]], away: Mapping[int, Away], values: list[Any]
    ) -> None:
        self._wanted, self._away, self._values = wanted, away, values
        self._order = iter(sorted(wanted))
        self._asked = self._ask()

    def _ask(self) -> tuple[int, list[Tensor]] | None:
        """Ask for the weights of the next part that reads any."""
        part = next(self._order, None)
        if part is None:
            return None
        return part, [fetched(*self._away[place]) for place in self._wanted[part]]

    def before(self, part: int) -> None:
        """Let what a part reads arrive, and ask for what is read next."""
        if self._asked is None or self._asked[0] != part:
            return
        made = self._asked[1]
        ARRIVE(made)
        for place, weight in zip(self._wanted[part], made, strict=True):
            self._values[place] = weight
        del made, weight
        self._asked = self._ask()
