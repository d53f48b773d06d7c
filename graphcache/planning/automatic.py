"""`auto`: profile, search, tune, check and transform, with one knob."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from graphcache.compiler.backends import Backend
from graphcache.cost.pricing import without_weights
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.planning.gradient_memory import MEMORY
from graphcache.planning.outlook import Outlook, Part
from graphcache.planning.profile import Profile
from graphcache.planning.profiling import Detail, profile
from graphcache.planning.sampling import Sampler, Sampling
from graphcache.planning.search import Found, search
from graphcache.planning.tuning import Tuned, mean_psnr, tune, with_corrections
from graphcache.runtime.transform import transform

Target = TypeVar("Target")
Progress = Callable[[str, int, int], None]
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
MOST_PROFILED = 8


@dataclass(frozen=True)
class Automatic:
    """What `auto` found: the transformed model or pipeline, its plan, and how it came about.

    `held_out` is the plan's mean PSNR to the uncached run, in decibels, of samples that no
    coefficient was fitted to.
    """

    model: Any
    plan: Plan
    profile: Profile
    found: Found
    tuned: Tuned | None
    held_out: float


@dataclass(frozen=True)
class Parts:
    """What `auto` does, part by part; for its attributes see there.

    Attributes:
        sampling: how the model is run.
        samples: two or more.
        detail: of the profile.
        progress: told which part is under way, how much of it is done, and how much there is; 0 where that
            is not known.
        run: maps a function over samples, and over candidates; a cluster's map gives the same.

    Raises:
        GraphCacheError: there are too few samples.
    """

    sampling: Sampling
    samples: Sequence[Any]
    steps: int
    speedup: float
    max_bytes: int | None = None
    iterations: int = 60
    reference: Literal["uncached", "converged"] = "uncached"
    data_range: float = 2.0
    detail: Detail = "steps"
    seed: int = 0
    memory: int = MEMORY
    backend: Backend = "inductor"
    progress: Progress = lambda what, done, total: None
    run: Map = map

    def __post_init__(self) -> None:
        if len(self.samples) < 2:
            raise GraphCacheError("auto needs two samples or more: one of them judges the plan")

    @property
    def judges(self) -> Sequence[Any]:
        """The last quarter, which nothing is fitted to."""
        return self.samples[-max(1, len(self.samples) // 4) :]

    @property
    def trained(self) -> Sequence[Any]:
        """The others."""
        return self.samples[: -len(self.judges)]

    def profiled(self, path: str | os.PathLike[str] | None = None) -> Profile:
        """The profile, of at most eight samples."""
        return profile(
            self.sampling,
            self.trained[:MOST_PROFILED],
            steps=self.steps,
            detail=self.detail,
            seed=self.seed,
            memory=self.memory,
            backend=self.backend,
            path=path,
            progress=lambda done, total: self.progress("profile", done, total),
            run=self.run,
        )

    def searched(self, measured: Profile) -> Found:
        """The best plan by the profile and by runs of two samples."""
        self.progress("search", 0, 0)
        check = checker(self.sampling, self.trained[:2], self.steps)
        return search(measured, speedup=self.speedup, max_bytes=self.max_bytes, check=check, run=self.run)

    def tuned(self, plan: Plan, handovers: Sequence[int] = ()) -> Tuned | None:
        """The plan with its coefficients trained; None where it has none, or nothing is to be trained."""
        if not (self.iterations and plan.lists_coefficients):
            return None
        return tune(
            self.sampling,
            with_corrections(plan, handovers=handovers),
            self.trained,
            self.judges,
            reference=self.reference,
            iterations=self.iterations,
            data_range=self.data_range,
            memory=self.memory,
            progress=lambda now: self.progress("tune", now.number + 1, self.iterations),
        )

    def outlook(self, rivals: int = 0) -> tuple[Part, ...]:
        """What the parts will take, and the comparison behind them; the model is captured for it.

        Args:
            rivals: other libraries' caches that are compared with.

        Raises:
            GraphCacheError: the model cannot be captured.
        """
        sampling = self.sampling
        ((number, inputs),) = sampling.first_calls(self.samples[0], self.steps, 1).items()
        _, calls = sampling.uncached(self.samples[0], self.steps)
        return Outlook(
            without_weights(sampling.models[number], inputs, sampling.names),
            self.steps, self.speedup, calls, min(len(self.trained), MOST_PROFILED), len(self.trained),
            len(self.judges), self.iterations, self.memory, branches=self.detail != "steps",
            timed=self.backend is not None, rivals=rivals,
        ).parts()  # fmt: skip


def auto(
    model_or_pipe: Target,
    samples: Sequence[Any],
    *,
    steps: int,
    speedup: float = 2.0,
    sampler: Sampler | None = None,
    max_bytes: int | None = None,
    iterations: int = 60,
    reference: Literal["uncached", "converged"] = "uncached",
    conditional: str | None = None,
    detail: Detail = "steps",
    backend: Backend = "inductor",
    timestep: str | None = None,
    latents: str | Sequence[str] = (),
    data_range: float = 2.0,
    seed: int = 0,
    memory: int = MEMORY,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Automatic:
    """Make a model, or a pipeline's denoisers, `speedup` times as fast with the best plan found for them.

    The last quarter of the samples, at least one, is held out of profiling and judges the tuned plan; of the
    rest at most eight are profiled.

    Args:
        model_or_pipe: as for `profile`.
        samples: two or more.
        steps: model evaluations of one generation.
        speedup: over the plain model.
        sampler: runs a bare module through a generation.
        max_bytes: of the plan's caches.
        iterations: of tuning; 0 leaves the fitted coefficients.
        reference: what tuning aims at, see `tune`.
        conditional: the conditional half of a doubled batch.
        detail: of the profile. "steps", whole steps of ranges and the output, found 14 of the best plans for
            15 speed-ups of three trained models; "sites" and "tokens" look at branches too, and take over
            twice as long.
        backend: of the timed steps and of the result.
        timestep: the name of the timestep argument, if it is not found.
        latents: those of the latents, as for `transform`.
        data_range: largest minus smallest value of a result.
        seed: of the profile.
        memory: bytes that profiling and tuning may take for intermediate results.
        folder: where `profile.json` and `plan.txt` are written.
        progress: told what is done now.

    Raises:
        GraphCacheError: there are too few samples, or one of the parts fails; its message says why.
    """
    sampling = Sampling.of(model_or_pipe, sampler, timestep, latents, conditional)
    parts = Parts(
        sampling, samples, steps, speedup, max_bytes=max_bytes, iterations=iterations, reference=reference,
        data_range=data_range, detail=detail, seed=seed, memory=memory, backend=backend,
        progress=lambda what, done, total: progress(f"{what}, {done} of {total}" if total else what),
    )  # fmt: skip
    measured = parts.profiled(None if folder is None else os.path.join(folder, "profile.json"))
    found = parts.searched(measured)
    tuned = parts.tuned(found.plan, measured.handovers)
    plan = found.plan if tuned is None else tuned.plan
    plan = replace(plan, graph=measured.provenance.graph)
    if folder is not None:
        plan.save(os.path.join(folder, "plan.txt"))
    progress("check")
    held_out = judged(sampling, plan, parts.judges, data_range)
    target = model_or_pipe if model_or_pipe is not sampling else sampling.target
    names = sampling.names
    made = transform(
        target, plan, backend=backend, timestep=names.timestep, latents=names.latents, parts=sampling.parts
    )
    return Automatic(made, plan, measured, found, tuned, held_out)


def checker(sampling: Sampling, samples: Sequence[Any], steps: int) -> Callable[[Plan], float]:
    """Measures a plan's root mean square error on some samples; the uncached ones are made once."""
    references = [sampling.generate(sampling.model, sample, steps) for sample in samples]

    def check(plan: Plan) -> float:
        model = sampling.planned(plan)
        total, count = 0.0, 0
        for sample, target in zip(samples, references, strict=True):
            result = sampling.generate(model, sample, steps)
            total += float((result.double() - target.double()).square().sum())
            count += target.numel()
        return float((total / count) ** 0.5)

    return check


def judged(sampling: Sampling, plan: Plan, samples: Sequence[Any], data_range: float) -> float:
    """A plan's mean PSNR to the uncached run in decibels."""
    model = sampling.planned(plan)
    results = [sampling.generate(model, sample, plan.steps) for sample in samples]
    references = [sampling.generate(sampling.model, sample, plan.steps) for sample in samples]
    return mean_psnr(results, references, data_range)
