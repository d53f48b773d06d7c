"""`compare`: plans, presets and fewer steps on one model, by time and by quality."""

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from graphcache.compiler.backends import Backend
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.ir.plantext import read_rows
from graphcache.ir.promise import SAMPLER, Promise
from graphcache.planning.agreement import of_first, refuse_others
from graphcache.planning.gradient_memory import MEMORY
from graphcache.planning.judging import Judge, Judged, Measured
from graphcache.planning.metrics import frechet_distance
from graphcache.planning.pareto import unbeaten
from graphcache.planning.pipeline_sampler import each, ideal_speedup
from graphcache.planning.plan_memory import lowered
from graphcache.planning.rivals import Rival, hooked
from graphcache.planning.sampling import Sampler, Sampling, refuse_random

Kind = Literal["preset", "searched", "fewer steps", "plain", "rival"]
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
KINDS: tuple[Kind, ...] = ("preset", "searched", "fewer steps", "plain", "rival")


@dataclass(frozen=True)
class Contender:
    """One measured contender.

    Attributes:
        name: also that of its picture.
        kind: where it comes from; `plain` is the untouched model, which the others are compared with, and a
            `rival` another library's cache.
        speedup: the plain model's median time by this one's; 0 where it did not run.
        psnr: dB to the plain model's results, mean over the samples; None of those themselves. Equal results
            have some 200.
        ssim: likewise; None where results are no images of 7x7 pixels or more.
        frechet: Fréchet distance of the results' features; None where it was not measured.
        ms: milliseconds of one generation, the median.
        steps: of a generation.
        ideal: speed-up in FLOPs.
        spread: standard deviation of the generations' mean PSNR.
        failure: why it did not run, else None.
        promise: of a plan what it may promise, if nothing was fitted to these samples: `plan.promising(...)`.
    """

    name: str
    kind: Kind
    speedup: float
    psnr: float | None
    ssim: float | None = None
    frechet: float | None = None
    ms: float | None = None
    steps: int | None = None
    ideal: float | None = None
    spread: float | None = None
    failure: str | None = None
    promise: Promise | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GraphCacheError(f"row {self.name}: kind={self.kind!r}; kinds are {', '.join(KINDS)}")


def load_rows(path: str | os.PathLike[str]) -> tuple[Contender, ...]:
    """Read what `graphcache compare --output` wrote.

    Raises:
        GraphCacheError: the file holds something else.
    """
    return read_rows(path, Contender, "comparison")


def unbeaten_rows(rows: Sequence[Contender]) -> tuple[Contender, ...]:
    """Those that no other one beats in both speed-up and PSNR, fastest first."""
    known = [(row, row.psnr) for row in rows if row.psnr is not None]
    return tuple(row for row, _ in unbeaten(known, lambda item: (-item[0].speedup, -item[1])))


