"""How a model is sampled: a pipeline by its own call, a bare module by a function that is given."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from graphcache.compiler.backends import Backend, unwrapped
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.ir.roles import UNNAMED, Names
from graphcache.libraries.extras import require
from graphcache.runtime.engine import Engine, original
from graphcache.runtime.options import Options
from graphcache.runtime.parts import denoisers, modules
from graphcache.runtime.transform import transform, wrapped
from graphcache.tracing.capture import forward_parameters

Sampler = Callable[[nn.Module, Any, int], Tensor]
"""(model, sample, steps) -> result, the batch first: a whole generation. The same sample always begins with
the same noise. A decorator `torch.no_grad` is looked through where gradients are needed."""


@dataclass(frozen=True)
class Sampling:
    """A model and how it is run through a generation: what profiling, tuning and comparing begin with.

    Attributes:
        model: the original one.
        sampler: runs any model of its kind.
        pipe: the pipeline that the sampler calls, if there is one.
        names: of the arguments that are latents and timestep, where they are not found.
        conditional: the conditional half of a doubled batch, "first" or "last".
    """

    model: nn.Module
    sampler: Sampler
    pipe: Any = None
    names: Names = UNNAMED
    conditional: str | None = None

    @staticmethod
    def of(
        model_or_pipe: Any,
        sampler: Sampler | None = None,
        timestep: str | None = None,
        latents: str | Sequence[str] = (),
        conditional: str | None = None,
    ) -> "Sampling":
        """Of a module with a sampler, or of a pipeline; a `Sampling` is taken as it is.

        Args:
            model_or_pipe: what is sampled.
            sampler: runs a bare module through a generation.
            timestep: the name of the timestep argument, if it is not found.
            latents: those of the latents, as for `transform`.
            conditional: the conditional half of a doubled batch, "first" or "last".

        Raises:
            GraphCacheError: a bare module comes without a sampler, or a pipeline has two transformers; or a
                `Sampling` comes with what it says itself.
        """
        names = Names.of(timestep, latents)
        if isinstance(model_or_pipe, Sampling):
            if sampler is not None or names != UNNAMED or conditional is not None:
                raise GraphCacheError(
                    "a Sampling says itself how its model is run: give sampler=, timestep=, latents= and "
                    "conditional= to Sampling.of"
                )
            return model_or_pipe
        if isinstance(model_or_pipe, nn.Module):
            if sampler is None:
                raise GraphCacheError(
                    "a bare module does not say how it is sampled; give sampler=, a function of (model, "
                    "sample, steps) that returns the result of a whole generation"
                )
            model = original(unwrapped(model_or_pipe)[0])
            return Sampling(model, sampler, names=names, conditional=conditional)
        name, part = _denoiser(model_or_pipe)
        model = original(unwrapped(part)[0])
        sampler = sampler or _PipelineSampler(model_or_pipe, name)
        return Sampling(model, sampler, model_or_pipe, names, conditional)

    def generate(self, model: nn.Module, sample: Any, steps: int, *, gradients: bool = False) -> Tensor:
        """The result of one generation; with `gradients` those of what the model's calls depend on."""
        if not gradients:
            with torch.no_grad():
                return self.sampler(model, sample, steps)
        with torch.enable_grad():
            if isinstance(self.sampler, _PipelineSampler):
                return self.sampler.differentiable(model, sample, steps)
            result: Tensor = inspect.unwrap(self.sampler)(model, sample, steps)
            return result

    def uncached(self, sample: Any, steps: int) -> tuple[Tensor, int]:
        """What a sample gives under one global seed, and how many calls a step makes."""
        calls: list[None] = []
        handle = self.model.register_forward_pre_hook(lambda *_: calls.append(None))
        try:
            with global_seed(0):
                result = self.generate(self.model, sample, steps)
        finally:
            handle.remove()
        return result, max(1, round(len(calls) / steps))

    def first_call(self, sample: Any, steps: int) -> Mapping[str, Any]:
        """The arguments, by name, of the first evaluation of a sample's generation.

        Raises:
            GraphCacheError: the sampler never calls the model that it is given.
        """
        inputs = first_call(self.model, lambda: self.sampler(self.model, sample, steps))
        if inputs is None:
            raise GraphCacheError(
                "the sampler never called the model it was given; it must call its first argument"
            )
        return inputs

    def planned(self, plan: Plan) -> nn.Module:
        """The model under a plan, run eagerly; to be given to `generate`."""
        return wrapped(self.model, Engine(self.model, Options(plan, names=self.names), self.pipe))

    def transformed(self, plan: Plan, backend: Backend) -> Any:
        """The model under a plan, compiled, as a user would have it."""
        names = self.names
        return transform(self.model, plan, backend=backend, timestep=names.timestep, latents=names.latents)

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


