"""A pipeline as a sampler: its own call, with other models in its denoisers' places."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.ir.errors import GraphCacheError
from graphcache.libraries.extras import require
from graphcache.runtime.checked import own_class
from graphcache.runtime.parts import PipelinePart, denoisers
from graphcache.runtime.pipeline_call import called
from graphcache.runtime.summary import Summary

Models = nn.Module | tuple[nn.Module, ...]
"""What a sampler is given: a model, or as many as a pipeline has that take turns."""


def each(models: Models) -> tuple[nn.Module, ...]:
    """One after another, as they come in a pipeline."""
    return models if isinstance(models, tuple) else (models,)


def together(models: Sequence[Any]) -> Models:
    """As a sampler takes them."""
    found: Models = models[0] if len(models) == 1 else tuple(models)
    return found


def ideal_speedup(models: Models) -> float:
    """FLOPs of the plain models by those of the steps that the latest generation ran, of its first branch."""
    found: list[Summary] = [model.summary() for model in each(models)]  # type: ignore[operator]
    return Summary(tuple(item.branches[0] for item in found if item.branches)).ideal_speedup


@dataclass(frozen=True)
class PipelineSampler:
    """A sample is a mapping of the call's arguments; `seed` is that of its generator.

    `parts` are the denoisers' places; `scheduler` takes the place of the pipeline's own.
    """

    pipe: Any
    parts: tuple[PipelinePart, ...]
    scheduler: Any = None

    def __call__(self, models: Models, sample: Any, steps: int) -> Tensor:
        return self._called(own_class(self.pipe).__call__, models, sample, steps)

    def differentiable(self, models: Models, sample: Any, steps: int) -> Tensor:
        """The same where a decorator would turn gradients off."""
        return self._called(inspect.unwrap(own_class(self.pipe).__call__), models, sample, steps)

    def _called(self, call: Callable[..., Any], models: Models, sample: Any, steps: int) -> Tensor:
        if not isinstance(sample, Mapping):
            raise GraphCacheError(
                f"a pipeline's sample is a mapping of its call's arguments, not {type(sample).__name__}"
            )
        arguments = {"output_type": "latent", **sample}
        seed = arguments.pop("seed", 0)
        arguments.setdefault("generator", torch.Generator().manual_seed(int(seed)))
        with self._in_place(models):
            return called(call, self.pipe, {"num_inference_steps": steps, **arguments})

    @contextmanager
    def _in_place(self, models: Models) -> Iterator[None]:
        pairs = zip(self.parts, each(models), strict=True)
        made = [(*place, model) for part, model in pairs for place in part.places]
        if self.scheduler is not None:
            made.append((self.pipe, "scheduler", self.scheduler))
        before = [(holder, name, getattr(holder, name)) for holder, name, _ in made]
        for holder, name, thing in made:
            setattr(holder, name, thing)
        try:
            yield
        finally:
            for holder, name, thing in before:
                setattr(holder, name, thing)


FLOW_SOLVERS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)


def solved_by(pipe: Any, name: str) -> PipelineSampler:
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
    parts = tuple(denoisers(pipe).values())
    return PipelineSampler(pipe, parts, kind.from_config(own.config, **options))