def compare(
    model_or_pipe: Any,
    plans: Mapping[str, Plan],
    samples: Sequence[Any],
    *,
    steps: int,
    sampler: Sampler | None = None,
    fewer: Mapping[str, tuple[Sampler | None, int]] | None = None,
    rivals: Mapping[str, Rival] | None = None,
    optional: Collection[str] = (),
    backend: Backend = "inductor",
    timestep: str | None = None,
    latents: str | Sequence[str] = (),
    mesh: Any = None,
    data_range: float = 2.0,
    features: Callable[[Tensor], Tensor] | None = None,
    memory: int = MEMORY,
    progress: Callable[[str], None] = lambda text: None,
    run: Map = map,
) -> tuple[Contender, ...]:
    """Time whole generations, interleaved, and measure results against the plain model's.

    Args:
        model_or_pipe: as for `graphcache.profile`.
        plans: contenders by name.
        samples: one generation each; take others than were profiled or tuned on.
        steps: of the plain model's generation.
        sampler: runs a bare module through a generation.
        fewer: the plain model with other numbers of steps, by name: a sampler, None for the same, and steps.
        rivals: other libraries' caches, by name; see `graphcache.planning.rivals`. Of one that cannot run on
            this model the row says why.
        optional: plans of which that holds too; any other one raises.
        backend: compiles the plain model and the plans' phases.
        timestep: the name of the timestep argument, if it is not found.
        latents: those of the latents, as for `transform`.
        mesh: the ranks that share every evaluation, as for `transform`; the plain model's too, which is then
            a plan that computes everything. All get the first one's rows.
        data_range: largest minus smallest value of a result.
        features: results -> (N, D), for Fréchet distances.
        memory: bytes that results and a plan's caches may take, beside the model and what its evaluations
            themselves take; on each rank, or in each worker of a cluster. Of one sample at a time the results
            of all contenders are held.
        progress: told what is done now.
        run: maps a function over the samples; a cluster's `map` gives the same results. Every sample is run
            by all contenders on one machine, which compiles them anew for each.

    Raises:
        GraphCacheError: the sampler is random, or a plan does not fit the model, or its caches `memory`.
    """
    if not samples:
        raise GraphCacheError("samples is empty: a comparison needs at least one")
    sampling = Sampling.of(model_or_pipe, sampler, timestep, latents, mesh=mesh)
    if sampling.ranks and rivals:
        raise GraphCacheError(
            f"mesh=: {', '.join(rivals)} run on one device alone; compare with other libraries' caches "
            "without mesh=, or leave rivals= out"
        )
    refuse_others(
        sampling.mesh, steps=steps, plans={name: str(plan) for name, plan in plans.items()}, memory=memory,
        samples=len(samples), fewer={name: count for name, (_, count) in (fewer or {}).items()},
    )  # fmt: skip
    uncached, calls = sampling.uncached(samples[0], steps)
    refuse_random(sampling, samples[0], steps, uncached)
    contest = _Contest(sampling, dict(plans), steps, dict(fewer or {}), backend, calls)
    contest.rivals, contest.optional = dict(rivals or {}), frozenset(optional)
    contest.data_range, contest.compared = data_range, sampling.compared(samples)
    contest.left = memory - _results(uncached, len(contest.names), memory)
    progress(f"compiling {len(contest.names)} contenders")
    rounds, failures = list[dict[str, Judged]](), dict[str, str]()
    for measured in run(contest, list(enumerate(samples))):
        judge = Judge(measured.results["plain"].result, data_range, features)
        rounds.append({name: judge(one) for name, one in measured.results.items()})
        failures |= measured.failures
        progress(f"sample {len(rounds)} of {len(samples)}")
    rows = tuple(_row(name, contest, rounds, failures.get(name)) for name in contest.names)
    return of_first(sampling.mesh, rows)


_RESULTS = 8
"""Times a result that comparing one with another takes at most, in double precision."""


def _results(result: Tensor, contenders: int, memory: int) -> int:
    """Bytes of the results that are held at a time.

    Raises:
        GraphCacheError: these are more than there is.
    """
    needed = (contenders + _RESULTS) * result.nbytes
    if needed > memory:
        raise GraphCacheError(
            f"memory={memory} is less than comparing needs here: {needed} bytes for the results of "
            f"{contenders} contenders; compare fewer at a time"
        )
    return needed


@dataclass(frozen=True)
class _Round:
    """What all contenders that run gave for one sample, and why others do not run."""

    results: dict[str, Measured]
    failures: dict[str, str]


