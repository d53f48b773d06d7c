"""Modules that can neither be traced nor be called in a graph, and what is asked of those that can."""

import gc
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.utils._python_dispatch import TorchDispatchMode

import graphcache
from graphcache import CaptureError, Plan, PlanError, StateError, presets
from graphcache.ir.text import render
from reference import assert_same, capture_call
from untraced import DIM, Asking, Experts, Largest, Transformer, arguments, holding

FORA = presets.fora(4, interval=2)


class Deciding(Transformer):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = super().forward(x, timestep)
        return x if x.sum() > 0 else -x


def test_latents_that_decide_in_the_models_own_forward_are_refused() -> None:
    model = Deciding(Experts, 1).eval()
    with pytest.raises(CaptureError, match=r"test_modules.*\.py:\d+ in forward: `return x if x\.sum\(\) > 0"):
        graphcache.transform(model, FORA)(**arguments())


class Counted(Asking):
    """Keeps in a buffer how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x)


class CountedUnseen(Counted):
    def forward(self, x: Tensor) -> Tensor:
        self.calls.numpy()[...] += 1
        return Asking.forward(self, x)


class Drawing(Asking):
    def forward(self, x: Tensor) -> Tensor:
        torch.randn(1)
        return super().forward(x)


class Drifting(Asking):
    """Every other call gives another result."""

    turn = 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        return super().forward(x) + self.turn % 2


class Remembering(Asking):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


class OutsideOnly(Asking):
    """Fails within an operation, as what compiles may."""

    def forward(self, x: Tensor) -> Tensor:
        if any("custom_ops" in frame.filename for frame in traceback.extract_stack()):
            raise RuntimeError("not here")
        return super().forward(x)


IMPURE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "buffer": (Counted, r"changes 'blocks\.0\.inner\.calls'"),
    "buffer in numpy": (CountedUnseen, r"changes 'blocks\.0\.inner\.calls'"),
    "random": (Drawing, "draws random numbers"),
    "place": (OutsideOnly, r"fails within an operation \(RuntimeError: not here\)"),
    "state": (Drifting, "computes other bits when it is called again"),
    "memory": (Remembering, r"keeps 'blocks\.0\.inner\.last' from call to call"),
}


@pytest.mark.parametrize("kind", IMPURE)
def test_a_module_that_does_more_than_compute_is_refused(kind: str) -> None:
    make, why = IMPURE[kind]
    said = rf"cannot be traced.*Nor can it be called as it is: it {why}"
    model = holding(make, 1)
    with pytest.raises(CaptureError, match=said):
        graphcache.transform(model, FORA)(**arguments())


class Conditional(Asking):
    """PyTorch's conditional compiles what it runs, which PyTorch before 2.14 does not within an operation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.up, lambda given: self.up(given) * 2, (x,))[..., :DIM]


def test_a_conditional_is_refused_or_right() -> None:
    # PyTorch fails where another test has watched a cond
    torch._dynamo.reset()
    model = holding(Conditional, 1)
    plain = [model(**arguments(seed)) for seed in range(2)]
    made = graphcache.transform(model, presets.compute(2))
    try:
        told = [made(**arguments(seed)) for seed in range(2)]
    except CaptureError as error:
        told = str(error)
    if isinstance(told, str):
        assert "Nor can it be called as it is: it fails within an operation" in told
    else:
        assert_same(told, plain)


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.foreign_fault
def test_pytorchs_conditional_fails_for_good_where_its_operations_were_watched() -> None:
    def chosen(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda given: given * 2, lambda given: given * 3, (x,))

    torch._dynamo.reset()
    with Watching(), suppress(Exception):
        chosen(torch.ones(2))
    with pytest.raises(Unsupported):
        chosen(torch.ones(2))
    torch._dynamo.reset()
    assert_same(chosen(torch.ones(2)), torch.full((2,), 2.0))


class MeasuringItself(Transformer):
    def __init__(self) -> None:
        super().__init__(Asking, 1)
        self.measure = Largest()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep) / self.measure(x)  # type: ignore[no-any-return]


def test_a_number_made_of_values_that_reaches_the_models_own_forward() -> None:
    with pytest.raises(CaptureError, match=r"`return x\.abs.*Nor can module 'measure' be called as it is"):
        graphcache.transform(MeasuringItself().eval(), FORA)(**arguments())


class Growing(nn.Module):
    """Above a threshold that no test value reaches at capture it returns another shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True) if x.abs().max() > 1e4 else x


def test_a_result_of_another_shape_than_at_capture_is_an_error() -> None:
    model = holding(Growing, 1)
    model.blocks[0].norm = nn.Identity()  # type: ignore[assignment]
    cached = graphcache.transform(model, presets.compute(4))
    with torch.no_grad():
        cached(**arguments())
        given = arguments(1)
        with pytest.raises(CaptureError, match=r"module 'blocks\.0\.inner'.*returns float32 .*at capture"):
            cached(given["x"] * 1e8, given["timestep"])


def test_token_budgets_name_the_module() -> None:
    budget = "plan steps=4 preset=none\nk = tokens 2 by random multiple=1\n@mlp #k#k"
    with pytest.raises(PlanError, match=r"blocks\.0\.mlp: no token.*'blocks\.0\.inner'.*may mix"):
        graphcache.transform(holding(depth=1), Plan.parse(budget), example_inputs=arguments())


@pytest.mark.usefixtures("own_garbage")
def test_a_graph_that_outlives_its_capture_says_so() -> None:
    step = capture_call(holding(depth=1), arguments(), "timestep").step
    graph = step.module
    assert "opaque(blocks.0.inner, [%" in render(step)
    del step
    gc.collect()
    with pytest.raises(StateError, match=r"opaque call \d+ is gone with the capture that it belongs to"):
        graph(*arguments().values())
