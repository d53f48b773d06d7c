"""What a cached generation must give: an untouched pipeline whose transformers are the reference interpreter.

It is told the step by the pipeline's scheduler and the branch by the order of the calls within a step, so that
it shares neither with the library: no timestep is read and no context is looked at.
"""

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from graphcache import Plan
from graphcache.capture import forward_parameters
from graphcache.ir.call import Binder
from graphcache.program import Captured
from pipelines import TinyPipeline
from reference import Reference, capture_call

PARTS = ("transformer", "transformer_2")

PlanFor = Callable[[int], Plan]
"""The plan for a schedule of this many steps."""


@functools.cache
def untouched(tiny: TinyPipeline) -> Any:
    return tiny.make()


def reference(tiny: TinyPipeline, plan_for: PlanFor, steps: int, **call: Any) -> Tensor:
    """A generation of `steps` steps in which every evaluation of a transformer follows the plan."""
    pipe = untouched(tiny)
    progress = Progress(pipe, tiny.start(steps))
    with progress.counted(), _replaced(tiny, pipe, plan_for, progress):
        result = tiny.generate(pipe, steps, **call)
    assert progress.step == progress.steps, "the entry's `start` is not where the pipeline begins"
    return result


@dataclass
class Progress:
    """The step of the schedule that a pipeline is at; its scheduler moves on once a step."""

    pipe: Any
    step: int

    @property
    def steps(self) -> int:
        return len(self.pipe.scheduler.timesteps)

    @contextmanager
    def counted(self) -> Iterator[None]:
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

    tiny: TinyPipeline
    part: str
    model: nn.Module
    plan_for: PlanFor
    progress: Progress
    calls: Counter[int] = field(default_factory=Counter)
    branches: dict[int, tuple[Hashable, Reference]] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = self.progress.step
        branch = self.calls[now]
        self.calls[now] += 1
        binder = Binder(forward_parameters(self.model))
        bound = binder.bind(args, kwargs)
        key, tensors = binder.signature(bound)
        before, run = self.branches.get(branch, (None, None))
        if run is None or before != key or run.now != now:
            captured = _captured(self.tiny, self.part, self.model, key, bound)
            run = Reference(captured, self.plan_for(self.progress.steps), now)
            self.branches[branch] = key, run
        return run(tensors)

    def module(self) -> nn.Module:
        """An instance of a same-named subclass with the model's own attributes, and this as its forward."""
        kind = type(self.model)
        made: nn.Module = object.__new__(type(kind.__name__, (kind,), {"forward": staticmethod(self)}))
        made.__dict__ = self.model.__dict__
        return made


@contextmanager
def _replaced(tiny: TinyPipeline, pipe: Any, plan_for: PlanFor, progress: Progress) -> Iterator[None]:
    models = {part: getattr(pipe, part, None) for part in PARTS}
    present = {part: model for part, model in models.items() if isinstance(model, nn.Module)}
    try:
        for part, model in present.items():
            setattr(pipe, part, StandIn(tiny, part, model, plan_for, progress).module())
        yield
    finally:
        for part, model in present.items():
            setattr(pipe, part, model)


_CAPTURES: dict[Hashable, Captured] = {}


def _captured(
    tiny: TinyPipeline, part: str, model: nn.Module, key: Hashable, bound: Mapping[str, Any]
) -> Captured:
    """A capture of the untouched model, made once a process."""
    place = tiny, part, key
    if place not in _CAPTURES:
        _CAPTURES[place] = capture_call(model, bound, "timestep")
    return _CAPTURES[place]