@dataclass
class _Contest:
    """Runs a sample with all contenders, in shuffled order; they are compiled when the first one comes.

    `left` are the bytes that a plan's caches may take, over the `calls` of a step. `whole` is how often the
    plain model's FLOPs hold those of its steps as they are run here, of which ranks have a part each.
    """

    sampling: Sampling
    plans: dict[str, Plan]
    steps: int
    fewer: dict[str, tuple[Sampler | None, int]]
    backend: Backend
    calls: int = 1
    left: int = 0
    rivals: dict[str, Rival] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    data_range: float = 2.0
    compared: str = SAMPLER
    whole: float = 1.0
    failures: dict[str, str] = field(default_factory=dict)
    runs: dict[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    planned: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return ["plain", *self.plans, *self.fewer, *self.rivals]

    def __call__(self, turn: tuple[int, Any]) -> _Round:
        number, sample = turn
        if not self.runs:
            self._prepare(sample)
        order = random.Random(number).sample([*self.runs], len(self.runs))
        return _Round({name: self._measured(name, sample) for name in order}, self.failures)

    def count(self, name: str) -> int:
        """Steps of a contender's generation."""
        return self.fewer[name][1] if name in self.fewer else self.steps

    def kind(self, name: str) -> Kind:
        if name in self.fewer:
            return "fewer steps"
        if name in self.rivals:
            return "rival"
        if name not in self.plans:
            return "plain"
        return "searched" if self.plans[name].preset is None else "preset"

    def _prepare(self, sample: Any) -> None:
        """Compile all contenders and run each once; what fails of those that may is noted."""
        ((number, inputs),) = self.sampling.first_calls(sample, self.steps, 1).items()
        plain = self.sampling.compiled(self.steps, self.backend)
        made: dict[str, Callable[[], Callable[[Any], Tensor]]] = {
            "plain": lambda: self._run(self.sampling, plain, self.steps)
        }
        made |= {name: partial(self._planned, name, number, inputs) for name in self.plans}
        for name, (sampler, count) in self.fewer.items():
            solver = replace(self.sampling, sampler=sampler or self.sampling.sampler)
            models = self.sampling.compiled(count, self.backend) if self.sampling.ranks else plain
            made[name] = partial(self._run, solver, models, count)
        for name, rival in self.rivals.items():
            made[name] = partial(hooked, self.sampling, rival, inputs, self.steps, self.backend)
        for name, make in made.items():
            try:
                run = make()
                run(sample)
            except Exception as error:
                if name not in self.rivals and name not in self.optional:
                    raise
                self.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            self.runs[name] = run
        if self.sampling.ranks:
            self.whole = ideal_speedup(plain)

    def _planned(self, name: str, number: int, inputs: Mapping[str, Any]) -> Callable[[Any], Tensor]:
        plan = self.plans[name]
        self.planned[name] = models = self.sampling.transformed(plan, self.backend)
        self._refuse_large(name, plan, each(models)[number], inputs)
        return self._run(self.sampling, models, self.steps)

    def _refuse_large(self, name: str, plan: Plan, model: Any, inputs: Mapping[str, Any]) -> None:
        """Raise GraphCacheError if the plan's caches do not fit."""
        with torch.no_grad():
            calls = lowered(model._graphcache, inputs, plan, self.calls)
        needed = sum(call.peak + call.hoisted for call in calls)
        if needed > self.left:
            raise GraphCacheError(
                f"plan {name} caches {needed} bytes, and memory= leaves {self.left} beside the results: give "
                f"{needed - self.left} bytes more, or a plan that caches less"
            )

    @staticmethod
    def _run(sampling: Sampling, model: Any, steps: int) -> Callable[[Any], Tensor]:
        return lambda sample: sampling.generate(model, sample, steps)

    def _measured(self, name: str, sample: Any) -> Measured:
        start = time.perf_counter()
        result = self.runs[name](sample)
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        seconds = time.perf_counter() - start
        ideal = None if name in self.rivals else self.steps / self.count(name)
        if name in self.planned:
            ideal = ideal_speedup(self.planned[name]) / self.whole
        return Measured(seconds, result, ideal)


def _row(
    name: str, contest: _Contest, rounds: Sequence[Mapping[str, Judged]], failure: str | None
) -> Contender:
    if failure is not None:
        return Contender(name, contest.kind(name), 0.0, None, steps=contest.count(name), failure=failure)
    spent, plain = (statistics.median(one[who].seconds for one in rounds) for who in (name, "plain"))
    own = [one[name] for one in rounds]
    row = Contender(
        name,
        contest.kind(name),
        plain / spent,
        None,
        ms=1e3 * spent,
        steps=contest.count(name),
        ideal=own[0].ideal,
    )
    if row.kind == "plain":
        return row
    means, alike = (
        [statistics.fmean(one.decibels) for one in own],
        [value for one in own for value in one.ssim],
    )
    pairs = [one.features for one in own if one.features]
    return replace(
        row,
        psnr=statistics.fmean(means),
        spread=statistics.pstdev(means),
        ssim=statistics.fmean(alike) if alike else None,
        frechet=frechet_distance(*map(torch.cat, zip(*pairs, strict=True))) if pairs else None,
        promise=_promise(name, contest, [value for one in own for value in one.decibels]),
    )


def _promise(name: str, contest: _Contest, reached: list[float]) -> Promise | None:
    """Of a plan whose steps were run, and whose results are finite."""
    held = name in contest.plans and contest.plans[name].steps == contest.steps
    if not held or not all(map(math.isfinite, reached)):
        return None
    return Promise.of(reached, contest.data_range, contest.compared)
