"""Real pipelines of every family beside the reference interpreter in the same pipeline, bit for bit."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import graphcache
from pipelines import PIPELINES
from reference import assert_same
from reference_pipeline import parts, reference, shared_captures, untouched

STEPS = 6
compute = graphcache.presets.compute
fora = functools.partial(graphcache.presets.fora, interval=3)

# the scope puts the tests of one pipeline next to each other, where they share captures
pipelines = pytest.mark.parametrize("name", PIPELINES, scope="module")


@pytest.fixture(autouse=True, scope="module")
def _shared_captures() -> Iterator[None]:
    with shared_captures():
        yield


def transformed(name: str, plan: graphcache.Plan) -> Any:
    """A pipeline with the models of the untouched one, so that captures can be shared."""
    pipe = PIPELINES[name].make()
    for part, model in parts(untouched(PIPELINES[name])).items():
        setattr(pipe, part, model)
    return graphcache.transform(pipe, plan)


@functools.cache
def with_fora(name: str) -> Any:
    """One transformed pipeline for many tests: generations are independent of each other."""
    return transformed(name, fora(STEPS))


@pipelines
def test_the_reference_equals_the_pipeline_where_all_is_computed(name: str) -> None:
    tiny = PIPELINES[name]
    assert_same(reference(tiny, compute, steps=STEPS), tiny.generate(untouched(tiny), STEPS))


@pipelines
def test_a_plan_that_only_computes_changes_no_bit(name: str) -> None:
    tiny = PIPELINES[name]
    pipe = transformed(name, compute(STEPS))
    assert_same(tiny.generate(pipe, STEPS), tiny.generate(untouched(tiny), STEPS))


@pipelines
def test_fora_reuses_what_the_reference_reuses(name: str) -> None:
    tiny = PIPELINES[name]
    result = tiny.generate(with_fora(name), STEPS)
    assert_same(result, reference(tiny, fora, steps=STEPS))
    assert not torch.equal(result, tiny.generate(untouched(tiny), STEPS))


@pipelines
def test_a_second_generation_equals_the_first(name: str) -> None:
    first, second = (PIPELINES[name].generate(with_fora(name), STEPS) for _ in range(2))
    assert_same(second, first)


CALLS: tuple[dict[str, Any], ...] = (
    {"steps": STEPS, "batch": 2, "guided": False},
    {"steps": STEPS, "large": True},
    {"steps": 8},
    {"steps": STEPS},
)


@pipelines
def test_generations_of_one_pipeline_may_differ_in_everything(name: str) -> None:
    tiny, pipe = PIPELINES[name], with_fora(name)
    for call in CALLS:
        assert_same(tiny.generate(pipe, **call), reference(tiny, fora, **call))
