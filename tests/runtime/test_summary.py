"""`summary()` tells what happened: steps that were run, and no saving where nothing was reused."""

import math
from typing import Any

import pytest
import torch

import graphcache
from graphcache import presets
from reference import assert_same
from tiny import arguments, tiny

STEPS = 6


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def steps(cached: Any, numbers: range, context: str = "", seed: int = 0) -> None:
    numbers_of = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 4, generator=numbers_of)
    for step in numbers:
        with cached.cache_context(context, step_index=step, num_inference_steps=STEPS):
            cached(**{**arguments(1 - step / STEPS), "text": text})


def flops_of(block_steps: int, computed: int) -> float:
    """Of a tiny model of two blocks, counted by hand: (2, 3) tokens of width 4."""
    tokens, dim = 6, 4
    projections = 2 * tokens * dim * (3 * dim + dim + 2 * dim + 2 * dim)
    attention = 2 * 2 * 3 * tokens * dim
    # the time's projection in every step; that of the text once a generation
    return 2 * computed * (projections + attention) + block_steps * 2 * 2 * dim


def test_a_generation_that_has_just_begun_has_saved_nothing() -> None:
    cached: Any = graphcache.transform(tiny(2), presets.fora(STEPS, interval=3))
    steps(cached, range(1))
    (branch,) = cached.summary().branches
    assert branch.ideal_speedup == pytest.approx(1.0, abs=1e-9)
    assert [step.reused for step in branch.steps] == [0]


def test_the_saving_is_that_of_the_steps_that_were_run() -> None:
    cached: Any = graphcache.transform(tiny(2), presets.fora(STEPS, interval=3))
    for done, computed in ((1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)):
        cached.reset()
        steps(cached, range(done))
        (branch,) = cached.summary().branches
        once = 2 * 2 * 4 * 4  # the text's projection
        plain = (flops_of(1, 1) + once) * done
        assert branch.plain_flops == plain
        assert branch.flops == flops_of(done, computed) + once
        assert math.isclose(branch.ideal_speedup, branch.plain_flops / branch.flops)
        assert math.isclose(cached.summary().ideal_speedup, branch.ideal_speedup)


def test_branches_are_added_up() -> None:
    cached: Any = graphcache.transform(tiny(2), presets.fora(STEPS, interval=3))
    steps(cached, range(STEPS - 1), "one")
    steps(cached, range(1), "two", seed=1)
    one, two = cached.summary().branches
    assert one.ideal_speedup > 2 > two.ideal_speedup
    total = cached.summary().ideal_speedup
    assert total == (one.plain_flops + two.plain_flops) / (one.flops + two.flops)


def test_a_branch_that_began_anew_tells_of_all_its_steps() -> None:
    """What it computed again because it had missed a step counts."""
    cached: Any = graphcache.transform(tiny(2), presets.fora(STEPS, interval=3))
    steps(cached, range(2))
    steps(cached, range(3, 5))
    (branch,) = cached.summary().branches
    assert [step.step for step in branch.steps] == [0, 1, 3, 4]
    assert [step.reused for step in branch.steps] == [0, 4, 0, 4]
    cached.reset()
    steps(cached, range(2))
    steps(cached, range(4, 6))
    (branch,) = cached.summary().branches
    assert [step.computed for step in branch.steps] == [4, 0, 4, 0]


def test_a_plan_that_computes_everything_saves_what_is_hoisted_alone() -> None:
    model = tiny(2)
    cached: Any = graphcache.transform(model, presets.compute(STEPS))
    steps(cached, range(STEPS))
    (branch,) = cached.summary().branches
    assert branch.plain_flops - branch.flops == 2 * 2 * 4 * 4 * (STEPS - 1)
    assert sum(step.reused + step.skipped for step in branch.steps) == 0
    assert_same(cached(**arguments()), model(**arguments()))
