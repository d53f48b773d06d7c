"""Plans that skip whole steps, with what a profile promises of each."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphcache.analysis.full_steps import (
    ComputedSteps,
    SiteProducts,
    best_steps,
    gap_errors,
    gap_squares,
    set_error,
    steadied,
)
from graphcache.analysis.handovers import turns
from graphcache.analysis.sensitivity import effect, fitted
from graphcache.ir.letter import Letter
from graphcache.ir.plan import COMPUTE, REUSE, Plan, Row
from graphcache.ir.selector import Selector
from graphcache.planning.pareto import unbeaten
from graphcache.planning.profile import Profile, Site, families, kinds

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


def _choices(tables: Sequence[SiteProducts]) -> Iterator[ComputedSteps]:
    """The best set of every size, with the error as it was measured."""
    squares = gap_squares(tables)
    handovers = tables[0].handovers
    errors, steady = (gap_errors(found, handovers) for found in (squares, steadied(squares, tables)))
    for choice in best_steps(steady, tables[0].steps - 1).values():
        yield replace(choice, error=set_error(errors, choice.steps))


def pareto(items: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other one beats in both speed-up and error, fastest first."""
    return unbeaten(items, lambda item: (-item.speedup, item.known_error))


def fitted_plan(profile: Profile, sites: Sequence[Site], computed: Sequence[int], entries: int) -> Plan:
    """Sites computed at some steps; at the others fitted on the latest `entries` values."""
    rows, histories = [], _histories(profile, computed, entries)
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


def _candidates(
    profile: Profile, family: str, sites: Sequence[Site], choice: ComputedSteps
) -> Iterator[Candidate]:
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
        for step, history in _histories(profile, computed, entries).items()
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


def _table(profile: Profile, site: Site) -> SiteProducts:
    place = profile.index(site.name)
    return SiteProducts(site.name, profile.gram[place], profile.effects[place], handovers=profile.handovers)


def _histories(profile: Profile, computed: Sequence[int], entries: int) -> dict[int, tuple[int, ...]]:
    """The newest computed steps before each other step, back to where its model took over."""
    turn = turns(profile.steps, profile.handovers)
    return {
        step: tuple(
            [item for item in computed if item < step and turn[item] == turn[step]][: -entries - 1 : -1]
        )
        for step in range(profile.steps)
        if step not in computed
    }


def _by_length(histories: dict[int, tuple[int, ...]]) -> Iterator[dict[int, tuple[int, ...]]]:
    """Histories of equal length together."""
    for length in {len(history) for history in histories.values()}:
        yield {step: history for step, history in histories.items() if len(history) == length}


def _rms(profile: Profile, error: float) -> float:
    """Root mean square of a result's numbers, of an error summed over all samples' numbers."""
    return math.sqrt(error / (profile.numbers * profile.effects.shape[-1]))
