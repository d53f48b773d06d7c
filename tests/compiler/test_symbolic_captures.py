"""Further sizes are filled in from one trace with symbols: the graph that tracing gives there, or none."""

import gc
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import graphcache
from counted import traces
from graphcache import Plan, presets
from graphcache.ir.graph import StepGraph, is_tensor, layout, value_of
from graphcache.ir.structure import structure
from inside import programs_of
from reference import assert_same
from sized import Sizes, subject
from tiny import TinyDiT, arguments, tiny

PLAN = presets.fora(2, interval=2)


@pytest.fixture(autouse=True)
def inference(captured_anew: None) -> Iterator[None]:
    with torch.no_grad():
        yield


def traced(model: nn.Module) -> str:
    """What the latest capture is."""
    step = programs_of(model)[-1].captured.step
    return structure(step.graph, step.root)


def described(step: StepGraph) -> list[object]:
    """What every value looks like, in the order of the graph."""
    return [layout(value_of(node)) for node in step.graph.nodes if is_tensor(node)]


SIZES: Mapping[str, Sequence[tuple[Sizes, str]]] = {
    "pixart": [
        ({}, "1+0"),
        ({"height": 12, "width": 16}, "2+0"),
        ({"batch": 3, "height": 4, "width": 20, "text": 5}, "2+1"),
        ({"batch": 4, "height": 6, "width": 10, "text": 77}, "2+1"),
        ({"batch": 1, "text": 9, "height": 4}, "2+2"),
        ({"batch": 1, "text": 4, "height": 10}, "2+2"),
    ],
    "sd3": [({}, "1+0"), ({"height": 6}, "2+0"), ({"text": 9}, "2+1"), ({"width": 4, "batch": 5}, "2+1")],
    "flux": [({}, "1+0"), ({"tokens": 36}, "2+0"), ({"batch": 3, "text": 7}, "2+1"), ({"text": 40}, "2+1")],
    "qwen_image": [
        ({}, "1+0"),
        ({"text": 9}, "2+0"),
        ({"text": 4, "height": 12, "width": 6}, "2+1"),
        ({"text": 7, "height": 10, "width": 4}, "2+1"),
    ],
    "wan": [({}, "1+0"), ({"frames": 5, "height": 12}, "2+0"), ({"text": 4, "width": 4}, "2+1")],
}


UNFIT = ("mochi", "cogvideox")
"""One computes the shape of a table from values, the other makes a size of one."""


@pytest.mark.few(1)
@pytest.mark.parametrize("sized", SIZES)
def test_a_trace_with_symbols_gives_what_tracing_gives(sized: str) -> None:
    on = subject(sized)
    options: Any = {"timestep": on.timestep}
    cached: Any = graphcache.transform(on.model, PLAN, **options)
    fixed = graphcache.transform(on.model, PLAN, **options, sizes="fixed")
    with traces() as made:
        found = []
        for sizes, expected in SIZES[sized]:
            calls = list(on.calls(sizes, PLAN.steps))
            found.append((calls, [cached(**call) for call in calls]))
            assert (sizes, str(made)) == (sizes, expected)
    for calls, results in found:
        assert_same(results, [fixed(**call) for call in calls])
    assert traced(cached) == traced(fixed)
    ours, theirs = (programs_of(run)[-1].captured.step for run in (cached, fixed))
    assert [branch.name for branch in ours.branches] == [branch.name for branch in theirs.branches]
    assert described(ours) == described(theirs)


@pytest.mark.few(1)
@pytest.mark.parametrize("unfit", UNFIT)
def test_what_is_not_right_with_symbols_is_traced_at_each_size(unfit: str) -> None:
    on = subject(unfit)
    cached: Any = graphcache.transform(on.model, PLAN, timestep=on.timestep)
    with traces() as found:
        for frames in (3, 2, 5, 4):
            for call in on.calls({"frames": frames}, 1):
                theirs = on.model(**call)
                assert_same(cached(**call)[0], theirs[0])
            cached.reset()
    assert str(found) == "4+1", "symbols are tried once"


class Weighted(TinyDiT):
    """Takes a size for a plain number."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x * (1 + len(range(x.shape[1]))), timestep, text)


def test_a_constant_that_was_a_size_serves_that_size_alone() -> None:
    cached: Any = graphcache.transform(tiny(1, Weighted), PLAN)
    with traces() as found:
        for tokens, expected in zip((3, 4, 4, 5, 6, 7, 8, 9), (1, 2, 2, 3, 4, 5, 6, 7), strict=True):
            for batch in (2, 3):
                cached.reset()
                call = arguments(tokens=tokens, batch=batch)
                assert_same(cached(**call), tiny(1, Weighted)(**call))
            assert found.fixed + found.any >= expected
    assert found.any <= 4


def test_traces_that_serve_their_own_call_alone_are_given_up() -> None:
    cached: Any = graphcache.transform(tiny(1, Weighted), PLAN)
    with traces() as found:
        for tokens in range(3, 10):
            cached.reset()
            cached(**arguments(tokens=tokens))
    assert str(found) == "5+2"


def test_bits_are_compared_beside_guards() -> None:
    """A trace that says nothing of a size that it made a constant of."""
    model = tiny(1, Weighted)
    cached: Any = graphcache.transform(model, PLAN)
    with patch.object(ShapeEnv, "evaluate_guards_expression", lambda *_: True):
        for tokens in (3, 4, 5, 6):
            cached.reset()
            call = arguments(tokens=tokens)
            assert_same(cached(**call), model(**call))


class Written(TinyDiT):
    """Takes a size for a word, which a trace with symbols does not notice."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x * {"6": 2.0, "7": 3.0}.get(f"{x.shape[1]}", 1.0), timestep, text)


