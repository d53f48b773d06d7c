"""What a profile promises of any plan."""

import math

import numpy as np

from graphcache.analysis.sensitivity import effect
from graphcache.ir.history import GUIDANCE, History
from graphcache.ir.plan import COMPUTE
from graphcache.planning.candidates import Candidate, partly_skipped, skipped, whole
from graphcache.planning.profile import Profile, families
from graphcache.planning.timeline import HOLD, Timeline

Source = tuple[tuple[int, ...], tuple[float, ...]]
"""Steps of the values that stand in for a site's, and their weights."""


def predicted(timeline: Timeline) -> Candidate | None:
    """Speed-up and error of a plan, predicted as those of searched ones are; None where they cannot be.

    The effects of neighbouring steps that take something from the cache add up with their signs, since they
    continue one another; stretches between them are taken for independent, as in `graphcache.candidates`.

    Not to be predicted: token budgets, guidance beside other sites or split in bands, sites that the profile
    did not measure, and values older than its window.
    """
    if timeline.unknown or not _is_linear(timeline):
        return None
    sources = {name: _sources(timeline, name) for name in timeline.symbols}
    squared, total = 0.0, np.zeros(timeline.profile.effects.shape[-2:])
    for step in range(timeline.plan.steps):
        taken = {name: line[step] for name, line in sources.items() if line[step] is not None}
        if not taken:
            squared, total = squared + _square(total), np.zeros_like(total)
        for name, source in taken.items():
            assert source is not None
            found = _effect(timeline.profile, name, step, source)
            if found is None:
                return None
            total = total + found
    numbers = timeline.profile.numbers * timeline.profile.effects.shape[-1]
    error = math.sqrt((squared + _square(total)) / numbers)
    return Candidate(timeline.plan, timeline.name, timeline.whole, speedup(timeline), error, timeline.peak)


def speedup(timeline: Timeline) -> float:
    """Over the plain model: measured steps where a whole family is taken from the cache, else by FLOPs."""
    profile = timeline.profile
    plain = profile.timings.get("plain", whole(profile))
    spent = sum(_cost(profile, {*timeline.taken(step)}) for step in range(profile.steps))
    return profile.steps * plain / spent if spent else float("inf")


def _cost(profile: Profile, taken: set[str]) -> float:
    if not taken:
        return whole(profile)
    sets = {family: {site.name for site in sites} for family, sites in families(profile).items()}
    for family, names in sets.items():
        if names == taken:
            return skipped(profile, family)
    flops = {site.name: site.flops for site in profile.sites} | {GUIDANCE: profile.flops // 2}
    branches = sets.get("branches", set())
    if taken <= branches:
        return partly_skipped(profile, sum(flops[name] for name in branches - taken))
    return whole(profile) * (1 - sum(flops[name] for name in taken) / profile.flops)


def _is_linear(timeline: Timeline) -> bool:
    if any(letter.is_tokens or letter.is_frequency for letter in timeline.plan.letters):
        return False
    others = {symbol for name, line in timeline.symbols.items() if name != GUIDANCE for symbol in line}
    return GUIDANCE not in timeline.symbols or not timeline.plan.is_guided or others <= {COMPUTE}


def _sources(timeline: Timeline, name: str) -> list[Source | None]:
    """What each step makes a site's value of; None where it computes it, or does without."""
    history: list[int] = []
    found: list[Source | None] = []
    for step, symbol in enumerate(timeline.symbols[name]):
        if step in timeline.profile.handovers:
            history.clear()
        letter = timeline.plan.letter(symbol)
        if symbol in (COMPUTE, HOLD):
            found.append(None)
        else:
            entries = (step, *history) if letter and letter.is_compute else tuple(history)
            read = [pair for pair in zip(entries, _weights(timeline, name, step), strict=False) if pair[1]]
            found.append((tuple(entry for entry, _ in read), tuple(weight for _, weight in read)))
        if symbol == COMPUTE or (letter and letter.is_compute):
            history.insert(0, step)
    return found


def _weights(timeline: Timeline, name: str, step: int) -> tuple[float, ...]:
    """Those of the history, newest first; of `linear8` the schedule has only the difference's."""
    phase, made = timeline.at(step)
    action = dict(phase.actions).get(History(name))
    if name == GUIDANCE or action is None or action.group < 0:
        return (1.0,)
    listed = made.coefficients[action.group]
    return (1 + listed[0], -listed[0]) if action.packed else listed


def _effect(profile: Profile, name: str, step: int, source: Source) -> np.ndarray | None:
    entries, weights = source
    if step - min(entries, default=step) > profile.window:
        return None
    return effect(profile.effects[profile.index(name)], step, entries, np.array(weights))


def _square(total: np.ndarray) -> float:
    return float((total**2).mean(axis=0).sum())
