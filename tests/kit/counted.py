"""Counts of what was traced and compiled, and plans that are lowered in different ways."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher

from graphcache import Plan, presets
from graphcache.compiler import captured, code
from graphcache.tracing import symbolic
from tiny import arguments

STEPS = 4
PLAN = presets.taylorseer(STEPS, interval=2)
PLANS: Mapping[str, Plan] = {
    "taylorseer": PLAN,
    "toca": presets.toca(STEPS),
    "range": Plan.parse("plan steps=4\nrange(0..1) #.#."),
    "fraction": Plan.parse("plan steps=4\na = tokens .5 by norm multiple=1\n@mlp #aa."),
    "packed": Plan.parse("plan steps=4\nl = linear8 weight=0.5\n@joint ##l.\n@mlp #.#."),
}


class Compilations:
    """How many graphs were compiled for one size, and how many for any."""

    def __init__(self) -> None:
        self.fixed = self.any = 0

    def since(self, run: Callable[[], Any]) -> tuple[int, int]:
        before = self.fixed, self.any
        run()
        return self.fixed - before[0], self.any - before[1]


@contextmanager
def compilations(eagerly: bool = True) -> Iterator[Compilations]:
    """`eagerly`: nothing but tracing with symbols is done, which asks what has to be known of them."""
    made, inductor, compiled = Compilations(), code.inductor, code.compiled

    def for_any(backend: Any, shapes: str, module: fx.GraphModule, examples: Sequence[Any]) -> Any:
        made.any += shapes == "from_graph"
        if not eagerly or shapes != "from_graph":
            return inductor(backend, shapes, module, examples)
        mode = next(example for example in examples if isinstance(example, Tensor)).fake_mode
        with mode, enable_python_dispatcher():
            fx.Interpreter(module).run(*examples)
        return module.forward

    def for_one(module: nn.Module, backend: Any, guarded: bool) -> Any:
        made.fixed += 1
        return module.forward if eagerly else compiled(module, backend, guarded)

    with patch.object(code, "inductor", for_any), patch.object(code, "compiled", for_one):
        yield made


class Traces:
    """How often a model was traced with its sizes as they are, and with symbols."""

    def __init__(self) -> None:
        self.fixed = self.any = 0

    def __str__(self) -> str:
        return f"{self.fixed}+{self.any}"


@contextmanager
def traces() -> Iterator[Traces]:
    made, fixed, any_ = Traces(), captured.capture, symbolic.capture

    def as_it_is(*args: Any, **kwargs: Any) -> Any:
        made.fixed += 1
        return fixed(*args, **kwargs)

    def with_symbols(*args: Any, **kwargs: Any) -> Any:
        made.any += 1
        return any_(*args, **kwargs)

    with patch.object(captured, "capture", as_it_is), patch.object(symbolic, "capture", with_symbols):
        yield made


def generation(model: Any, plan: Plan = PLAN, **sizes: int) -> list[Tensor]:
    call = arguments(**sizes)
    times = [torch.full_like(call["timestep"], 1 - step / plan.steps) for step in range(plan.steps)]
    return [model(**{**call, "timestep": time}) for time in times]