def test_what_the_first_call_of_a_size_does_not_show_is_seen() -> None:
    model = tiny(1, Written)
    cached: Any = graphcache.transform(model, presets.compute(2))
    for tokens in (3, 4, 5, 6, 7):
        cached.reset()
        for t in (1.0, 0.5):
            call = arguments(t, tokens=tokens)
            call["x"] *= t < 1
            assert_same(cached(**call), model(**call))


def test_the_model_is_left_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    class Counting(TinyDiT):
        calls = 0

        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            self.calls += 1
            self.latest = x.shape
            return super().forward(x, timestep, text)

    model = tiny(1, Counting)
    cached: Any = graphcache.transform(model, PLAN)
    with caplog.at_level(logging.WARNING):
        for tokens in (3, 4, 5):
            cached.reset()
            cached(**arguments(tokens=tokens))
    assert "latest" not in model.__dict__
    assert model.calls == 0
    assert not [record for record in caplog.records if record.name.startswith("torch")]


class Looking(TinyDiT):
    """Looks up a size, which a symbol does not allow."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x * {x.shape[1]: 2}[x.shape[1]], timestep, text)


@pytest.mark.parametrize("kind", [TinyDiT, Looking])
def test_inputs_are_left_as_they_were(kind: type[TinyDiT]) -> None:
    """PyTorch marks tensors whose sizes become symbols, and takes marked ones for such from then on."""
    model = tiny(1, kind)
    cached: Any = graphcache.transform(model, PLAN)
    with traces() as found:
        for tokens in (3, 4, 5):
            call = arguments(tokens=tokens)
            cached.reset()
            assert_same(cached(**call), model(**call))
            assert [vars(given) for given in call.values()] == [{}] * 3
    assert found.any == 1


def test_other_weights_and_forms_are_traced_anew_and_old_ones_are_freed() -> None:
    model = tiny(1)
    cached: Any = graphcache.transform(model, PLAN)
    for tokens in (3, 4, 8):
        cached.reset()
        cached(**arguments(tokens=tokens))
    old = weakref.ref(model.blocks[0].out.weight)
    model.blocks[0].out = nn.Linear(4, 4, bias=False)
    with traces() as found:
        for tokens in (5, 6, 7):
            cached.reset()
            call = arguments(tokens=tokens)
            assert_same(cached(**call), model(**call))
    assert str(found) == "2+1"
    gc.collect()
    assert old() is None


def test_layouts_that_no_symbols_describe_are_traced_as_they_are() -> None:
    model = tiny(1)
    cached: Any = graphcache.transform(model, PLAN)
    with traces() as found:
        for tokens in (3, 4, 5, 6):
            call = arguments(tokens=tokens)
            call["x"] = call["x"].transpose(1, 2).contiguous().transpose(1, 2)
            cached.reset()
            assert_same(cached(**call), model(**call))
    assert str(found) == "4+0"


@pytest.mark.few(1)
@pytest.mark.parametrize("batch", [1, 2])
def test_halves_of_a_doubled_batch_are_filled_in_too(batch: int) -> None:
    """Of one sample, whose number has no symbol, and of more."""
    on = subject("pixart")
    plan = Plan.parse("plan steps=2 conditional=last\nguidance #.\n@mlp #.")
    cached: Any = graphcache.transform(on.model, plan, timestep=on.timestep)
    fixed: Any = graphcache.transform(on.model, plan, timestep=on.timestep, sizes="fixed")
    with traces() as found:
        for number, expected in zip((6, 9, 4, 11), ("2+0", "4+0", "4+2", "4+2"), strict=True):
            calls = doubled(on.calls({"batch": batch, "text": number}, 2))
            results = [cached(**call)[0] for call in calls]
            assert (number, str(found)) == (number, expected)
            assert_same(results, [fixed(**call)[0] for call in calls])
            found.fixed = int(expected[0])
    half, other = (programs_of(made)[-1].half for made in (cached, fixed))
    assert half is not None
    assert other is not None
    assert half.hoisted == other.hoisted, "nothing is computed at every step that need not be"


def doubled(calls: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Guidance's batch: the same latents twice, with other text."""
    first, *later = [{name: _twice(value) for name, value in call.items()} for call in calls]
    text = "encoder_hidden_states"
    first[text] = (
        first[text] * torch.tensor([0.5, 1.0]).repeat_interleave(len(first[text]) // 2)[:, None, None]
    )
    return [
        first,
        *({**first, "hidden_states": c["hidden_states"], "timestep": c["timestep"]} for c in later),
    ]


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else value


class Tabled(TinyDiT):
    """Has an argument of the batch's size that holds no samples."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, table: Tensor) -> Tensor:
        return super().forward(x + table.sum(0), timestep, text)


def test_which_inputs_carry_the_batch_is_found_out_once() -> None:
    cached: Any = graphcache.transform(
        tiny(1, Tabled), Plan.parse("plan steps=2 conditional=last\nguidance #.\n@mlp #."), sizes="fixed"
    )
    with traces() as found:
        for tokens, expected in ((3, "5+0"), (4, "7+0"), (5, "9+0")):
            call = {name: _twice(value) for name, value in arguments(tokens=tokens).items()}
            call["table"] = torch.randn(4, 4)
            for time in (1.0, 0.5):
                cached(**{**call, "timestep": torch.full((4,), time)})
            assert (tokens, str(found)) == (tokens, expected)
