"""Profiling within a limit of memory: it is kept, and what is estimated then is right on the mean."""

from typing import Any

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from graphcache import GraphCacheError, Plan, Profile, presets
from graphcache.planning.profile_file import decode, encode
from graphcache.planning.timeline import meet
from linear import Sampler
from profiled import levels, needs, profiled

TOKENS = 64


def measured(memory: int = 1 << 30, **options: Any) -> Profile:
    options = {"sampler": Sampler(tokens=TOKENS), **options}
    return profiled(None, (5,), 2, memory=memory, **options)


def test_effects_of_some_tokens_are_right_on_the_mean() -> None:
    """For the same directions, over many choices of tokens; what is no branch is exact."""
    found = needs(None, depth=2, sampler=Sampler(tokens=TOKENS))
    quarter = found.fixed + min(found.passing.values()) + found.branches // 4
    differences = []
    for seed in range(24):
        exact, some = measured(seed=seed), measured(quarter, seed=seed)
        assert 0.2 < some.provenance.tokens < 0.3
        assert exact.provenance.tokens == 1
        branches = [site.kind == "branch" for site in exact.sites]
        others = np.logical_not(branches)
        np.testing.assert_array_equal(some.effects[others], exact.effects[others])
        np.testing.assert_array_equal(some.gram, exact.gram)
        differences.append((some.effects - exact.effects)[branches])
    found_mean, spread = np.mean(differences, axis=0), np.std(differences, axis=0)
    assert (spread[..., 0, 0, :] > 0).any()
    assert np.all(np.abs(found_mean) <= 4.5 * spread / np.sqrt(len(differences)) + 1e-6)
    scale = np.abs(np.stack([measured(seed=seed).effects[branches] for seed in range(3)])).mean()
    assert np.abs(found_mean).mean() < 0.3 * scale


@pytest.mark.parametrize("level", ["little", "enough", "plenty"])
def test_memory_changes_nothing_where_all_tokens_fit(level: str) -> None:
    memory = levels(None, depth=2)[level]
    one, other = (measured(at, sampler=Sampler()) for at in (memory, 1 << 30))
    np.testing.assert_array_equal(one.effects, other.effects)


def test_less_than_one_evaluation_needs_is_refused_with_what_would_do() -> None:
    least = needs(None, depth=2, sampler=Sampler(tokens=TOKENS)).least
    with pytest.raises(GraphCacheError, match=rf"memory={least - 1} is less than .* {least} bytes"):
        measured(least - 1)
    assert measured(least).provenance.tokens == pytest.approx(1 / 32, rel=0.1)


@pytest.mark.parametrize("mode", [None, "first", "calls"])
def test_steps_alone_cost_less_and_say_the_same(mode: str | None) -> None:
    whole, work = profiled(mode, samples=(5, 8)), []
    for samples in ((5,), (5, 8)):
        with FlopCounterMode(display=False) as counter:
            steps = profiled(mode, samples=samples, detail="steps", probes=None)
        work.append(counter.get_total_flops())
    assert steps.provenance.probes == 1
    assert {site.kind for site in steps.sites} == {"range", "output", *(["guidance"] if mode else [])}
    assert steps.drift == {}
    branches = [site for site in whole.sites if site.kind == "branch"]
    assert [site.name for site in steps.unmeasured] == [site.name for site in branches]
    again = decode(encode(steps))
    assert again.unmeasured == steps.unmeasured
    assert not whole.unmeasured
    for plan in (presets.fora(3), Plan.parse("plan steps=3 preset=none\nrange(0..0) ##.")):
        timelines = [meet("one", plan, profile) for profile in (again, whole)]
        assert timelines[0].held == timelines[1].held
        assert timelines[0].symbols == timelines[1].symbols
    for place, site in enumerate(steps.sites):
        np.testing.assert_array_equal(steps.effects[place], whole.effects[whole.index(site.name)])
    assert work[1] - work[0] <= 4 * steps.steps * steps.calls * steps.flops


def test_sites_are_profiled_without_their_tokens() -> None:
    sites, tokens = measured(detail="sites"), measured()
    assert sites.drift == {} == sites.ranking
    assert {site.name for site in tokens.sites if site.kind == "branch"} <= tokens.drift.keys()
    np.testing.assert_array_equal(sites.effects, tokens.effects)


def test_an_unknown_detail_is_refused() -> None:
    with pytest.raises(GraphCacheError, match="detail='all': known are steps, sites, tokens"):
        measured(detail="all")
