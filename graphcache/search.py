"""`search`: the best plan that a profile promises for a speed-up, an error or a memory budget."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphcache.analysis.full_steps import (
    Choice,
    Table,
    best_steps,
    gap_errors,
    set_error,
    steady_gap_errors,
)
from graphcache.analysis.sensitivity import effect, fitted
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.letter import Letter
from graphcache.ir.plan import COMPUTE, REUSE, Plan, Row
from graphcache.ir.selector import Selector
from graphcache.profile import Profile, Site, families, kinds

MOST_ENTRIES = 3
"""Values of a history that fitted coefficients combine at most."""
BUDGETS = (0.5, 0.25)
"""Shares of a branch's tokens that skipped steps may compute."""


@dataclass(frozen=True)
class Candidate:
    """A plan with what the profile promises of it.

    Attributes:
        family: what its skipped steps take from the cache.
        computed: steps computed whole.
        speedup: of the whole generation over the plain model, predicted.
        error: root mean square error of a result's numbers, estimated; measured once `measured` is set.
        bytes: the most that its caches hold.
        measured: root mean square error of the profiled samples, run end to end; None before.
    """

    plan: Plan
    family: str
    computed: tuple[int, ...]
    speedup: float
    error: float
    bytes: int
    measured: float | None = None

    @property
    def known_error(self) -> float:
        return self.error if self.measured is None else self.measured


@dataclass(frozen=True)
class Found:
    """The chosen plan, the candidates that no other one beats in speed-up and error, fastest first, and all
    that were priced."""

    chosen: Candidate
    front: tuple[Candidate, ...]
    priced: tuple[Candidate, ...]

    @property
    def plan(self) -> Plan:
        return self.chosen.plan


Check = Callable[[Plan], float]
"""Runs a plan on the profiled samples: the root mean square error of their numbers."""


