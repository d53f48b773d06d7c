"""Runs a pipeline's first generations both ways, and warns of those that do not keep the plan's promise."""

import functools
import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphcache.ir.errors import GraphCacheError, PromiseWarning
from graphcache.ir.plan import Plan
from graphcache.ir.promise import SAMPLER, Promise
from graphcache.runtime.closeness import decibels
from graphcache.runtime.likeness import equal_to
from graphcache.runtime.parts import twin
from graphcache.runtime.pipeline_call import called
from graphcache.tracing.rehearsal import random_states_kept

log = logging.getLogger("graphcache")

_KIND = "_graphcache_kind"
"""The attribute of a checked pipeline's class that holds its own one."""


def own_class(pipe: Any) -> Any:
    """The class that a pipeline has while nothing is checked."""
    return vars(type(pipe)).get(_KIND, type(pipe))


def end_checks(pipe: Any) -> None:
    """Give a pipeline its own class back."""
    if type(pipe) is not own_class(pipe):
        pipe.__class__ = own_class(pipe)


def refuse_unchecked(pipe: Any, plan: Plan, count: int) -> None:
    """Raise GraphCacheError unless a pipeline's calls can be held against the plan's promise."""
    if plan.promise is None:
        raise GraphCacheError(
            f"check={count}: the plan promises nothing; take one of graphcache.auto, or plan.promising(row."
            "promise) with a row of graphcache.compare. A plan that was changed has lost its promise"
        )
    if plan.promise.results == SAMPLER:
        raise GraphCacheError(
            f"check={count}: the plan promises how near the results of a sampler come, which a call of "
            f"{type(pipe).__name__} does not return; hold further samples against it with graphcache.compare"
        )
    if not {"output_type", "return_dict"} <= inspect.signature(own_class(pipe).__call__).parameters.keys():
        raise GraphCacheError(
            f"check={count}: {type(pipe).__name__} cannot be asked for tensors, as its call takes no "
            "output_type= and return_dict=; hold samples against the promise with graphcache.compare"
        )


def check_calls(pipe: Any, models: Sequence[Any], plan: Plan, count: int) -> None:
    """Check a pipeline's next `count` calls, whose results stay what they are.

    Until then its class is one like its own. A copy of the pipeline has the own class and is not checked.

    Args:
        models: the transformed ones that it holds.
        plan: with a promise.
    """
    assert plan.promise is not None
    check, kind = _Check(tuple(models), plan.promise, plan.steps, count), own_class(pipe)

    @functools.wraps(kind.__call__)
    def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        check.run(pipe, inspect.signature(kind.__call__).bind(pipe, *args, **kwargs).arguments)
        if check.done == count:
            end_checks(pipe)
        return kind.__call__(pipe, *args, **kwargs)

    def reduced(pipe: Any, protocol: Any) -> Any:
        function, given, *state = kind.__reduce_ex__(pipe, protocol)
        return function, tuple(kind if item is type(pipe) else item for item in given), *state

    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__call__": call,
        "__reduce_ex__": reduced,
        _KIND: kind,
    }
    pipe.__class__ = equal_to(kind)(kind.__name__, (kind,), names)


@dataclass
class _Check:
    """What is checked of a pipeline's calls, and how many were."""

    models: tuple[Any, ...]
    promise: Promise
    steps: int
    count: int
    done: int = 0

    def run(self, pipe: Any, given: Mapping[str, Any]) -> None:
        """Run a call's generation under the plan and without it, apart from the pipeline, and compare."""
        self.done += 1
        arguments = _without_callbacks(pipe, given) | {"output_type": self.promise.results}
        planned, steps = self._generated(pipe, arguments, disabled=False)
        if not steps:
            self._warn("was not compared: no call arrived at the model under the plan")
            return
        if steps != {self.steps}:
            self._warn(
                f"has {', '.join(map(str, sorted(steps)))} steps and was not compared: the plan's promise is "
                f"for {self.steps}, find a plan for as many with graphcache.auto"
            )
            return
        untouched, _ = self._generated(pipe, arguments, disabled=True)
        # unlike the least of a list, that of a tensor is NaN where any is
        reached = float(torch.tensor(decibels([planned], [untouched], self.promise.data_range)).amin())
        if reached >= self.promise.worst:
            log.info("generation %d of %d checked: %.2f dB, as promised", self.done, self.count, reached)
            return
        self._warn(
            f"comes to {reached:.2f} dB of the untouched model's result, and the plan promises "
            f"{self.promise}: take a slower plan, or one that graphcache.auto finds for samples, a size and "
            "settings as in this call; graphcache.restore(pipe) gives up the plan"
        )

    def _warn(self, text: str) -> None:
        warnings.warn(f"generation {self.done} of {self.count} {text}", PromiseWarning, stacklevel=4)

    def _generated(self, pipe: Any, arguments: Mapping[str, Any], disabled: bool) -> tuple[Tensor, set[int]]:
        """A generation's result, and of how many steps it was under the plan."""
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        with random_states_kept(devices), torch.no_grad(), ExitStack() as stack:
            for model in self.models:
                stack.enter_context(model.session())
                if disabled:
                    stack.enter_context(model.disabled())
            given = {name: _copied(value) for name, value in arguments.items()}
            result = called(own_class(pipe).__call__, twin(pipe), given)
            runs = [branch for model in self.models for branch in model.summary().branches]
        return result, {branch.plan_steps for branch in runs}


def _without_callbacks(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, but for the pipeline itself and what is called at every step."""
    parameters = inspect.signature(own_class(pipe).__call__).parameters
    named = dict(list(given.items())[1:])
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return {
        name: value
        for name, value in named.items()
        if not name.startswith("callback") and name != "return_dict"
    }


def _copied(value: Any) -> Any:
    """Tensors and generators as they are now, which a run may change."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value
