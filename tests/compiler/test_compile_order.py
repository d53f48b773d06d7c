"""Compiling before, after or around `transform`: the same results from the same graphs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import graphcache
from graphcache.ir.plan import Plan
from pipelines import PIPELINES
from reference import assert_same
from tiny import arguments, tiny

PLAN = Plan.parse("plan steps=4 preset=none\n* ##.#")
GRAPHS = 2
"""Computed, reused; what runs once per generation is not compiled."""

Order = Callable[[CompileCounterWithBackend], Any]


@pytest.fixture(autouse=True)
def inference() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def generation(model: Callable[..., Any]) -> list[Any]:
    kwargs = arguments()
    return [model(**{**kwargs, "timestep": torch.full((2,), t)}) for t in (1.0, 0.75, 0.5, 0.25)]


def blocks(model: nn.Module, backend: Any) -> None:
    """What diffusers' compile_repeated_blocks does."""
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend, fullgraph=True)


def compiled_after(counter: Any, compile_it: Callable[[Any, Any], None], run_first: bool = False) -> Any:
    model = graphcache.transform(tiny(2), PLAN)
    if run_first:
        generation(model)
    compile_it(model, counter)
    return model


def compiled_before(counter: Any, compile_it: Callable[[Any, Any], None]) -> Any:
    model = tiny(2)
    compile_it(model, counter)
    return graphcache.transform(model, PLAN)


def in_place(model: Any, backend: Any) -> None:
    model.compile(backend=backend, dynamic=True)


ORDERS: dict[str, Order] = {
    "backend=": lambda counter: graphcache.transform(tiny(2), PLAN, backend=counter),
    "transform(torch.compile(m))": lambda counter: graphcache.transform(
        torch.compile(tiny(2), backend=counter), PLAN
    ),
    "torch.compile(transform(m))": lambda counter: torch.compile(
        graphcache.transform(tiny(2), PLAN), backend=counter
    ),
    "m.compile(); transform(m)": lambda counter: compiled_before(counter, in_place),
    "transform(m).compile()": lambda counter: compiled_after(counter, in_place),
    "transform(m).compile() after a generation": lambda counter: compiled_after(counter, in_place, True),
    "blocks compiled before": lambda counter: compiled_before(counter, blocks),
    "blocks compiled after": lambda counter: compiled_after(counter, blocks),
    "blocks compiled after a generation": lambda counter: compiled_after(counter, blocks, True),
}


@pytest.mark.parametrize("order", ORDERS)
def test_in_any_order_the_same_graphs(order: str) -> None:
    expected = generation(graphcache.transform(tiny(2), PLAN))
    counter = CompileCounterWithBackend("aot_eager")
    model = ORDERS[order](counter)
    for _ in range(2):
        torch.testing.assert_close(generation(model), expected, rtol=1e-5, atol=1e-6)
        assert counter.frame_count == GRAPHS


def test_compiling_the_original_later_compiles_the_phases() -> None:
    model, counter = tiny(2), CompileCounterWithBackend("aot_eager")
    cached = graphcache.transform(model, PLAN)
    expected = generation(cached)
    model.compile(backend=counter)
    torch.testing.assert_close(generation(cached), expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == GRAPHS


def test_an_explicit_backend_is_used_instead_of_a_prior_one() -> None:
    prior, chosen = CompileCounterWithBackend("aot_eager"), CompileCounterWithBackend("aot_eager")
    generation(graphcache.transform(torch.compile(tiny(2), backend=prior), PLAN, backend=chosen))
    assert (prior.frame_count, chosen.frame_count) == (0, GRAPHS)


def test_what_compiled_the_model_is_asked_only_where_nothing_was_given() -> None:
    """Module.compile may have been called with what cannot be told."""
    model: Any = tiny(1)
    model._compiled_call_impl = lambda *args, **kwargs: None
    call = arguments()
    with pytest.raises(graphcache.CaptureError, match="what compiled the model cannot be told"):
        graphcache.transform(model, Plan(2))(**call)
    assert_same(graphcache.transform(model, Plan(2), backend="eager")(**call), tiny(1)(**call))


def test_a_region_around_the_model_keeps_its_own_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    cached = graphcache.transform(tiny(2), PLAN)
    expected = [2 * result for result in generation(cached)]
    region = torch.compile(lambda **kwargs: 2 * cached(**kwargs), backend=counter)
    for _ in range(2):
        torch.testing.assert_close(generation(region), expected, rtol=1e-5, atol=1e-6)
        assert counter.frame_count == GRAPHS + 1


def test_one_graph_around_all_phases_is_refused_with_advice() -> None:
    model = torch.compile(graphcache.transform(tiny(), PLAN), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"leave fullgraph out.*backend="):
        model(**arguments())


def test_a_compiled_forward_is_refused_with_advice() -> None:
    model = tiny()
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(graphcache.CaptureError, match="compile the model, not its forward"):
        graphcache.transform(model, PLAN)(**arguments())


def test_repeated_blocks_of_a_pipeline_before_and_after() -> None:
    tiny_pipe, plan = PIPELINES["flux"], graphcache.presets.fora(4)
    results, counts = [], []
    for order in ("backend", "before", "after"):
        torch._dynamo.reset()
        pipe, counter = tiny_pipe.make(), CompileCounterWithBackend("eager")
        if order == "before":
            pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
        graphcache.transform(pipe, plan, backend=counter if order == "backend" else None)
        if order == "after":
            pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
        results += [tiny_pipe.generate(pipe, 4) for _ in range(2)]
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_restore_gives_back_what_was_given(compiled: bool) -> None:
    model = tiny()
    given = torch.compile(model, backend="eager") if compiled else model
    twice = graphcache.transform(graphcache.transform(given, PLAN), PLAN)
    assert graphcache.restore(twice) is given
    assert graphcache.restore(given) is given
    assert graphcache.restore(torch.compile(twice, backend="eager")) is given


def test_copies_and_pickles_of_a_compiled_model_stay_right() -> None:
    cached = graphcache.transform(tiny(2), PLAN, backend="aot_eager")
    expected = generation(cached)
    assert_same(generation(copy.deepcopy(cached)), expected)


def twice(given: Any, backend: Any) -> None:
    """Two generations."""
    made = graphcache.transform(given, PLAN, backend=backend)
    for _ in range(2):
        generation(made)


@pytest.mark.parametrize(
    ("backend", "marks"),
    [
        ({"mode": "reduce-overhead"}, 2),
        ({"backend": "inductor", "options": {"triton.cudagraphs": True}}, 2),
        ("inductor", 0),
        ("eager", 0),
        (None, 0),
    ],
)
def test_a_generation_under_cuda_graphs_is_marked_once(
    backend: Any, marks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the mark every call would overwrite what the calls before it have cached."""
    seen: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: seen.append(1))
    twice(tiny(), backend)
    assert len(seen) == marks


def test_a_model_compiled_for_cuda_graphs_before_is_marked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: seen.append(1))
    twice(torch.compile(tiny(2), mode="reduce-overhead"), None)
    assert len(seen) == 2
