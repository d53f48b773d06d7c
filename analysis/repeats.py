"""Stretches of a graph that compute the same over and over, as a model's blocks do."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx

from graphcache.ir.graph import layout

LEAST = 8
"""Operations that a stretch must have to be told from mere coincidence."""


@dataclass(frozen=True)
class Repeats:
    """`count` stretches of `period` operations each, from operation `first` on."""

    first: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        return self.first + self.period * self.count


def find_repeats(calls: Sequence[fx.Node]) -> list[Repeats]:
    """Those of a graph's operations that spare most of them, in order; cut where least is handed on."""
    known: dict[Any, int] = {}
    kinds = np.array([known.setdefault(_kind(node), len(known)) for node in calls], dtype=np.int64)
    return sorted(_within(calls, kinds, 0, len(calls)), key=lambda item: item.first)


def _kind(node: fx.Node) -> Any:
    """What an operation does, whatever it is given."""
    arguments = fx.map_arg((node.args, node.kwargs), lambda other: _GIVEN)
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    layouts = tuple(layout(item) if isinstance(item, Tensor) else type(item) for item in values)
    return node.target, repr(arguments), layouts


class _Given:
    def __repr__(self) -> str:
        return "%"


_GIVEN: Any = _Given()


def _within(calls: Sequence[fx.Node], kinds: np.ndarray, low: int, high: int) -> Iterator[Repeats]:
    best = _longest(kinds[low:high])
    if best is None:
        return
    period, start, span = best
    found = _turned(calls, period, low + start, span)
    yield found
    yield from _within(calls, kinds, low, found.first)
    yield from _within(calls, kinds, found.stop, high)


def _longest(kinds: np.ndarray) -> tuple[int, int, int] | None:
    """Period, start and length of the repetition that spares most operations."""
    best, most = None, 0
    for period in range(LEAST, len(kinds) // 2 + 1):
        same = np.concatenate(([False], kinds[period:] == kinds[:-period], [False]))
        starts, stops = np.flatnonzero(same[1:] != same[:-1]).reshape(-1, 2).T
        spared = (stops - starts) // period * period
        if spared.size and spared.max() > most:
            longest = int(spared.argmax())
            span = int(stops[longest] - starts[longest]) + period
            best, most = (period, int(starts[longest]), span), int(spared[longest])
    return best


def _turned(calls: Sequence[fx.Node], period: int, start: int, span: int) -> Repeats:
    """The repetition with its stretches cut where the fewest values are handed on."""
    places = {node: place for place, node in enumerate(calls)}
    last = {node: max((places.get(user, len(calls)) for user in node.users), default=-1) for node in calls}

    def handed(offset: int) -> tuple[int, int, int]:
        cut = start + offset + period
        open_ = sum(last[node] >= cut for node in calls[start:cut])
        return open_, -((span - offset) // period), offset

    offset = min((o for o in range(period) if (span - o) // period > 1), key=handed, default=0)
    return Repeats(start + offset, period, (span - offset) // period)
