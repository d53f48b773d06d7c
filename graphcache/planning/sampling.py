"""How a model is sampled: a pipeline by its own call, a bare module by a function that is given."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from graphcache.compiler.backends import Backend, compile_plainly, unwrapped
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.ir.promise import SAMPLER
from graphcache.ir.ranks import Ranks
from graphcache.ir.roles import UNNAMED, Names
from graphcache.planning.pipeline_sampler import Models, PipelineSampler, each, together
from graphcache.runtime.engine import Engine, original
from graphcache.runtime.mesh import ranks_of
from graphcache.runtime.options import Options
from graphcache.runtime.parts import denoisers, modules
from graphcache.runtime.recorded import calls_told
from graphcache.runtime.transform import transform, wrapped

Sampler = Callable[[Any, Any, int], Tensor]
"""(model, sample, steps) -> result, the batch first: a whole generation. The same sample always begins with
the same noise. A decorator `torch.no_grad` is looked through where gradients are needed. Of a pipeline with
several denoisers it is given all of them, in a tuple."""

Tell = Callable[[int, Mapping[str, Any]], None]
"""Given the number of a model that is called, and the arguments by name."""


@dataclass(frozen=True)
class Sampling:
    """A model and how it is run through a generation: what profiling, tuning and comparing begin with.

    Attributes:
        models: the original ones: one, or those of a pipeline that take turns in a generation.
        sampler: runs any models of their kind.
        pipe: the pipeline that the sampler calls, if there is one.
        names: of the arguments that are latents and timestep, where they are not found.
        conditional: the conditional half of a doubled batch, "first" or "last".
        parts: the models' attributes in the pipeline.
        mesh: a torch DeviceMesh whose ranks share every evaluation, as for `transform`; all of them do the
            same with the same samples.
    """

    models: tuple[nn.Module, ...]
    sampler: Sampler
    pipe: Any = None
    names: Names = UNNAMED
    conditional: str | None = None
    parts: tuple[str, ...] = ()
    mesh: Any = None
    _plain: dict[int, Models] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(
        model_or_pipe: Any,
        sampler: Sampler | None = None,
        timestep: str | None = None,
        latents: str | Sequence[str] = (),
        conditional: str | None = None,
        parts: str | Sequence[str] = (),
        mesh: Any = None,
    ) -> "Sampling":
        """Of a module with a sampler, or of a pipeline; a `Sampling` is taken as it is.

        Args:
            model_or_pipe: what is sampled. A pipeline's denoisers are found as by `transform`.
            sampler: runs a bare module through a generation.
            timestep: the name of the timestep argument, if it is not found.
            latents: those of the latents, as for `transform`.
            conditional: the conditional half of a doubled batch, "first" or "last".
            parts: the pipeline's denoisers, as for `transform`.
            mesh: the ranks that share every evaluation, as for `transform`.

        Raises:
            GraphCacheError: a bare module comes without a sampler, a pipeline has no denoiser, `mesh` is
                none, or a `Sampling` comes with what it says itself.
        """
        names = Names.of(timestep, latents)
        if isinstance(model_or_pipe, Sampling):
            if (sampler, names, conditional, mesh) != (None, UNNAMED, None, None) or parts:
                raise GraphCacheError(
                    "a Sampling says itself how its model is run: give sampler=, timestep=, latents=, "
                    "conditional=, parts= and mesh= to Sampling.of"
                )
            return model_or_pipe
        if mesh is not None:
            ranks_of(mesh)  # refuses what is none
        if isinstance(model_or_pipe, nn.Module):
            if sampler is None or parts:
                raise GraphCacheError(
                    f"parts={parts!r} names modules of a pipeline, and this is a module"
                    if parts
                    else "a bare module does not say how it is sampled; give sampler=, a function of (model, "
                    "sample, steps) that returns the result of a whole generation"
                )
            model = original(unwrapped(model_or_pipe)[0])
            return Sampling((model,), sampler, names=names, conditional=conditional, mesh=mesh)
        held = denoisers(model_or_pipe, (parts,) if isinstance(parts, str) and parts else tuple(parts))
        models = tuple(original(unwrapped(part.module)[0]) for part in held.values())
        sampler = sampler or PipelineSampler(model_or_pipe, tuple(held.values()))
        return Sampling(models, sampler, model_or_pipe, names, conditional, tuple(held), mesh)

    @property
    def ranks(self) -> tuple[Ranks, ...]:
        """Who shares every evaluation; none where one process runs them."""
        return () if self.mesh is None else ranks_of(self.mesh)

    @property
    def model(self) -> Models:
        """The original model or models, as the sampler takes them."""
        return together(self.models)

    def plain(self, steps: int) -> Models:
        """The models without a cache, for generations of so many steps; to be given to `generate`."""
        if not self.ranks:
            return self.model
        if steps not in self._plain:
            known: list[Any] = [model for models in self._plain.values() for model in each(models)]
            makers = [model._graphcache.maker for model in known[: len(self.models)]]
            makers = makers or [None] * len(self.models)
            options = Options(Plan(steps), names=self.names, mesh=self.ranks)
            pairs = zip(self.models, makers, strict=True)
            self._plain[steps] = self.wrapped([_Plain(m, options, self.pipe, maker) for m, maker in pairs])
        return self._plain[steps]

    @contextmanager
    def _told(self, models: Models, tell: Tell) -> Iterator[None]:
        """Within, `tell` is given the number of every plain model that is called, and its arguments."""
        if not self.ranks:
            with calls_told(self.models, tell):
                yield
            return
        engines = [cast(Any, model)._graphcache for model in each(models)]
        for number, engine in enumerate(engines):
            engine.tell = partial(tell, number)
        try:
            yield
        finally:
            for engine in engines:
                engine.tell = None
                engine.reset()  # a generation may have ended within

    def generate(self, models: Models, sample: Any, steps: int, *, gradients: bool = False) -> Tensor:
        """The result of one generation; with `gradients` those of what the models' calls depend on."""
        if not gradients:
            with torch.no_grad():
                return self.sampler(models, sample, steps)
        with torch.enable_grad():
            if isinstance(self.sampler, PipelineSampler):
                return self.sampler.differentiable(models, sample, steps)
            result: Tensor = inspect.unwrap(self.sampler)(models, sample, steps)
            return result

    def uncached(self, sample: Any, steps: int) -> tuple[Tensor, int]:
        """What a sample gives under one global seed, and how many calls a step makes."""
        models, calls = self.plain(steps), list[int]()
        with global_seed(0), self._told(models, lambda number, _: calls.append(number)):
            result = self.generate(models, sample, steps)
        return result, max(1, round(len(calls) / steps))

    def first_calls(self, sample: Any, steps: int, most: int | None = None) -> dict[int, Mapping[str, Any]]:
        """The arguments, by name, of the first evaluation of every model that a sample's generation calls.

        Args:
            sample: the generation's.
            steps: of it.
            most: so many models are enough.

        Returns:
            by the model's number, in the order of the calls.

        Raises:
            GraphCacheError: the sampler never calls any model that it is given.
        """
        models, found = self.plain(steps), dict[int, Mapping[str, Any]]()
        note = _noting(found, len(self.models) if most is None else most)
        with suppress(_Recorded), self._told(models, note), torch.no_grad():
            self.sampler(models, sample, steps)
        if not found:
            raise GraphCacheError(
                "the sampler never called the model it was given; it must call its first argument"
            )
        return found

    def first_call(self, sample: Any, steps: int) -> Mapping[str, Any]:
        """The arguments, by name, of a generation's first evaluation."""
        return next(iter(self.first_calls(sample, steps, 1).values()))

    def wrapped(self, engines: Sequence[Engine]) -> Models:
        """The models run by these engines, one each; to be given to `generate`."""
        return together([wrapped(*pair) for pair in zip(self.models, engines, strict=True)])

    def planned(self, plan: Plan) -> Models:
        """The models under a plan, run eagerly; to be given to `generate`."""
        options = Options(plan, names=self.names, mesh=self.ranks)
        return self.wrapped([Engine(model, options, self.pipe) for model in self.models])

    def transformed(self, plan: Plan, backend: Backend) -> Models:
        """The models under a plan, compiled, as a user would have them."""
        names: dict[str, Any] = {"timestep": self.names.timestep, "latents": self.names.latents}
        return together([transform(m, plan, backend=backend, mesh=self.mesh, **names) for m in self.models])

    def compiled(self, steps: int, backend: Backend) -> Models:
        """The models without a cache, compiled, for generations of so many steps."""
        if self.ranks:
            return self.transformed(Plan(steps), backend)
        return together([compile_plainly(model, backend) for model in self.models])

    def __getstate__(self) -> dict[str, Any]:
        if self.mesh is not None:
            raise GraphCacheError(
                "what runs under mesh= stays with its ranks: let workers have samples of their own (run=), "
                "or ranks share each sample (mesh=), one of both"
            )
        return self.__dict__

    def compared(self, samples: Sequence[Any]) -> str:
        """What a promise says of these samples' results: the `output_type` that they have in common."""
        if not isinstance(self.sampler, PipelineSampler):
            return SAMPLER
        kinds = {str(sample.get("output_type", "latent")) for sample in samples}
        return kinds.pop() if len(kinds) == 1 else SAMPLER

    @property
    def target(self) -> Any:
        """The pipeline, or the bare model."""
        return self.model if self.pipe is None else self.pipe

    @property
    def scheduler(self) -> str:
        """What makes steps of the model's results, for the record."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is None:
            return getattr(self.sampler, "__qualname__", type(self.sampler).__qualname__)
        return type(scheduler).__name__


class _Recorded(Exception):
    """Ends a generation whose first evaluation was all that was needed."""


def first_calls(
    models: Sequence[nn.Module], generate: Callable[[], object], most: int | None = None
) -> dict[int, Mapping[str, Any]]:
    """The arguments, by name, of each model's first call in a generation, which ends with the last of them.

    Args:
        models: any, whose numbers here are those of the result.
        generate: runs the generation.
        most: so many models are enough.

    Returns:
        by the models' numbers, in the order of the calls; one that is never called is absent.
    """
    seen: dict[int, Mapping[str, Any]] = {}
    note = _noting(seen, len(models) if most is None else most)
    with suppress(_Recorded), calls_told(models, note), torch.no_grad():
        generate()
    return seen


def _noting(seen: dict[int, Mapping[str, Any]], awaited: int) -> Tell:
    """Notes the first call of every model, until so many were called."""

    def note(number: int, arguments: Mapping[str, Any]) -> None:
        seen.setdefault(number, arguments)
        if len(seen) == awaited:
            raise _Recorded

    return note


class _Plain(Engine):
    """Computes everything, and tells of every call before it runs."""

    tell: Callable[[Mapping[str, Any]], None] | None = None

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if self.tell is not None:
            self.tell(self.binder.bind(args, kwargs))
        return super().__call__(args, kwargs)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Global random numbers start from a seed, and afterwards go on as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


_Function = TypeVar("_Function", bound=Callable[..., Any])


def with_frozen_weights(function: _Function) -> _Function:
    """While the function runs, no weight of its model or pipeline requires a gradient.

    Nor does then what a text encoder computes.
    """

    @functools.wraps(function)
    def frozen(model_or_pipe: Any, *args: Any, **kwargs: Any) -> Any:
        target = model_or_pipe.target if isinstance(model_or_pipe, Sampling) else model_or_pipe
        parts = [target]
        if not isinstance(target, nn.Module):
            parts = [part.module for part in modules(target).values()]
        weights = [p for part in parts for p in part.parameters()]
        trainable = [p for p in weights if p.requires_grad and not p.is_inference()]
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            return function(model_or_pipe, *args, **kwargs)
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    return cast(_Function, frozen)


def refuse_random(sampling: Sampling, sample: Any, steps: int, uncached: Tensor | None = None) -> None:
    """Raise GraphCacheError if the result depends on the global random state; `uncached` is one result."""
    known = sampling.uncached(sample, steps)[0] if uncached is None else uncached
    with global_seed(1):
        other = sampling.generate(sampling.plain(steps), sample, steps)
    refuse_infinite(known, other)
    if not torch.equal(known, other):
        raise GraphCacheError(
            "two runs of one sample differ, because the sampler draws random numbers; profiling and "
            "tuning follow one deterministic run: take a scheduler without noise (eta=0), and give the "
            "sample a seed or its latents"
        )


def refuse_infinite(*results: Tensor) -> None:
    """Raise GraphCacheError if a result is not finite."""
    if not all(bool(torch.isfinite(result).all()) for result in results):
        raise GraphCacheError(
            "a sample's result, or its gradient, is not finite; float16 may be too narrow: take bfloat16 or "
            "float32"
        )
