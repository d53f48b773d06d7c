"""What a cached generation must give: a pipeline in which the reference interpreter runs the transformers.

The scheduler's steps are counted, and the calls within a step numbered: no timestep is read and no context is
looked at, so that nothing is told here the way the library tells it.
"""

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import graphcache
from graphcache import Plan
from graphcache.ir.call import Binder
from graphcache.ir.roles import Names
from graphcache.tracing.capture import forward_parameters
from pipelines import TinyPipeline
from reference import Reference, capture_call
from seeding import own_numbers

PlanFor = Callable[[int], Plan]
"""The plan for a schedule of this many steps."""


@functools.cache
@own_numbers
def untouched(tiny: TinyPipeline) -> Any:
    return tiny.make()


def fresh(tiny: TinyPipeline) -> Any:
    """A new pipeline with the models of the untouched one, so that captures can be shared."""
    pipe = tiny.make()
    for part, model in parts(untouched(tiny), tiny.parts).items():
        setattr(pipe, part, model)
    return pipe


def transformed(tiny: TinyPipeline, plan: Plan, **options: Any) -> Any:
    """Such a pipeline under a plan."""
    return graphcache.transform(fresh(tiny), plan, **tiny.options, **options)


def reference(
    tiny: TinyPipeline, plan_for: PlanFor, steps: int, stand_in: "type[StandIn] | None" = None, **call: Any
) -> Tensor:
    """A generation of `steps` steps in which every evaluation of a transformer follows the plan."""
    pipe = untouched(tiny)
    latents = tiny.options.get("latents", ())
    progress = Progress(pipe, tiny.start(steps), tiny.left_out, tiny.calls, latents)
    models = parts(pipe, tiny.parts)
    with progress.counted(), _replaced(pipe, models, plan_for, progress, stand_in or StandIn):
        result = tiny.generate(pipe, steps, **call)
    assert progress.step == progress.steps, "the entry's `start` is not where the pipeline begins"
    return result


@dataclass
class Progress:
    """The step of the schedule that a pipeline is at; its scheduler moves on once a step.

    `latents` are the denoiser's arguments that move with it, if they are not the first one alone.
    """

    pipe: Any
    step: int
    left_out: int = 0
    calls: int = 0
    latents: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.pipe.scheduler.timesteps) - self.left_out

    @contextmanager
    def counted(self) -> Iterator[None]:
        if self.calls:
            yield
            return
        original = self.pipe.scheduler.step

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.step += 1
            return result

        with patch.object(self.pipe.scheduler, "step", step):
            yield


@dataclass
class StandIn:
    """One transformer of a pipeline, for one generation: a reference interpreter for each of its branches."""

    model: nn.Module
    plan_for: PlanFor
    progress: Progress
    calls: Counter[int] = field(default_factory=Counter)
    branches: dict[int, tuple[Hashable, Reference]] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = self.progress.step
        branch = self.calls[now]
        self.calls[now] += 1
        if self.calls[now] == self.progress.calls:
            self.progress.step += 1
        latents = self.progress.latents
        binder = Binder(forward_parameters(self.model), Names.of(None, latents))
        bound = binder.bind(args, kwargs)
        key, tensors = binder.signature(bound)
        before, run = self.branches.get(branch, (None, None))
        if run is None or before != key or run.now != now:
            captured = capture_call(self.model, bound, "timestep" if "timestep" in bound else None, latents)
            run = Reference(captured, self.plan_for(self.progress.steps), now)
            self.branches[branch] = key, run
        return run([laid(*pair) for pair in zip(tensors, run.captured.strides, strict=True)])

    def module(self) -> nn.Module:
        """An instance of a same-named subclass with the model's own attributes, and this as its forward."""
        kind = type(self.model)
        made: nn.Module = object.__new__(type(kind.__name__, (kind,), {"forward": staticmethod(self)}))
        made.__dict__ = dict(self.model.__dict__)  # what is attached to this must not stay there
        return made


def laid(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor in the layout that was captured, whose views another one may not allow."""
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def parts(pipe: Any, attributes: Sequence[str] = ("transformer", "transformer_2")) -> dict[str, nn.Module]:
    """The denoisers of a pipeline, by attribute."""
    named = {name: getattr(pipe, name, None) for name in attributes}
    return {name: model for name, model in named.items() if isinstance(model, nn.Module)}


@contextmanager
def _replaced(
    pipe: Any, models: dict[str, nn.Module], plan_for: PlanFor, progress: Progress, stand_in: type[StandIn]
) -> Iterator[None]:
    try:
        for name, model in models.items():
            setattr(pipe, name, stand_in(model, plan_for, progress).module())
        yield
    finally:
        for name, model in models.items():
            setattr(pipe, name, model)
