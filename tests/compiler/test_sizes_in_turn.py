"""More sizes, prompt lengths and forms of a model than are kept: right, said, and not compiled again."""

import logging
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import graphcache
from graphcache import GraphCacheError, presets
from inside import programs_of
from reference import assert_same
from tiny import arguments, tiny

PLAN = presets.fora(4, interval=2)


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def generation(call: Any, tokens: int) -> list[Any]:
    kwargs = arguments(tokens=tokens)
    return [call(**{**kwargs, "timestep": torch.full((2,), 1 - 0.2 * step)}) for step in range(4)]


def said(caplog: pytest.LogCaptureFixture) -> int:
    return sum("return after their captures were dropped" in record.getMessage() for record in caplog.records)


@pytest.mark.few(1)
@pytest.mark.parametrize("sizes", [3, 4])
def test_what_returns_is_compiled_once_and_captured_while_there_is_room(
    sizes: int, caplog: pytest.LogCaptureFixture
) -> None:
    counter = CompileCounter()
    model = tiny(2)
    cached: Any = graphcache.transform(model, PLAN, backend=counter, signatures=3)
    plain = graphcache.transform(model, PLAN)
    for turn in range(3):
        for size in range(sizes):
            assert_same(generation(cached, 3 + size), generation(plain, 3 + size))
        assert counter.frame_count == 2 * sizes
        assert len(programs_of(cached)) == 3
        assert said(caplog) == (turn > 0 and sizes > 3), "once, at the second turn"


def test_other_weights_are_compiled_anew() -> None:
    """Compiled code holds the weights that it was made for; in place they may change."""
    counter = CompileCounter()
    model = tiny(2)
    cached: Any = graphcache.transform(model, PLAN, backend=counter)
    generation(cached, 3)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    assert_same(generation(cached, 3), generation(graphcache.transform(model, PLAN), 3))
    assert counter.frame_count == 2
    model.blocks[0].out = torch.nn.Linear(4, 4, bias=False)
    assert_same(generation(cached, 3), generation(graphcache.transform(model, PLAN), 3))
    assert counter.frame_count == 4
    assert len(programs_of(cached)) == 1


def test_code_for_other_modes_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    """What was compiled without gradients, or without autocast, has the same graph."""
    model = tiny(1)
    cached: Any = graphcache.transform(model, presets.fora(1), backend="aot_eager", signatures=1)
    plain = graphcache.transform(model, presets.fora(1))
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert_same(cached(**arguments()), plain(**arguments()))
    with torch.enable_grad():
        assert cached(**arguments()).requires_grad
    assert not cached(**arguments()).requires_grad
    assert said(caplog) == 1


def test_code_for_another_layout_or_without_gradients_is_not_taken() -> None:
    model = tiny(1)
    cached: Any = graphcache.transform(model, presets.fora(1), backend="aot_eager")
    with torch.enable_grad():
        model.requires_grad_(False)
        assert not cached(**arguments()).requires_grad
        assert cached(**{**arguments(), "x": arguments()["x"].requires_grad_()}).requires_grad
        model.requires_grad_(True)
        assert cached(**arguments()).requires_grad
    weight = model.blocks[0].up.weight
    weight.data = weight.data.t().contiguous().t()
    assert_same(cached(**arguments()), graphcache.transform(model, presets.fora(1))(**arguments()))


def test_a_backend_chosen_later_compiles_anew() -> None:
    first, second = CompileCounter(), CompileCounter()
    cached: Any = graphcache.transform(tiny(1), PLAN, backend=first)
    generation(cached, 3)
    cached.compile(backend=second)
    generation(cached, 3)
    assert (first.frame_count, second.frame_count) == (2, 2)


@pytest.mark.parametrize("signatures", [0, -1, True, 1.5])
def test_a_number_that_is_none_is_refused(signatures: Any) -> None:
    with pytest.raises(GraphCacheError, match="signatures="):
        graphcache.transform(tiny(), PLAN, signatures=signatures)


def test_a_memory_of_captures_does_not_grow(caplog: pytest.LogCaptureFixture) -> None:
    cached: Any = graphcache.transform(tiny(1), presets.fora(1), signatures=2)
    with caplog.at_level(logging.WARNING, "graphcache"):
        for size in range(12):
            cached(**arguments(tokens=2 + size))
    assert len(programs_of(cached)) == 2
    assert not said(caplog), "none of them returned"
