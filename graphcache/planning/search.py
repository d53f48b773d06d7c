"""`search`: the best plan that a profile promises for a speed-up, an error or a memory budget."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.planning.candidates import Candidate, candidates, pareto
from graphcache.planning.other_steps import at_steps
from graphcache.planning.profile import Profile


@dataclass(frozen=True)
class Found:
    """The chosen plan, the candidates that no other one beats in speed-up and error, fastest first, and all
    that were priced.

    `families` are the best plans of each family within the budget, best first; where plans were run, of
    those.
    """

    chosen: Candidate
    front: tuple[Candidate, ...]
    priced: tuple[Candidate, ...]
    families: tuple[Candidate, ...]

    @property
    def plan(self) -> Plan:
        return self.chosen.plan


Check = Callable[[Plan], float]
"""Runs a plan on the profiled samples: the root mean square error of their numbers."""


def search(
    profile: Profile,
    *,
    steps: int | None = None,
    handovers: Sequence[int] = (),
    speedup: float | None = None,
    max_error: float | None = None,
    max_bytes: int | None = None,
    check: Check | None = None,
    checked: int = 3,
    run: Callable[[Check, Sequence[Plan]], Iterable[float]] = map,
) -> Found:
    """Solve for a plan.

    Whole steps are skipped: every family of sites (all branches, ranges of blocks, the output, guidance's
    difference, all kinds of branches but one, of which some or all tokens are computed) has for every number
    of computed steps the set with the least estimated error, by dynamic programming, with coefficients fitted
    to the values kept.

    Args:
        profile: of the model that the plan is for.
        steps: of the plan's generations, if not as many as were profiled; see `at_steps`.
        handovers: steps at which another model takes over in these; with other numbers of steps the profile
            knows them but for rounding.
        speedup: at least this; of all plans that reach it the one with the least error is chosen.
        max_error: at most this root mean square error of a result's numbers; the fastest such plan is chosen.
        max_bytes: at most so many bytes cached, beside the others.
        check: corrects the estimates of the best candidates end to end.
        checked: how many of them at a time, until one meets `max_error`; for a speed-up, of different
            families.
        run: maps the check over plans; a cluster's map gives the same result.

    Raises:
        GraphCacheError: neither or both of speedup and max_error are given, or no plan meets them; the
            message says what the nearest gives.
    """
    if (speedup is None) == (max_error is None):
        raise GraphCacheError("give search() either speedup= or max_error=, and if needed max_bytes=")
    made = candidates(at_steps(profile, steps or profile.steps, handovers))
    if not made:
        raise GraphCacheError("a generation of one step has none to skip")
    known = [item for item in made if max_bytes is None or item.bytes <= max_bytes]
    if not known:
        least = min(made, key=lambda item: item.bytes)
        raise GraphCacheError(
            f"no plan keeps within {max_bytes:,} bytes; the smallest cache, of family {least.family}, takes "
            f"{least.bytes:,} bytes"
        )

    def order(item: Candidate) -> tuple[float, float]:
        speed, error = -item.speedup, item.known_error
        return (speed, error) if speedup is None else (error, speed)

    def allowed(item: Candidate) -> bool:
        if speedup is not None:
            return item.speedup >= speedup
        return max_error is not None and item.known_error <= max_error

    meeting = sorted(filter(allowed, known), key=order)
    if not meeting:
        raise _unmet(known, speedup, max_error)
    if check is not None:
        measured = _measured(_varied(meeting) if speedup else meeting, allowed, check, max(1, checked), run)
        known = measured + [item for item in known if item.plan not in [other.plan for other in measured]]
        meeting = sorted(filter(allowed, measured), key=order)
        if not meeting:
            raise _unmet(measured, speedup, max_error)
    return Found(meeting[0], pareto(known), tuple(made), tuple(_bests(meeting).values()))


def _bests(items: Iterable[Candidate]) -> dict[str, Candidate]:
    """The first of every family."""
    first: dict[str, Candidate] = {}
    for item in items:
        first.setdefault(item.family, item)
    return first


def _varied(items: Sequence[Candidate]) -> list[Candidate]:
    """The best of every family first, since estimates compare plans of one family best."""
    first = _bests(items)
    return [*first.values(), *(item for item in items if item is not first[item.family])]


def _measured(
    meeting: Sequence[Candidate],
    allowed: Callable[[Candidate], bool],
    check: Check,
    checked: int,
    run: Callable[[Check, Sequence[Plan]], Iterable[float]],
) -> list[Candidate]:
    """The best candidates with their errors, so many at a time, until one of them is allowed."""
    found: list[Candidate] = []
    for start in range(0, len(meeting), checked):
        best = meeting[start : start + checked]
        errors = run(check, [item.plan for item in best])
        for item, error in zip(best, errors, strict=True):
            found.append(replace(item, measured=math.inf if math.isnan(error) else error))
        if any(map(allowed, found)):
            break
    return found


def _unmet(known: Sequence[Candidate], speedup: float | None, max_error: float | None) -> GraphCacheError:
    if speedup is not None:
        nearest = max(known, key=lambda item: item.speedup)
        wanted = f"no plan is {speedup:g} times as fast"
    else:
        nearest = min(known, key=lambda item: item.known_error)
        wanted = f"no plan has an error of at most {max_error:g}"
    return GraphCacheError(
        f"{wanted}; the nearest computes {len(nearest.computed)} of {nearest.plan.steps} steps "
        f"({nearest.family}): {nearest.speedup:.2f} times as fast, with "
        f"{'an estimated' if nearest.measured is None else 'a measured'} error of {nearest.known_error:.2g}"
    )
