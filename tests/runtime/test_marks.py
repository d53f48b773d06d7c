"""Under CUDA graphs a generation refuses to read what others may have overwritten; PyTorch's own count of
iterations is asked, while graphs and devices are stood in for.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import fx

import graphcache
from counted import generation
from graphcache import Plan, StateError, presets
from graphcache.runtime import marks
from reference import assert_same
from tiny import arguments, tiny

STEPS = 4
PLAN = presets.fora(STEPS, interval=2)
REFUSED = "another generation began since this one's last step"


class Replaying:
    """A compiler whose code would run as CUDA graphs on a device that has them."""

    config: Mapping[str, Any] = {"triton.cudagraphs": True}

    def __call__(self, module: fx.GraphModule, _: Sequence[Any]) -> Any:
        return module.forward


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "_on_cuda", lambda _: True)


def replayed(plan: Plan = PLAN) -> Any:
    return graphcache.transform(tiny(), plan, backend=Replaying())


def steps(model: Any) -> Iterator[Any]:
    """The calls of a generation, one at a time."""
    for step in range(STEPS):
        yield model(**arguments(t=1 - step / STEPS))


def in_turn(model: Any) -> tuple[Iterator[Any], Iterator[Any]]:
    def within(session: Any) -> Iterator[Any]:
        calls = steps(model)
        while True:
            with session:
                result = next(calls, None)
            if result is None:
                return
            yield result

    return within(model.session()), within(model.session())


@pytest.mark.usefixtures("on_cuda")
def test_of_two_sessions_in_turn_the_older_is_refused_and_the_newer_is_right() -> None:
    model = replayed()
    first, second = in_turn(model)
    next(first)
    results = [next(second)]
    with pytest.raises(StateError, match=f"step 1: {REFUSED}"):
        next(first)
    results += second
    expected = generation(graphcache.transform(tiny(), PLAN))
    assert_same(results, expected)
    assert_same(generation(model), expected)


@pytest.mark.usefixtures("on_cuda")
def test_the_callers_own_mark_is_seen() -> None:
    calls = steps(replayed())
    next(calls)
    torch.compiler.cudagraph_mark_step_begin()
    with pytest.raises(StateError, match="cudagraph_mark_step_begin"):
        next(calls)


@pytest.mark.usefixtures("on_cuda")
def test_generations_one_after_another_and_plans_that_keep_nothing_go_on() -> None:
    model = replayed()
    expected = generation(graphcache.transform(tiny(), PLAN))
    for _ in range(3):
        assert_same(generation(model), expected)
    for one, other in zip(*in_turn(replayed(presets.compute(STEPS))), strict=True):
        assert_same(one, other)


def test_where_nothing_is_recorded_sessions_may_take_turns() -> None:
    expected = generation(graphcache.transform(tiny(), PLAN))
    for results in zip(*zip(*in_turn(replayed()), strict=True), strict=True):
        assert_same(results, expected)
