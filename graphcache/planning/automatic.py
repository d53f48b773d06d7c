"""`auto`: profile, search, tune, check and transform, with one knob."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import fmean, stdev
from typing import Any, TypeVar

from graphcache.compiler.backends import Backend
from graphcache.cost.pricing import without_weights
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.plan import Plan
from graphcache.ir.promise import Promise
from graphcache.planning.agreement import done_by_first, of_first
from graphcache.planning.candidates import Candidate
from graphcache.planning.gradient_memory import MEMORY
from graphcache.planning.outlook import Outlook, Part
from graphcache.planning.pipeline_sampler import Models
from graphcache.planning.profile import Profile
from graphcache.planning.profiling import Detail, profile
from graphcache.planning.references import Aim, References
from graphcache.planning.sampling import Sampler, Sampling
from graphcache.planning.search import Found, search
from graphcache.planning.tuning import Tuned, tune, with_corrections
from graphcache.runtime.closeness import decibels
from graphcache.runtime.transform import transform

Target = TypeVar("Target")
Progress = Callable[[str, int, int], None]
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
MOST_PROFILED = 8
NEAR = 2.0
"""A family whose error is at most so many times the least one may come to lead by tuning."""
FEW = 6
"""Iterations of tuning before one of the near families is chosen."""
FAMILIES = 3
"""Near ones that are reckoned with beforehand."""


@dataclass(frozen=True)
class Trial:
    """The best plan of a family, tuned shortly, and the PSNR of every sample that it was judged by."""

    family: str
    plan: Plan
    decibels: tuple[float, ...]

    def leads(self, other: "Trial") -> bool:
        """Whether it is ahead of another one, judged by the same samples, by more than chance explains."""
        ahead = [mine - theirs for mine, theirs in zip(self.decibels, other.decibels, strict=True)]
        return len(ahead) > 1 and fmean(ahead) > stdev(ahead) / len(ahead) ** 0.5


@dataclass(frozen=True)
class Automatic:
    """What `auto` found: the transformed model or pipeline, its plan, and how it came about.

    `trials` are those of near families, of which the best was tuned in full; none where one family leads.
    The plan's promise says what it reached on samples that no coefficient was fitted to.
    """

    model: Any
    plan: Plan
    profile: Profile
    found: Found
    trials: tuple[Trial, ...]
    tuned: Tuned | None

    @property
    def held_out(self) -> float:
        """The plan's mean PSNR to the uncached run, in decibels, of the samples that were held out."""
        assert self.plan.promise is not None
        return self.plan.promise.mean


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
    iterations: int = 30
    reference: Aim = "uncached"
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

    @cached_property
    def judges(self) -> list[Any]:
        """The last quarter, which nothing is fitted to; always the same objects."""
        return list(self.samples[-max(1, len(self.samples) // 4) :])

    @cached_property
    def trained(self) -> list[Any]:
        """The others."""
        return list(self.samples[: -len(self.judges)])

    @cached_property
    def uncached(self) -> References:
        """The samples' results without a cache, which all parts compare with."""
        return References(self.sampling, self.steps)

    @cached_property
    def aims(self) -> References:
        """The results that tuning aims at."""
        if self.reference == "uncached":
            return self.uncached
        return References(self.sampling, self.steps, self.reference)

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
        """The best plans by the profile and by runs of two samples."""
        self.progress("search", 0, 0)
        check = checker(self.sampling, self.trained[:2], self.steps, self.uncached)
        found = search(measured, speedup=self.speedup, max_bytes=self.max_bytes, check=check, run=self.run)
        graph = measured.provenance.graph
        families = tuple(replace(item, plan=replace(item.plan, graph=graph)) for item in found.families)
        return replace(found, chosen=families[0], families=families)

    def near(self, found: Found) -> tuple[Candidate, ...]:
        """The best plans of those families that tuning may bring to the lead, the present one first."""
        if not self.iterations:
            return (found.chosen,)
        most = NEAR * found.chosen.known_error
        return tuple(item for item in found.families if item.known_error <= most)

    def tried(self, family: str, plan: Plan, handovers: Sequence[int] = ()) -> Trial:
        """A plan tuned for a few iterations by half of the samples to train on, judged by the others."""
        half = max(1, len(self.trained) // 2)
        judges = self.trained[half:] or self.judges
        if plan.lists_coefficients:
            result = self._tuned(plan, self.trained[:half], judges, min(FEW, self.iterations), handovers)
            return Trial(family, result.plan, result.each)
        return Trial(family, plan, tuple(self._reached(self.sampling.planned(plan), judges)))

    def tuned(self, plan: Plan, handovers: Sequence[int] = ()) -> Tuned | None:
        """The plan with its coefficients trained; None where it has none, or nothing is to be trained."""
        if not (self.iterations and plan.lists_coefficients):
            return None
        return self._tuned(plan, self.trained, self.judges, self.iterations, handovers)

    def _tuned(
        self,
        plan: Plan,
        trained: Sequence[Any],
        judges: Sequence[Any],
        iterations: int,
        handovers: Sequence[int],
    ) -> Tuned:
        return tune(
            self.sampling,
            with_corrections(plan, handovers=handovers) if plan.letter("c") is None else plan,
            trained,
            judges,
            reference=self.aims,
            iterations=iterations,
            data_range=self.data_range,
            memory=self.memory,
            progress=lambda now: self.progress("tune", now.number + 1, iterations),
        )

    def promised(self, plan: Plan) -> Plan:
        """The plan with a promise: what it reaches, compiled, on the samples that were held out."""
        reached = self._reached(self.sampling.transformed(plan, self.backend), self.judges)
        return plan.promising(Promise.of(reached, self.data_range, self.sampling.compared(self.judges)))

    def _reached(self, model: Models, samples: Sequence[Any]) -> list[float]:
        """Decibels of every sample under a plan."""
        results = (self.sampling.generate(model, sample, self.steps) for sample in samples)
        return of_first(self.sampling.mesh, decibels(results, self.uncached.of(samples), self.data_range))

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
        program = without_weights(sampling.models[number], inputs, sampling.names)
        return Outlook(
            replace(program, mesh=sampling.ranks),
            self.steps, self.speedup, calls, min(len(self.trained), MOST_PROFILED), len(self.trained),
            len(self.judges), self.iterations, self.memory, branches=self.detail != "steps",
            timed=self.backend is not None, rivals=rivals,
            trials=FAMILIES * min(FEW, self.iterations),
        ).parts()  # fmt: skip


def auto(
    model_or_pipe: Target,
    samples: Sequence[Any],
    *,
    steps: int,
    speedup: float = 2.0,
    sampler: Sampler | None = None,
    max_bytes: int | None = None,
    iterations: int = 30,
    reference: Aim = "uncached",
    conditional: str | None = None,
    detail: Detail = "steps",
    backend: Backend = "inductor",
    timestep: str | None = None,
    latents: str | Sequence[str] = (),
    mesh: Any = None,
    data_range: float = 2.0,
    seed: int = 0,
    memory: int = MEMORY,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Automatic:
    """Make a model, or a pipeline's denoisers, `speedup` times as fast with the best plan found for them.

    The last quarter of the samples, at least one, is held out of profiling and judges the tuned plan, which
    promises what it reached; of the rest at most eight are profiled. Where families of sites come near each
    other, the best plan of each is tuned shortly, and the best of those is tuned in full.

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
        detail: of the profile. "steps" looks at whole steps of ranges and the output, which most plans found
            for three trained models were of; "sites" and "tokens" look at branches too, and take over twice
            as long.
        backend: of the timed steps and of the result.
        timestep: the name of the timestep argument, if it is not found.
        latents: those of the latents, as for `transform`.
        mesh: the ranks that share every evaluation, as for `transform`, and those of the result: all of them
            call this with the same samples, and get the same plan.
        data_range: largest minus smallest value of a result.
        seed: of the profile.
        memory: bytes that profiling and tuning may take for intermediate results, on each rank.
        folder: where `profile.json` and `plan.txt` are written, by the first rank.
        progress: told what is done now.

    Raises:
        GraphCacheError: there are too few samples, or one of the parts fails; its message says why.
    """
    sampling = Sampling.of(model_or_pipe, sampler, timestep, latents, conditional, mesh=mesh)
    parts = Parts(
        sampling, samples, steps, speedup, max_bytes=max_bytes, iterations=iterations, reference=reference,
        data_range=data_range, detail=detail, seed=seed, memory=memory, backend=backend,
        progress=lambda what, done, total: progress(f"{what}, {done} of {total}" if total else what),
    )  # fmt: skip
    measured = parts.profiled(None if folder is None else os.path.join(folder, "profile.json"))
    found = parts.searched(measured)
    near = parts.near(found)
    trials = (
        tuple(parts.tried(item.family, item.plan, measured.handovers) for item in near)
        if len(near) > 1
        else ()
    )
    plan = best(trials).plan if trials else found.plan
    tuned = parts.tuned(plan, measured.handovers)
    progress("check")
    plan = parts.promised(plan if tuned is None else tuned.plan)
    if folder is not None:
        done_by_first(sampling.mesh, partial(plan.save, os.path.join(folder, "plan.txt")))
    target = model_or_pipe if model_or_pipe is not sampling else sampling.target
    names = sampling.names
    made = transform(
        target, plan, backend=backend, timestep=names.timestep, latents=names.latents, parts=sampling.parts,
        mesh=sampling.mesh,
    )  # fmt: skip
    return Automatic(made, plan, measured, found, trials, tuned)


def best(trials: Sequence[Trial]) -> Trial:
    """The first one, which was the best before tuning, unless others lead it: then the best of those."""
    ahead = [trial for trial in trials[1:] if trial.leads(trials[0])]
    return max(ahead, key=lambda trial: fmean(trial.decibels), default=trials[0])


def checker(
    sampling: Sampling, samples: Sequence[Any], steps: int, references: References | None = None
) -> Callable[[Plan], float]:
    """Measures a plan's root mean square error on some samples; the uncached ones are made once.

    Of a plan that ranks of a mesh cannot share it is no number.
    """
    targets = (references or References(sampling, steps)).of(samples)

    def measured(plan: Plan) -> float:
        model = sampling.planned(plan)
        total, count = 0.0, 0
        for sample, target in zip(samples, targets, strict=True):
            result = sampling.generate(model, sample, steps)
            total += float((result.double() - target.double()).square().sum())
            count += target.numel()
        return of_first(sampling.mesh, float((total / count) ** 0.5))

    def check(plan: Plan) -> float:
        try:
            return measured(plan)
        except PlanError:
            if not sampling.ranks:
                raise
            return math.nan  # not every plan is for ranks: it is none of the good ones

    return check
