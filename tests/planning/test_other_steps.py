"""A profile at another number of steps: nearly what one at that number would say, where values are smooth."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import graphcache
from graphcache import GraphCacheError
from graphcache.planning.other_steps import at_steps
from linear import Sampler, linear
from profiled import of_steps as profiled
from strategies import QUICK


@pytest.mark.parametrize(("before", "after"), [(32, 16), (32, 12), (12, 17)])
def test_it_says_nearly_what_a_profile_of_so_many_steps_says(before: int, after: int) -> None:
    found, expected = at_steps(profiled(before), after), profiled(after)
    assert found.steps == after
    assert [site.name for site in found.sites] == [site.name for site in expected.sites]
    size = np.abs(expected.gram).max(axis=(1, 2), keepdims=True)
    assert np.abs(found.gram - expected.gram).max() < 0.1 * size.max()
    window = min(found.window, expected.window) + 1
    ours, theirs = found.effects[:, :, :window], expected.effects[:, :, :window]
    for place in range(len(found.sites)):
        scale = np.abs(theirs[place]).max()
        assert np.abs(ours[place] - theirs[place]).mean() < 0.1 * scale
        assert np.corrcoef(ours[place].ravel(), theirs[place].ravel())[0, 1] > 0.95


@given(steps=st.integers(2, 40))
@QUICK
def test_any_number_of_steps_is_a_profile(steps: int) -> None:
    found = at_steps(profiled(12), steps)
    assert found.gram.shape[1:] == (steps, steps)
    assert found.effects.shape[1] == steps
    assert 1 <= found.window < steps
    for step in range(steps):
        assert not found.effects[:, step, step + 1 :].any(), "nothing was there before the first step"
    assert np.isfinite(found.effects).all()
    assert np.linalg.eigvalsh(found.gram).min() >= -1e-6 * np.abs(found.gram).max()
    assert all(len(ranks) == steps for ranks in found.ranking.values())


def test_as_many_steps_change_nothing() -> None:
    assert at_steps(profiled(12), 12) is profiled(12)


def test_every_second_step_of_a_profile_is_taken_as_it_is() -> None:
    whole, half = profiled(32), at_steps(profiled(32), 16)
    np.testing.assert_allclose(half.gram, whole.gram[:, ::2, ::2])
    expected = whole.effects[:, ::2, ::2] * np.float32(2)
    np.testing.assert_allclose(half.effects, expected[:, :, : half.window + 1], rtol=1e-5)


def test_search_finds_plans_of_so_many_steps() -> None:
    found = graphcache.search(profiled(32), steps=16, speedup=1.5)
    assert found.plan.steps == 16
    assert found.chosen.speedup >= 1.5


@pytest.mark.parametrize(("steps", "words"), [(1, "says nothing of generations of 1"), (3, "larger window=")])
def test_too_few_steps_are_refused(steps: int, words: str) -> None:
    given: Any = {"conditional": "first", "window": 2}
    short = graphcache.profile(linear(1), [1], steps=12, sampler=Sampler("first"), **given)
    with pytest.raises(GraphCacheError, match=words):
        at_steps(short, steps)
