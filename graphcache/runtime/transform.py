"""`transform`: a model that looks and behaves like the original and runs under a plan."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from graphcache.compiler.backends import Backend, refuse_unknown, unwrapped
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.plan import Plan
from graphcache.ir.roles import Names
from graphcache.libraries.diffusers_private import REGISTRY
from graphcache.runtime.checked import check_calls, end_checks, refuse_unchecked
from graphcache.runtime.engine import Engine, original
from graphcache.runtime.likeness import alike
from graphcache.runtime.mesh import ranks_of
from graphcache.runtime.offloading import settle
from graphcache.runtime.options import SIGNATURES, Options, check_options
from graphcache.runtime.parts import denoisers, modules
from graphcache.runtime.passed_by import say_if_passed_by, timesteps_of
from graphcache.runtime.plans import Resample
from graphcache.runtime.summary import Summary, summarise
from graphcache.runtime.surroundings import Around, OpenSession
from graphcache.runtime.warmup import warm_up

Target = TypeVar("Target")


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

    def session(self, scheduler: Any = None) -> OpenSession:
        """A session: within its `with`, calls of this thread or asyncio task have caches of their own.

        They are kept from one `with` to the next, in whatever thread, until it is closed or nobody refers to
        it any more: `with model.session():` frees them at its end, `session = model.session()` is entered for
        each step of a request that takes turns with others. Entered by a generator, it holds for the calls
        that the generator makes, in whatever thread that is resumed. An exception that leaves the `with` ends
        the generation.

        Args:
            scheduler: the one that drives these calls and tells the step; without one that of the pipeline
                that calls, or the timesteps.
        """
        return self._graphcache.open_session(scheduler)

    def disabled(self) -> Around:
        """Within it the model runs as the original does; the first call ends a generation in progress."""
        return self._graphcache.surround(disabled=True)

    def cache_context(self, name: str, **fields: Any) -> Around:
        """Keep a cache of its own for the guidance branch `name`.

        Args:
            name: any; diffusers' pipelines say "cond", "uncond" or "cond_uncond".
            fields: diffusers' fields; `step_index` and `num_inference_steps` together tell the step to a
                model whose scheduler is not known.
        """
        return self._graphcache.surround(name=name, fields=fields)

    def summary(self) -> Summary:
        """What each step of the latest generation computed, reused and forecast, and the bytes held."""
        say_if_passed_by([self._graphcache])
        return summarise(self._graphcache.surroundings.session)

    def warmup(
        self, *calls: Mapping[str, Any] | tuple[Any, ...], steps: int | None = None, progress: bool = True
    ) -> None:
        """Capture and compile before the first request everything that calls like these need.

        It is made for calls without gradients. Every phase runs once for each call, so that this takes about
        as long as so many evaluations, beside capturing and compiling. Caches of generations in progress stay
        as they are.

        Args:
            calls: arguments of one call, as keywords or positions, for each size that is to come. A single
                one is compiled as a fixed one; of several, code is made that serves them all (`sizes=`).
            steps: evaluations of a generation, if they are not the plan's.
            progress: draw a bar on the error output.

        Raises:
            GraphCacheError: the model cannot be captured, or the plan does not fit it.
        """
        engine = self._graphcache
        warm_up(engine, calls, engine.plans[engine.options.plan.steps if steps is None else steps], progress)

    def compile(self, **arguments: Any) -> None:
        """Compile every phase with torch.compile's arguments; each becomes one graph of static shapes."""
        refuse_unknown(arguments)
        self._graphcache.maker.compile(arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with weights of its own, under the same plan and with an empty cache."""
        engine = self._graphcache
        _drop_empty_registry(engine.model)
        model = copy.deepcopy(engine.model, memo)
        return _wrap(model, engine.as_given, memo.get(id(engine.driver.given)))

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
    timestep: str | None = None,
    latents: str | Sequence[str] = (),
    parts: str | Sequence[str] = (),
    branches: int | None = None,
    wait: Literal["step", "never"] = "step",
    offload: bool = False,
    signatures: int = SIGNATURES,
    watch: Literal["adapters", "everything"] = "adapters",
    regions: Literal["auto"] | bool = "auto",
    sizes: Literal["auto", "fixed", "any"] = "auto",
    max_cache_bytes: int | None = None,
    resample: Resample | None = None,
    stream_weights: bool = False,
    check: int = 0,
    captures: str | os.PathLike[str] | None = None,
    mesh: Any = None,
) -> Target:
    """Make a model, or the denoisers of a diffusers pipeline, run under a plan.

    Args:
        model_or_pipe: an nn.Module in eval mode, or a pipeline, whose denoisers are replaced wherever it and
            the pipelines in it hold them: the modules that are called with a time, ControlNets left out. The
            original stays as it is; both share their weights. The scheduler of whatever pipeline calls tells
            the step; a loop outside of any pipeline follows that of the one given here.
        plan: what each site does at each step. For a generation with another number of steps a preset is
            evaluated anew, any other plan resampled (see `resample`); the log says so once.
        backend: None runs the graphs as they are, or compiles them with what the model was compiled with;
            "inductor" or any torch.compile backend compiles each phase without a break (see `regions`); a
            mapping holds torch.compile's own keyword arguments. "aot" is native code by AOTInductor, whose
            calls cost least and which takes longer to make. Under {"mode": "reduce-overhead"}, CUDA
            graphs, one generation at a time: the next one overwrites what this one has cached.
        example_inputs: arguments of one call. With them the capture happens now, and a plan that does not
            fit is an error now; without, at the first call.
        timestep: the argument that tells the time, or its path: `batch.sigma` is an entry of a dict or
            dataclass. None finds it by its name (timestep, t, sigma and others). A number is as good as a
            tensor if forward computes the same with either. Where a scheduler tells the step, a model needs
            none.
        latents: the argument or arguments that hold the latents, or their paths, where they are not in the
            first one that holds floating-point tensors.
        parts: the pipeline's denoisers, by attribute, where not all of them are meant or their arguments do
            not tell: `parts="prior"`, or `parts="prior_pipe.prior"` of a pipeline within it.
        branches: how many calls a step makes without a `cache_context`, or under one name, each with a cache
            of its own: guidance branches, windows of a clip, tiles, regions, always in the same order. Needed
            where calls cannot be told apart by what they are given.
        wait: where no scheduler tells the step, "step" reads the timestep at each call, which waits for the
            device; "never" counts calls, so that generations must have as many as the plan, or begin with
            `reset`.
        offload: keep cached features in pinned host memory. Each is sent there once it is computed, and
            fetched while the site before the one that reads it runs. Differences of guidance stay on the
            device, and so does what tokens are written into.
        signatures: how many captures are kept: one for each size, prompt length or other argument that is no
            tensor, and for each form of the model. The log says when one returns that was dropped.
        watch: what is looked at in every call: "adapters", which are also hooks and attention processors, or
            "everything" that a capture bakes in, which takes a microsecond a module. At the beginning of a
            generation everything is looked at.
        regions: True compiles what repeats in a phase, as a model's blocks, once, and calls it as often as it
            is there: the start takes no longer for a deeper model, and each step a little longer (1 to 16 %
            were measured: docs/design.md). False compiles each phase whole, and "auto" does what was done
            before: regions where the model's blocks were compiled one by one. Under CUDA graphs, with frozen
            weights or by other compilers than PyTorch's a phase is whole.
        sizes: "auto" compiles the first size as a fixed one, and from the second on code for every further
            size, prompt length and batch; from the third on what is captured serves others, too, as far as
            the model allows; "fixed" captures and compiles each size anew. "any" prepares for other sizes at
            the first, which then takes about twice as long, and compiles no size for itself; where a model
            does not allow that it is "auto" (`inspect(..., sizes=True)` says what the model makes fixed).
            Compiled by other means than Inductor, by CUDA graphs, with frozen weights or gradients, each size
            has its own code.
        max_cache_bytes: how much the caches of a generation may take on the device, all its branches
            together. A branch for which too little is left keeps its cache in host memory, as by `offload`;
            where that does not help, its first call is refused, and told a plan that would fit.
        resample: makes the plan for a generation of another number of steps, once for each;
            `graphcache.Resampler(profile)` searches one, as fast as the given plan, by the profile that this
            was found by.
        stream_weights: leave the model's weights in host memory, where they have to be, and fetch for each
            step those that it reads, one block ahead; the accelerator computes where there is one. The
            model's own forward, within `disabled()` and while it is captured, fetches them module by module.
        check: of so many first calls of the pipeline the generation is also run both ways, under the plan
            and without it, and a `PromiseWarning` says which of them comes to fewer decibels than the plan
            promises. What the calls return, draw and call back is as without.
        captures: a folder in which captures are kept, so that another process has no need to trace the same
            model for the same call: see docs/reliability.md.
        mesh: a torch DeviceMesh whose processes share each evaluation: its dimensions are named "tokens",
            "guidance" (the rows of the batch) or both, and every process makes the same calls with the same
            inputs and gets the whole result (docs/devices.md).

    Returns:
        An instance of the model's class, or the pipeline.

    Raises:
        GraphCacheError: see above; the message says what to do.
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            f"plan is a {type(plan).__name__}, not a Plan; use graphcache.presets, Plan.parse or Plan.load"
        )
    check_options(branches, wait, signatures, watch, regions, sizes, max_cache_bytes, check)
    if stream_weights and regions is False and backend is not None:
        raise GraphCacheError("stream_weights=True fetches weights region by region; leave out regions=False")
    refuse_unknown(backend)
    options = Options(
        plan,
        backend,
        branches,
        wait == "step",
        offload,
        signatures=signatures,
        watches_all=watch == "everything",
        regions=regions,
        sizes=sizes,
        max_cache_bytes=max_cache_bytes,
        resample=resample,
        stream_weights=stream_weights,
        names=Names.of(timestep, latents),
        captures=None if captures is None else Path(captures),
        mesh=() if mesh is None else ranks_of(mesh, backend, sizes, stream_weights),
    )
    named = (parts,) if isinstance(parts, str) else tuple(parts)
    if isinstance(model_or_pipe, nn.Module):
        if named:
            raise GraphCacheError(f"parts={parts!r} names modules of a pipeline, and this is a module")
        if check:
            raise GraphCacheError(
                f"check={check}: calls of a module are steps, and a plan promises results: hold them against "
                "the promise with graphcache.compare(model, {'plan': plan}, samples, steps=, sampler=)"
            )
        made: Any = _transformed(model_or_pipe, options)
        if example_inputs is not None:
            made._graphcache.prepare(example_inputs)
        return made  # type: ignore[no-any-return]
    if check:
        refuse_unchecked(model_or_pipe, plan, check)
    chosen = denoisers(model_or_pipe, named).values()
    models: list[Any] = [_transformed(part.module, options, model_or_pipe) for part in chosen]
    for part, made in zip(chosen, models, strict=True):
        made._graphcache.timesteps_before = timesteps_of(model_or_pipe)
        part.replace(made)
    end_checks(model_or_pipe)
    if check:
        check_calls(model_or_pipe, models, plan, check)
    return model_or_pipe


