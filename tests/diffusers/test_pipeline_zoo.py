"""Real pipelines of every family beside the reference interpreter in the same pipeline, bit for bit."""

import functools
from typing import Any

import pytest
import torch

import graphcache
from pipelines import PIPELINES
from reference import assert_same
from reference_pipeline import reference, transformed, untouched

STEPS = 6
compute = graphcache.presets.compute
fora = functools.partial(graphcache.presets.fora, interval=3)

# the scope puts the tests of one pipeline next to each other, where they share captures


def pipelines(test: Any) -> Any:
    """A test of some pipelines in each run."""
    return pytest.mark.few(5)(pytest.mark.parametrize("name", PIPELINES, scope="module")(test))


@functools.cache
def with_fora(name: str) -> Any:
    """One transformed pipeline for many tests: generations are independent of each other."""
    return transformed(PIPELINES[name], fora(STEPS))


@functools.cache
def plain(name: str) -> torch.Tensor:
    return PIPELINES[name].generate(untouched(PIPELINES[name]), STEPS)


@functools.cache
def expected(name: str, **call: Any) -> torch.Tensor:
    return reference(PIPELINES[name], fora, **call)


@pipelines
def test_the_reference_equals_the_pipeline_where_all_is_computed(name: str) -> None:
    assert_same(reference(PIPELINES[name], compute, steps=STEPS), plain(name))


@pipelines
def test_a_plan_that_only_computes_changes_no_bit(name: str) -> None:
    pipe = transformed(PIPELINES[name], compute(STEPS))
    assert_same(PIPELINES[name].generate(pipe, STEPS), plain(name))


@pipelines
def test_fora_reuses_what_the_reference_reuses(name: str) -> None:
    result = PIPELINES[name].generate(with_fora(name), STEPS)
    assert_same(result, expected(name, steps=STEPS))
    assert not torch.equal(result, plain(name))


@pipelines
def test_a_second_generation_equals_the_first(name: str) -> None:
    first, second = (PIPELINES[name].generate(with_fora(name), STEPS) for _ in range(2))
    assert_same(second, first)


CALLS: tuple[dict[str, Any], ...] = (
    {"steps": STEPS, "batch": 2, "guided": False},
    {"steps": 8, "large": True},
    {"steps": STEPS},
)


@pipelines
def test_generations_of_one_pipeline_may_differ_in_everything(name: str) -> None:
    for call in CALLS:
        assert_same(PIPELINES[name].generate(with_fora(name), **call), expected(name, **call))
