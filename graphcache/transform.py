"""`transform`: a model that looks and behaves like the original and runs under a plan."""

import contextlib
import copy
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from graphcache.compile import Backend
from graphcache.engine import Engine, original
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.plan import Plan
from graphcache.report import Summary, summarise

Target = TypeVar("Target")

PIPELINE_PARTS = ("transformer", "transformer_2")


class Transformed:
    """What a transformed model has beside everything of the original's class."""

    __slots__ = ()
    _graphcache: Engine

    @property
    def plan(self) -> Plan:
        """The plan that the model runs under."""
        return self._graphcache.plan

    def reset(self, start_step: int = 0) -> None:
        """Forget the generation in progress; the next call is step `start_step` of a new one."""
        self._graphcache.reset(start_step)

    def summary(self) -> Summary:
        """What each step of the latest generation computed, reused and forecast, and the bytes held."""
        return summarise(self._graphcache)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the phases are what is compiled.

        Raises:
            GraphCacheError: always, with the way to compile.
        """
        raise GraphCacheError(
            "a transformed model compiles its phases itself: "
            "graphcache.transform(model, plan, backend='inductor')"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with weights of its own, under the same plan and with an empty cache."""
        engine = self._graphcache
        model = copy.deepcopy(engine.model, memo)
        return _wrap(model, engine.plan, engine.backend, engine.timestep)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as the original and what `transform` was given."""
        engine = self._graphcache
        return _wrap, (engine.model, engine.plan, engine.backend, engine.timestep)

    @contextlib.contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """Keep a cache of its own for the guidance branch `name`; diffusers' step fields are accepted."""
        with self._graphcache.in_branch(name):
            yield


def transform(
    model_or_pipe: Target,
    plan: Plan,
    *,
    backend: Backend = None,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    timestep: str = "timestep",
) -> Target:
    """Make a model, or the transformers of a diffusers pipeline, run under a plan.

    Args:
        model_or_pipe: an nn.Module in eval mode, or a pipeline, whose `transformer` (and `transformer_2`)
            are replaced. The original stays as it is; both share their weights.
        plan: what each site does at each step.
        backend: None runs the graphs as they are; "inductor" or any torch.compile backend compiles each
            phase as one graph; a mapping holds torch.compile's own keyword arguments.
        example_inputs: arguments of one call. With them the capture happens now, and a plan that does not
            fit is an error now; without, at the first call.
        timestep: the name of forward's timestep argument, a tensor.

    Returns:
        An instance of the model's class, or the pipeline.

    Raises:
        GraphCacheError: see above; the message says what to do.
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            f"plan is a {type(plan).__name__}, not a Plan; use graphcache.presets, Plan.parse or Plan.load"
        )
    if isinstance(model_or_pipe, nn.Module):
        made: Any = _wrap(model_or_pipe, plan, backend, timestep)
        if example_inputs is not None:
            made._graphcache.prepare(example_inputs)
        return made  # type: ignore[no-any-return]
    parts = [name for name in PIPELINE_PARTS if isinstance(getattr(model_or_pipe, name, None), nn.Module)]
    if not parts:
        raise GraphCacheError(
            f"{type(model_or_pipe).__name__} is neither a module nor a pipeline with a transformer"
        )
    for name in parts:
        setattr(model_or_pipe, name, _wrap(getattr(model_or_pipe, name), plan, backend, timestep))
    return model_or_pipe


def _forward_of(kind: type[nn.Module]) -> property:
    """The forward of a transformed model: a property, because one set on the instance would hide a method.

    Such a forward, in the attributes shared with the original, is refused at the next generation.
    """

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._graphcache(args, kwargs)

    def refuse(self: Any, value: Any) -> None:
        raise GraphCacheError(
            "a transformed model's forward cannot be replaced; change the original, and transform it again"
        )

    return property(lambda self: types.MethodType(forward, self), refuse)


def _wrap(model: nn.Module, plan: Plan, backend: Backend, timestep: str) -> nn.Module:
    """An instance of a same-named subclass that shares the original's attributes, weights included."""
    model = original(model)
    kind = type(model)
    names = {
        "__slots__": ("_graphcache",),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "forward": _forward_of(kind),
        # not Module.__call__, which would run what original.compile() left in the shared attributes
        "__call__": nn.Module._call_impl,
    }
    wrapper: Any = type(kind.__name__, (Transformed, kind), names)
    made: nn.Module = wrapper.__new__(wrapper)
    made.__dict__ = model.__dict__
    object.__setattr__(made, "_graphcache", Engine(model, plan, backend, timestep))
    return made
