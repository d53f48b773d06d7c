"""Profiles of the linear model, and how much memory they take."""

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import graphcache
from graphcache import Profile
from graphcache.planning import profiling
from graphcache.planning.profile_memory import Needs
from linear import Sampler, linear


def profiled(
    mode: str | None = "first", samples: Sequence[int] = (5, 8, 2), depth: int = 1, **options: Any
) -> Profile:
    """Of three steps."""
    conditional = mode if mode in ("first", "last") else None
    options = {"sampler": Sampler(mode), "probes": 1, "conditional": conditional, **options}
    return graphcache.profile(linear(depth), samples, steps=3, **options)


@cache
def of_steps(steps: int, mode: str | None = "first") -> Profile:
    """Of two samples of so many steps, effects over all of them."""
    given: Any = {"conditional": mode, "window": steps - 1, "probes": 2}
    return graphcache.profile(linear(2), [1, 2], steps=steps, sampler=Sampler(mode), **given)


def needs(mode: str | None = None, **options: Any) -> Needs:
    """What profiling the linear model takes."""
    found: list[Needs] = []

    def noting(*given: Any, **named: Any) -> Needs:
        found.append(Needs.of(*given, **named))
        return found[0]

    with patch.object(profiling, "Needs", SimpleNamespace(of=noting)):
        profiled(mode, samples=(5,), **options)
    return found[0]


def levels(mode: str | None = None, **options: Any) -> dict[str, int]:
    """Bytes with which evaluations run again in stretches, at once, and not at all."""
    found = needs(mode, **options)
    enough = {n: found.fixed + found.branches + size for n, size in found.passing.items()}
    return {"little": min(enough[1], enough[2]), "enough": enough[0], "plenty": 1 << 24}
