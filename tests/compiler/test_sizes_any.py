"""`sizes="any"`: one trace and one compilation of each phase, for the first size as for all others."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcache
from counted import PLAN, PLANS, compilations, generation, traces
from graphcache import Plan, presets
from graphcache.tracing.symbolic import Symbolic
from inside import programs_of
from reference import assert_same
from sized import subject
from tiny import TinyDiT, arguments, tiny

SIZES = (
    {"tokens": 3},
    {"tokens": 9},
    {"tokens": 4, "batch": 3},
    {"tokens": 2, "batch": 5},
    {"tokens": 17},
)


@pytest.fixture(autouse=True)
def inference(captured_anew: None) -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.few(1)
@pytest.mark.parametrize("regions", [False, True])
def test_the_first_size_is_served_as_all_others_are(regions: bool) -> None:
    model = tiny(6)
    plain = graphcache.transform(model, PLAN)
    with traces() as traced, compilations() as made:
        cached = graphcache.transform(model, PLAN, backend="inductor", sizes="any", regions=regions)
        for place, at in enumerate(SIZES):
            ours: list[Tensor] = []
            found = made.since(lambda at=at: ours.extend(generation(cached, **at)))  # noqa: B023
            assert found[0] == 0
            assert (found[1] > 0) == (not place)
            if not place:
                assert str(traced) == "0+1"
            theirs = generation(plain, **at)
            assert_same(ours, theirs)
    assert traced.any == 1 + 1, "the eager one, from its third size on"


def test_compiled_code_is_right_at_every_size() -> None:
    model = tiny(1)
    plain = graphcache.transform(model, PLAN)
    with compilations(eagerly=False) as made:
        cached = graphcache.transform(model, PLAN, backend="inductor", sizes="any")
        for at in SIZES:
            ours, theirs = (generation(run, **at) for run in (cached, plain))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (made.fixed, made.any) == (0, 2)


def test_halves_of_a_doubled_batch_are_for_any_size_too() -> None:
    plan = Plan.parse("plan steps=4 conditional=last\n@mlp #.#.\nguidance #.#.")
    model = tiny(2)
    plain = graphcache.transform(model, plan)
    with compilations() as made:
        cached = graphcache.transform(model, plan, backend="inductor", sizes="any")
        for place, at in enumerate(({"tokens": 3, "batch": 4}, {"tokens": 7, "batch": 6})):
            found = made.since(lambda at=at: generation(cached, plan, **at))
            assert found[0] == 0
            assert (found[1] > 0) == (not place)
            assert_same(generation(cached, plan, **at), generation(plain, plan, **at))


class Weighted(TinyDiT):
    """Takes a size for a plain number."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x * (1 + int(x.shape[1])), timestep, text)


def test_a_size_that_is_a_constant_is_fixed_and_the_others_are_not() -> None:
    cached: Any = graphcache.transform(tiny(1, Weighted), PLAN, backend="inductor", sizes="any")
    with compilations() as made:
        for tokens in (3, 4, 5):
            for batch in (2, 3, 4):
                cached.reset()
                call = arguments(tokens=tokens, batch=batch)
                assert_same(cached(**call), tiny(1, Weighted)(**call))
    assert made.fixed <= 2


def test_other_sizes_that_the_model_refuses_are_not_tried_on() -> None:
    """A model that takes no more than 8 tokens."""

    class Short(TinyDiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            if x.shape[1] > 8:
                raise ValueError("at most 8 tokens")
            return super().forward(x, timestep, text)

    plain = graphcache.transform(tiny(2, Short), PLAN)
    with compilations():
        cached = graphcache.transform(tiny(2, Short), PLAN, backend="inductor", sizes="any")
        for tokens in (8, 5, 2):
            assert_same(generation(cached, tokens=tokens), generation(plain, tokens=tokens))


def test_a_model_that_fails_at_other_sizes_serves_its_own() -> None:
    """It looks where tracing does not see: the trace says that every size will do."""

    class Alone(TinyDiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            if not torch.compiler.is_exporting() and x.shape[1] != 8:
                raise ValueError("8 tokens and no others")
            return super().forward(x, timestep, text)

    plain = graphcache.transform(tiny(2, Alone), PLAN)
    with compilations() as made:
        cached = graphcache.transform(tiny(2, Alone), PLAN, backend="inductor", sizes="any")
        assert_same(generation(cached, tokens=8), generation(plain, tokens=8))
    assert (made.fixed, made.any) == (2, 0)


def test_examples_elsewhere_are_told_apart() -> None:
    """No two sizes are changed by one factor, or by one number, and none becomes 1."""
    on = subject("wan")
    model: Any = graphcache.transform(on.model, presets.compute(1), timestep=on.timestep)
    model(**on.example())
    call = programs_of(model)[0].captured.call
    tensors = [on.example()[name] for name in call.leaf_names]
    trace = Symbolic.of(on.model, call, tensors)
    for smaller in (False, True):
        found = trace.elsewhere(tensors, smaller)
        assert found is not None
        others = found[1]
        pairs = {
            (new, old)
            for other, tensor in zip(others, tensors, strict=True)
            for new, old in zip(other.shape, tensor.shape, strict=True)
            if new != old
        }
        assert len({new / old for new, old in pairs}) == len({new - old for new, old in pairs}) == len(pairs)
        assert min(new for new, _ in pairs) > 1


DRAWN = {"pixart": "toca", "flux": "packed", "wan": "fraction", "sd3": "range"}


@pytest.mark.few(1)
@pytest.mark.parametrize("drawn", DRAWN)
def test_published_models_are_right_at_every_size(drawn: str) -> None:
    on, plan = subject(drawn), PLANS[DRAWN[drawn]]
    plain = graphcache.transform(on.model, plan, timestep=on.timestep)
    with compilations() as made:
        cached = graphcache.transform(on.model, plan, timestep=on.timestep, backend="inductor", sizes="any")
        for sizes in ({}, {"text": 9, "batch": 4}):
            for call in on.calls(sizes, plan.steps):
                assert_same(cached(**call), plain(**call))
    assert made.any
