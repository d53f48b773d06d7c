"""`transform`: a model that looks and behaves like the original and runs under a plan."""

import copy
import functools
import types
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch._dynamo.decorators import skip

from graphcache.compile import Backend, active_compilation, refuse_unknown, unwrapped
from graphcache.engine import Engine, Options, original
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.plan import Plan
from graphcache.report import Summary, summarise
from graphcache.session import Session

Target = TypeVar("Target")

PIPELINE_PARTS = ("transformer", "transformer_2")


class Transformed:
    """What a transformed model has beside everything of the original's class."""

    __slots__ = ()
    _graphcache: Engine

    @property
    def plan(self) -> Plan:
        """The plan that the model runs under."""
        return self._graphcache.options.plan

    def reset(self, start_step: int = 0, steps: int | None = None) -> None:
        """Forget the generation in progress.

        Args:
            start_step: the plan's step at which the next generation begins.
            steps: model evaluations of the generations to come, if they are not the plan's. A scheduler that
                drives the model knows both better.
        """
        self._graphcache.reset(start_step, steps)

    def session(self, scheduler: Any = None) -> AbstractContextManager[Session]:
        """Within it, calls of this thread or asyncio task have caches of their own, freed at its end.

        Args:
            scheduler: the one that drives these calls and tells the step; without one the timesteps do.
        """
        return self._graphcache.open_session(scheduler)

    def disabled(self) -> AbstractContextManager[Session]:
        """Within it the model runs as the original does; the first call ends a generation in progress."""
        return self._graphcache.surround(disabled=True)

    def cache_context(self, name: str, **fields: Any) -> AbstractContextManager[Session]:
        """Keep a cache of its own for the guidance branch `name`.

        Args:
            name: any; diffusers' pipelines say "cond", "uncond" or "cond_uncond".
            fields: diffusers' fields; `step_index` and `num_inference_steps` together tell the step to a
                model whose scheduler is not known.
        """
        return self._graphcache.surround(name=name, fields=fields)

    def summary(self) -> Summary:
        """What each step of the latest generation computed, reused and forecast, and the bytes held."""
        return summarise(self._graphcache.surroundings.session)

    def compile(self, **arguments: Any) -> None:
        """Compile every phase with torch.compile's arguments; each becomes one graph of static shapes."""
        refuse_unknown(arguments)
        self._graphcache.compile(arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with weights of its own, under the same plan and with an empty cache."""
        engine = self._graphcache
        _drop_empty_registry(engine.model)
        model = copy.deepcopy(engine.model, memo)
        return _wrap(model, engine.as_given, memo.get(id(engine.driver.pipe)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as the original and what `transform` was given."""
        engine = self._graphcache
        return _wrap, (engine.model, engine.as_given)


def transform(
    model_or_pipe: Target,
    plan: Plan,
    *,
    backend: Backend = None,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    timestep: str = "timestep",
    branches: int | None = None,
    wait: Literal["step", "never"] = "step",
    offload: bool = False,
) -> Target:
    """Make a model, or the transformers of a diffusers pipeline, run under a plan.

    Args:
        model_or_pipe: an nn.Module in eval mode, or a pipeline, whose `transformer` (and `transformer_2`)
            are replaced and whose scheduler tells the step. The original stays as it is; both share their
            weights.
        plan: what each site does at each step. For a generation with another number of steps a preset is
            evaluated anew, any other plan resampled; the log says so once.
        backend: None runs the graphs as they are, or compiles them with what the model was compiled with;
            "inductor" or any torch.compile backend compiles each phase as one graph; a mapping holds
            torch.compile's own keyword arguments. Under {"mode": "reduce-overhead"}, CUDA graphs, one
            generation at a time: the next one overwrites what this one has cached.
        example_inputs: arguments of one call. With them the capture happens now, and a plan that does not
            fit is an error now; without, at the first call.
        timestep: the name of forward's timestep argument, a tensor.
        branches: how many calls without a `cache_context` a step makes, each with a cache of its own. Needed
            only where no scheduler tells the step.
        wait: where no scheduler tells the step, "step" reads the timestep at each call, which waits for the
            device; "never" counts calls, so that generations must have as many as the plan, or begin with
            `reset`.
        offload: keep cached features in pinned host memory. Each is sent there once it is computed, and
            fetched while the site before the one that reads it runs. Differences of guidance stay on the
            device, and so does what tokens are written into.

    Returns:
        An instance of the model's class, or the pipeline.

    Raises:
        GraphCacheError: see above; the message says what to do.
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            f"plan is a {type(plan).__name__}, not a Plan; use graphcache.presets, Plan.parse or Plan.load"
        )
    _check_options(branches, wait)
    refuse_unknown(backend)
    options = Options(plan, backend, timestep, branches, wait == "step", offload)
    if isinstance(model_or_pipe, nn.Module):
        made: Any = _transformed(model_or_pipe, options)
        if example_inputs is not None:
            made._graphcache.prepare(example_inputs)
        return made  # type: ignore[no-any-return]
    for name, part in pipeline_parts(model_or_pipe).items():
        setattr(model_or_pipe, name, _transformed(part, options, model_or_pipe))
    return model_or_pipe


def restore(model_or_pipe: Target) -> Target:
    """Undo `transform`: the original model, or the pipeline with its original transformers.

    Raises:
        GraphCacheError: something else, such as accelerate's offloading, was put around the model since.
    """
    if isinstance(model_or_pipe, nn.Module):
        return _restored(model_or_pipe)  # type: ignore[return-value]
    for name, part in pipeline_parts(model_or_pipe).items():
        setattr(model_or_pipe, name, _restored(part))
    return model_or_pipe


def _check_options(branches: int | None, wait: str) -> None:
    if branches is not None and (isinstance(branches, bool) or not isinstance(branches, int) or branches < 1):
        raise GraphCacheError(f"branches={branches}: say how many calls a step makes, at least 1")
    if wait not in ("step", "never"):
        raise GraphCacheError(f"wait={wait!r}: must be 'step' or 'never'")
    if wait == "never" and (branches or 1) > 1:
        raise GraphCacheError(
            "branches= cannot be told apart without the timestep; leave wait= out, or wrap each call in "
            "model.cache_context(name)"
        )


def pipeline_parts(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline, by attribute."""
    parts = {name: getattr(pipe, name, None) for name in PIPELINE_PARTS}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if not found:
        raise GraphCacheError(f"{type(pipe).__name__} is neither a module nor a pipeline with a transformer")
    return found


def wrapped(model: nn.Module, engine: Engine) -> nn.Module:
    """A model that looks like another one and is run by an engine."""
    made = _subclassed(model)
    object.__setattr__(made, "_graphcache", engine)
    return made


def _transformed(given: nn.Module, options: Options, pipe: Any = None) -> nn.Module:
    model, prior = unwrapped(given)
    if options.backend is None and prior is not None:
        options = replace(options, backend=prior)
    made: Any = _wrap(original(model), options, pipe)
    made._graphcache.given = model._graphcache.given if isinstance(model, Transformed) else given
    return made  # type: ignore[no-any-return]


def _restored(model: nn.Module) -> nn.Module:
    engine = getattr(unwrapped(model)[0], "_graphcache", None)
    if not isinstance(engine, Engine):
        return model
    if engine.outer is not None:
        raise GraphCacheError(
            "the transformed model's forward was replaced since (accelerate's hooks do that); undo that first"
        )
    _drop_empty_registry(engine.model)
    return engine.given


def _drop_empty_registry(model: nn.Module) -> None:
    """Forget a registry of diffusers' hooks that a pipeline made for the result and never filled."""
    registry = model.__dict__.get("_diffusers_hook")
    if registry is not None and not registry.hooks:
        del model.__dict__["_diffusers_hook"]


def _untraced(function: Any) -> Any:
    """Keeps torch.compile out of a function but not of those that it calls."""
    # torch.compiler.disable(recursive=False) would fail while another thread exports
    skipped: Any = skip(function)
    skipped._torchdynamo_disable_msg = (
        "graphcache compiles each phase on its own: leave fullgraph out, or use transform(..., backend=)"
    )
    return skipped


class _Forward:
    """The forward of a transformed model: a descriptor, because one set on the instance would hide a method.

    What is set stands around the plan's own forward, as accelerate's offloading does.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        @functools.wraps(kind.forward)
        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            return _called(model._graphcache, args, kwargs)

        self.function = forward

    @_untraced
    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            return self.function
        outer = model._graphcache.outer
        return types.MethodType(self.function, model) if outer is None else _checked(model._graphcache, outer)

    def __set__(self, model: Any, value: Any) -> None:
        if getattr(value, "__func__", None) not in (self.function, self.function.__wrapped__):
            model._graphcache.outer = value
            return
        # a hook is removed: one that stood around the original is in the attributes shared with it
        model.__dict__.pop("forward", None)
        model._graphcache.outer = None

    def __delete__(self, model: Any) -> None:
        model._graphcache.outer = None


@_untraced
def _called(engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    backend = active_compilation()
    if backend is None:
        return engine(args, kwargs)
    if engine.backend is None:
        engine.compile(backend)
    outside: Any = torch.compiler.disable(engine.__call__)  # type: ignore[no-untyped-call]
    return outside(args, kwargs)


def _checked(engine: Engine, outer: Any) -> Any:
    """A forward that was set on the model, which has to come to the plan's in the end."""

    @functools.wraps(outer)
    def forward(*args: Any, **kwargs: Any) -> Any:
        before = engine.calls
        result = outer(*args, **kwargs)
        if engine.calls == before:
            raise GraphCacheError(
                "the forward that was set on the transformed model does not call the one it replaced, so no "
                "plan is applied; `del model.forward` gives the plan's back"
            )
        return result

    return forward


def _wrap(model: nn.Module, options: Options, pipe: Any = None) -> nn.Module:
    return wrapped(model, Engine(model, options, pipe))


def _subclassed(model: nn.Module) -> nn.Module:
    """An instance of a same-named subclass that shares the original's attributes, weights included."""
    kind = type(model)
    names = {
        "__slots__": ("_graphcache",),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "forward": _Forward(kind),
        # the class may be asked for further models, as from_pretrained does: those have no plan
        "__new__": lambda cls, *args, **kwargs: kind(*args, **kwargs),
        # not Module.__call__, which would run what original.compile() left in the shared attributes
        "__call__": nn.Module._call_impl,
    }
    wrapper: Any = type(kind.__name__, (Transformed, kind), names)
    made: nn.Module = object.__new__(wrapper)
    made.__dict__ = model.__dict__
    return made