def _denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """The attribute that holds a pipeline's only denoiser, and that."""
    parts = denoisers(pipe)
    if len(parts) != 1 or "." in "".join(parts):
        raise GraphCacheError(
            f"{type(pipe).__name__} has {' and '.join(parts)}, which take turns; profile each as a module, "
            "with a sampler of its own"
        )
    ((name, part),) = parts.items()
    return name, part.module


@dataclass(frozen=True)
class _PipelineSampler:
    """A sample is a mapping of the call's arguments; `seed` is that of its generator.

    `part` is the attribute that holds the denoiser; `scheduler` takes the place of the pipeline's own.
    """

    pipe: Any
    part: str
    scheduler: Any = None

    def __call__(self, model: nn.Module, sample: Any, steps: int) -> Tensor:
        return self._called(type(self.pipe).__call__, model, sample, steps)

    def differentiable(self, model: nn.Module, sample: Any, steps: int) -> Tensor:
        return self._called(inspect.unwrap(type(self.pipe).__call__), model, sample, steps)

    def _called(self, call: Callable[..., Any], model: nn.Module, sample: Any, steps: int) -> Tensor:
        if not isinstance(sample, Mapping):
            raise GraphCacheError(
                f"a pipeline's sample is a mapping of its call's arguments, not {type(sample).__name__}"
            )
        arguments = {"output_type": "latent", **sample}
        seed = arguments.pop("seed", 0)
        arguments.setdefault("generator", torch.Generator().manual_seed(int(seed)))
        parts = {self.part: model} | ({} if self.scheduler is None else {"scheduler": self.scheduler})
        with _in_place(self.pipe, parts):
            result = call(self.pipe, num_inference_steps=steps, return_dict=False, **arguments)[0]
        if isinstance(result, Tensor):
            return result
        if not all(isinstance(item, Tensor) for item in result):
            asked = sample.get("output_type")
            advice = (
                "give sampler=, a function of (model, sample, steps) that returns the latents"
                if asked is None
                else f"output_type={asked!r} asks for that: leave it out, or take 'pt'"
            )
            raise GraphCacheError(f"{type(self.pipe).__name__} returns no tensors; {advice}")
        return torch.stack(list(result))


class _Recorded(Exception):
    """Ends a generation whose first evaluation was all that was needed."""


def first_call(model: nn.Module, generate: Callable[[], object]) -> Mapping[str, Any] | None:
    """The arguments, by name, of the first call of a model in a generation, which ends there.

    None if the model is never called.
    """
    seen: dict[str, Any] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(forward_parameters(module))
        seen.update(zip(names, args, strict=False), **kwargs)
        raise _Recorded

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            generate()
    except _Recorded:
        return seen
    finally:
        hook.remove()
    return None


@contextmanager
def _in_place(pipe: Any, parts: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(pipe, name) for name in parts}
    for name, part in parts.items():
        setattr(pipe, name, part)
    try:
        yield
    finally:
        for name, part in before.items():
            setattr(pipe, name, part)


FLOW_SOLVERS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)


def solved_by(pipe: Any, name: str) -> Sampler:
    """A pipeline's generations by another of diffusers' schedulers, set up from the pipeline's own.

    Raises:
        GraphCacheError: diffusers has no such scheduler for this pipeline's equation.
    """
    own, options = pipe.scheduler, dict[str, Any]()
    known = {kind.__name__ for kind in own.compatibles}
    if type(own).__name__.startswith("FlowMatch"):
        known.update(FLOW_SOLVERS)
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        options["flow_shift"] = own.config.shift
    if name not in known:
        raise GraphCacheError(
            f"solver {name!r} cannot take the place of a {type(own).__name__}; those that can: "
            + ", ".join(sorted(known))
        )
    kind = getattr(require("diffusers", "diffusers", "another solver"), name)
    return _PipelineSampler(pipe, _denoiser(pipe)[0], kind.from_config(own.config, **options))


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
        other = sampling.generate(sampling.model, sample, steps)
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