def restore(model_or_pipe: Target) -> Target:
    """Undo `transform`: the original model, or the pipeline with its original denoisers.

    Other pipelines that hold the same transformed model keep it, and its plan, until they are restored too.

    Raises:
        GraphCacheError: another forward was put around the model since.
    """
    if isinstance(model_or_pipe, nn.Module):
        return _restored(model_or_pipe)  # type: ignore[return-value]
    end_checks(model_or_pipe)
    parts = modules(model_or_pipe).values()
    say_if_passed_by([e for part in parts if (e := _engine_of(part.module)) is not None])
    for part in parts:
        before = _restored(part.module)
        if before is not part.module:
            part.replace(before)
    return model_or_pipe


def wrapped(model: nn.Module, engine: Engine, base: type[Transformed] = Transformed) -> nn.Module:
    """A model that looks like another one and is run by an engine."""
    made = alike(model, base)
    engine.caller.attach(made)
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
    engine = _engine_of(model)
    if engine is None:
        return model
    settle(unwrapped(model)[0])
    if engine.outer is not None:
        raise GraphCacheError(
            "the transformed model's forward was replaced since; undo that first (del model.forward)"
        )
    _drop_empty_registry(engine.model)
    return engine.given


def _engine_of(model: nn.Module) -> Engine | None:
    engine = getattr(unwrapped(model)[0], "_graphcache", None)
    return engine if isinstance(engine, Engine) else None


def _drop_empty_registry(model: nn.Module) -> None:
    """Forget a registry of diffusers' hooks that a pipeline made for the result and never filled."""
    registry = model.__dict__.get(REGISTRY)
    if registry is not None and not registry.hooks:
        del model.__dict__[REGISTRY]


def _wrap(model: nn.Module, options: Options, pipe: Any = None) -> nn.Module:
    return wrapped(model, Engine(model, options, pipe))