def search(
    profile: Profile,
    *,
    speedup: float | None = None,
    max_error: float | None = None,
    max_bytes: int | None = None,
    max_phases: int = 4,
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
        speedup: at least this; of all plans that reach it the one with the least error is chosen.
        max_error: at most this root mean square error of a result's numbers; the fastest such plan is chosen.
        max_bytes: at most so many bytes cached, beside the others.
        max_phases: at most so many different steps, each a compiled graph.
        check: corrects the estimates of the best candidates end to end.
        checked: how many of them at a time, until one meets `max_error`.
        run: maps the check over plans; a cluster's map gives the same result.

    Raises:
        GraphCacheError: neither or both of speedup and max_error are given, or no plan meets them; the
            message says what the nearest gives.
    """
    if (speedup is None) == (max_error is None):
        raise GraphCacheError("give search() either speedup= or max_error=, and if needed max_bytes=")
    made = candidates(profile)
    if not made:
        raise GraphCacheError("a generation of one step has none to skip")
    known = [
        item
        for item in made
        if _phases(item.plan) <= max_phases and (max_bytes is None or item.bytes <= max_bytes)
    ]
    if not known:
        least = min(made, key=lambda item: item.bytes)
        most = "any number of" if max_bytes is None else f"{max_bytes:,}"
        raise GraphCacheError(
            f"no plan keeps within {most} bytes and {max_phases} phases; the smallest cache, of family "
            f"{least.family}, takes {least.bytes:,} bytes, with {_phases(least.plan)} phases"
        )
    fits = (lambda item: item.speedup >= speedup) if speedup is not None else None

    def order(item: Candidate) -> tuple[float, float]:
        return (item.known_error, -item.speedup) if fits else (-item.speedup, item.known_error)

    def allowed(item: Candidate) -> bool:
        return fits(item) if fits else item.known_error <= max_error  # type: ignore[operator]

    meeting = sorted(filter(allowed, known), key=order)
    if not meeting:
        raise _unmet(known, speedup, max_error)
    if check is not None:
        measured = _measured(_varied(meeting) if fits else meeting, allowed, check, max(1, checked), run)
        known = measured + [item for item in known if item.plan not in [other.plan for other in measured]]
        meeting = sorted(filter(allowed, measured), key=order)
        if not meeting:
            raise _unmet(measured, speedup, max_error)
    return Found(meeting[0], pareto(known), tuple(made))


def _varied(items: Sequence[Candidate]) -> list[Candidate]:
    """The best of every family first, since estimates compare plans of one family best."""
    first: dict[str, Candidate] = {}
    for item in items:
        first.setdefault(item.family, item)
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


def candidates(profile: Profile) -> list[Candidate]:
    """For every family and number of computed steps the best plan by the profile's estimates."""
    found: list[Candidate] = []
    for family, sites in families(profile).items():
        for choice in _choices([_table(profile, site) for site in sites]):
            found.extend(_candidates(profile, family, sites, choice))
    found.extend(_partial_candidates(profile))
    if any(site.kind == "guidance" for site in profile.sites):
        found.extend(_guidance_candidates(profile))
    return found


def _choices(tables: Sequence[Table]) -> Iterator[Choice]:
    """The best set of every size, with the error as it was measured."""
    errors = gap_errors(tables)
    for choice in best_steps(steady_gap_errors(tables), tables[0].steps - 1).values():
        yield replace(choice, error=set_error(errors, choice.steps))


def pareto(items: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other one beats in both speed-up and error, fastest first."""
    front: list[Candidate] = []
    for item in sorted(items, key=lambda item: (-item.speedup, item.known_error)):
        if not front or item.known_error < front[-1].known_error:
            front.append(item)
    return tuple(front)


def fitted_plan(profile: Profile, sites: Sequence[Site], computed: Sequence[int], entries: int) -> Plan:
    """Sites computed at some steps; at the others fitted on the latest `entries` values."""
    rows, histories = [], _histories(profile.steps, computed, entries)
    actions = "".join("f" if step in histories else COMPUTE for step in range(profile.steps))
    for site in sites:
        gram = profile.gram[profile.index(site.name)]
        listed: dict[int, tuple[float, ...]] = {}
        for alike in _by_length(histories):
            weights = fitted(gram, list(alike), list(alike.values()))
            listed |= dict(zip(alike, map(tuple, weights.tolist()), strict=True))
        rows.append(Row(Selector.parse(site.name), actions, tuple(sorted(listed.items()))))
    letter = Letter("f", "fitted", (("order", entries - 1),))
    return Plan(profile.steps, (letter,), tuple(rows), conditional=profile.provenance.conditional)


def predicted_speedup(profile: Profile, family: str, computed: int) -> float:
    """Of a generation with so many computed steps, by measured steps where there are some, else by FLOPs."""
    return _speedup(profile, computed, skipped(profile, family))


def whole(profile: Profile) -> float:
    """The cost of a computed step, in seconds or in FLOPs."""
    return profile.timings.get("compute", float(profile.flops))


def skipped(profile: Profile, family: str) -> float:
    """The cost of a step that takes a family from the cache, in the same unit."""
    return profile.timings.get(family, whole(profile) * _skipped_flops(profile, family) / profile.flops)


def partly_skipped(profile: Profile, flops: float) -> float:
    """The cost of a step that takes all branches from the cache but for so many FLOPs of them."""
    return skipped(profile, "branches") + whole(profile) * flops / profile.flops


def _speedup(profile: Profile, computed: int, other: float) -> float:
    cost = whole(profile)
    plain = profile.timings.get("plain", cost)
    return profile.steps * plain / (computed * cost + (profile.steps - computed) * other)


def _skipped_flops(profile: Profile, family: str) -> int:
    if family == "guidance":
        return profile.flops // 2
    return profile.flops - sum(site.flops for site in families(profile)[family])


def _candidates(profile: Profile, family: str, sites: Sequence[Site], choice: Choice) -> Iterator[Candidate]:
    speedup = predicted_speedup(profile, family, len(choice.steps))
    kept = sum(site.bytes_kept for site in sites) * profile.calls
    for entries in range(2, MOST_ENTRIES + 1):
        error = choice.error
        if entries > 2:
            error = _refitted_error(profile, sites, choice.steps, entries)
        plan = fitted_plan(profile, sites, choice.steps, entries)
        yield Candidate(plan, family, choice.steps, speedup, _rms(profile, error), kept * (entries + 1))


def _partial_candidates(profile: Profile) -> Iterator[Candidate]:
    """Skipped steps that compute one kind of branch, all of its tokens or some, and forecast the others."""
    groups = kinds(profile)
    for kind, sites in groups.items() if len(groups) > 1 else ():
        others = [site for group in groups.values() if group is not sites for site in group]
        yield from _partly_computed(profile, f"branches but {kind}", others, sites, 1.0)
        if all(site.token_bytes for site in sites):
            for share in BUDGETS:
                yield from _partly_computed(profile, f"branches, {share:g} of {kind}", others, sites, share)


def _partly_computed(
    profile: Profile, family: str, forecast: Sequence[Site], computed: Sequence[Site], share: float
) -> Iterator[Candidate]:
    """Some sites forecast at skipped steps; of the others a share of the tokens is computed."""
    tables = [_table(profile, site) for site in forecast]
    kept = 3 * sum(site.bytes_kept for site in forecast)
    if share < 1:
        # of tokens taken at random; the cached ones are as old as the newest whole step, at most
        tables += [_table(profile, site).reusing(1 - share) for site in computed]
        kept += 2 * sum(site.token_bytes for site in computed)
    other = partly_skipped(profile, share * sum(site.flops for site in computed))
    for choice in _choices(tables):
        plan = fitted_plan(profile, forecast, choice.steps, 2)
        if share < 1:
            plan = _with_tokens(plan, computed, choice.steps, share)
        speedup = _speedup(profile, len(choice.steps), other)
        yield Candidate(
            plan, family, choice.steps, speedup, _rms(profile, choice.error), kept * profile.calls
        )


def _with_tokens(plan: Plan, sites: Sequence[Site], computed: Sequence[int], share: float) -> Plan:
    """The plan with these sites on a budget of tokens at the other steps."""
    letter = Letter("a", "tokens", (("count", share), ("by", "random")))
    actions = "".join(COMPUTE if step in computed else letter.symbol for step in range(plan.steps))
    rows = tuple(Row(Selector.parse(site.name), actions) for site in sites)
    return replace(plan, letters=(*plan.letters, letter), rows=(*plan.rows, *rows))


def _refitted_error(profile: Profile, sites: Sequence[Site], computed: Sequence[int], entries: int) -> float:
    """The estimate of `gap_errors` with longer histories, within the window."""
    near = {
        step: tuple(item for item in history if step - item <= profile.window)
        for step, history in _histories(profile.steps, computed, entries).items()
    }
    found = np.zeros((profile.steps, *profile.effects.shape[-2:]))
    for site in sites:
        table = _table(profile, site)
        for alike in _by_length(near):
            steps, history = list(alike), list(alike.values())
            found[steps] += effect(table.effects, steps, history, fitted(table.gram, steps, history))
    gaps = np.add.reduceat(found, computed)
    return float((gaps**2).mean(axis=1).sum())


def _guidance_candidates(profile: Profile) -> Iterator[Candidate]:
    """One branch at the skipped steps, the other from the newest difference."""
    (site,) = (site for site in profile.sites if site.kind == "guidance")
    table = _table(profile, site)
    # of two calls the difference is as large as each one's result, and the first one's is kept for the other
    kept = 2 * site.bytes_kept * profile.calls**2
    steps = profile.steps
    for choice in _choices([table.reusing(1.0)]):
        actions = "".join(COMPUTE if step in choice.steps else REUSE for step in range(steps))
        conditional = profile.provenance.conditional
        plan = Plan(steps, rows=(Row(Selector.parse("guidance"), actions),), conditional=conditional)
        speedup = predicted_speedup(profile, "guidance", len(choice.steps))
        error = _rms(profile, choice.error)
        yield Candidate(plan, "guidance", choice.steps, speedup, error, kept)


def _table(profile: Profile, site: Site) -> Table:
    place = profile.index(site.name)
    return Table(site.name, profile.gram[place], profile.effects[place])


def _histories(steps: int, computed: Sequence[int], entries: int) -> dict[int, tuple[int, ...]]:
    """The newest computed steps before each other step."""
    return {
        step: tuple([item for item in computed if item < step][: -entries - 1 : -1])
        for step in range(steps)
        if step not in computed
    }


def _by_length(histories: dict[int, tuple[int, ...]]) -> Iterator[dict[int, tuple[int, ...]]]:
    """Histories of equal length together."""
    for length in {len(history) for history in histories.values()}:
        yield {step: history for step, history in histories.items() if len(history) == length}


def _rms(profile: Profile, error: float) -> float:
    """Root mean square of a result's numbers, of an error summed over all samples' numbers."""
    return math.sqrt(error / (profile.numbers * profile.effects.shape[-1]))


def _phases(plan: Plan) -> int:
    return len(set(zip(*(row.actions for row in plan.rows), strict=True)))


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
