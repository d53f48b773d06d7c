"""`profile`: measure a model's sensitivity along its own sampling, from few runs."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from graphcache.compiler.backends import Backend, refuse_unknown
from graphcache.compiler.exchanges import ON_THE_WAY_BACK, answered
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.ir.roles import Names
from graphcache.planning.agreement import done_by_first, of_first, refuse_others
from graphcache.planning.calibration import step_seconds
from graphcache.planning.gradient_memory import MEMORY, GradientMemory
from graphcache.planning.moves import by_token
from graphcache.planning.probing import ProbeEngine
from graphcache.planning.profile import Profile, Provenance, SampleProfile, families
from graphcache.planning.profile_file import load_part, save_part, save_profile
from graphcache.planning.profile_memory import Needs, Share
from graphcache.planning.recording import Recording
from graphcache.planning.sampling import (
    Sampler,
    Sampling,
    global_seed,
    refuse_infinite,
    refuse_random,
    with_frozen_weights,
)
from graphcache.planning.subject import Subject, described
from graphcache.runtime.mesh import refuse_for_ranks
from graphcache.runtime.options import Options

Detail = Literal["steps", "sites", "tokens"]
DETAILS = get_args(Detail)
Progress = Callable[[int, int], None]
Run = Callable[[Callable[[int], SampleProfile], Sequence[int]], Iterable[SampleProfile]]


@with_frozen_weights
def profile(
    model_or_pipe: Any,
    samples: Sequence[Any],
    *,
    steps: int,
    sampler: Sampler | None = None,
    detail: Detail = "tokens",
    probes: int | None = None,
    window: int = 12,
    conditional: str | None = None,
    timestep: str | None = None,
    latents: str | Sequence[str] = (),
    mesh: Any = None,
    seed: int = 0,
    memory: int = MEMORY,
    backend: Backend = None,
    path: str | os.PathLike[str] | None = None,
    progress: Progress = lambda done, total: None,
    run: Run = map,
) -> Profile:
    """Measure a model's sensitivity along its own sampling.

    Each sample costs one generation, and two to five more for each probe. What does not fit into `memory` is
    computed again for each probe, at last stretch by stretch; gradients are held for `window` steps. Where
    those of the branches do not fit either, they are held at some tokens, chosen at random, and the effects
    of branches are estimates; ranges, the output and guidance are exact.

    Args:
        model_or_pipe: a module in eval mode, a pipeline, or a `Sampling` of either, which then has the
            sampler, the names and the conditional half. Of several denoisers each step calls one, and all
            that are called have equal graphs.
        samples: what the sampler takes; of a pipeline mappings of its call's arguments.
        steps: model evaluations of one generation.
        sampler: runs a bare module through a generation; a pipeline is its own.
        detail: "steps" looks at ranges of blocks, the output and guidance alone, "sites" at branches as well,
            and "tokens" also at how far each token of a branch moves.
        probes: random vectors carried back through each generation; one by default for "steps", else two.
        window: steps back to which effects are followed.
        conditional: "first" or "last", the conditional half of a doubled batch; two calls tell by context.
        timestep: the name of the timestep argument, if it is not found.
        latents: those of the latents, as for `transform`.
        mesh: the ranks that share every evaluation, as for `transform`: all get the profile of one process,
            to rounding.
        seed: of the probes and the sketch.
        memory: bytes that this may take beside the model and what capturing left, on each rank, or in each
            worker of a cluster. As long as no tokens are left out, it changes no result on a CPU.
        backend: compiles and times a step of every family of sites; None leaves times out, and plans are
            priced by their FLOPs.
        path: where to write; until then every sample's part lies beside it, and the next call takes those up.
        progress: told (samples done, samples in all).
        run: maps a function over the samples' numbers; a cluster's map gives the same result.

    Raises:
        GraphCacheError: the sampler is random, the model cannot be captured, or `memory` is less than one
            evaluation needs.
    """
    if not samples:
        raise GraphCacheError("samples is empty: profiling needs at least one")
    refuse_unknown(backend)
    sampling = Sampling.of(model_or_pipe, sampler, timestep, latents, conditional, mesh=mesh)
    if detail not in DETAILS:
        raise GraphCacheError(f"detail={detail!r}: known are {', '.join(DETAILS)}")
    if sampling.ranks:
        refuse_for_ranks(backend)
    probes = (1 if detail == "steps" else 2) if probes is None else probes
    window = min(window, steps - 1)
    options = Options(Plan(steps), names=sampling.names, mesh=sampling.ranks)
    engines = [
        ProbeEngine(model, options, sampling.pipe, branches=detail != "steps") for model in sampling.models
    ]
    inputs = sampling.first_calls(samples[0], steps)
    subject = described([engines[number] for number in inputs], [*inputs.values()], sampling.conditional)
    subject = replace(subject, sites=of_first(sampling.mesh, subject.sites))  # with its seconds
    uncached, calls = sampling.uncached(samples[0], steps)
    probed = [engines[number].probe(engines[number].prepare(call)) for number, call in inputs.items()]
    spent = Needs.of(probed[0], steps=steps, window=window, calls=calls).share(memory)
    task = Task(steps, window, probes, seed, sampling.conditional, sampling.names, detail, spent.tokens)
    first = engines[next(iter(inputs))]
    kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in first.flat(subject.inputs)]
    key = hashlib.sha256(repr((task, subject.graph, kinds, versions())).encode()).hexdigest()
    refuse_others(sampling.mesh, settings=key, memory=memory, samples=len(samples), path=path is None)
    places = {number: _part_path(path, number) for number in range(len(samples))}
    parts = done_by_first(sampling.mesh, partial(_known_parts, key, places))
    missing = [number for number in range(len(samples)) if number not in parts]
    progress(len(parts), len(samples))
    branches = frozenset(site.name for site in subject.sites if site.kind == "branch")
    measuring = _Measuring(tuple(engines), sampling, samples, task, spent, branches, uncached)
    for number, part in zip(missing, run(measuring, missing), strict=True):
        parts[number] = of_first(sampling.mesh, part)
        place = places[number]
        if place is not None:
            done_by_first(sampling.mesh, partial(save_part, parts[number], f"{key} {number}", place))
        progress(len(parts), len(samples))
    made = merge([parts[number] for number in range(len(samples))], subject, task, sampling)
    if backend is not None:
        sites = {name: [site.name for site in group] for name, group in families(made).items()}
        seconds = step_seconds(
            first.model, subject.inputs, sites, backend=backend, names=sampling.names, mesh=sampling.mesh
        )
        made = replace(made, timings=of_first(sampling.mesh, seconds))
    if path is not None:
        done_by_first(sampling.mesh, partial(_save, made, path, places))
    return made


def _known_parts(key: str, places: Mapping[int, Path | None]) -> dict[int, SampleProfile]:
    """What an interrupted call has left."""
    parts = dict[int, SampleProfile]()
    for number, place in places.items():
        known = None if place is None else load_part(f"{key} {number}", place)
        if known is not None:
            parts[number] = known
    return parts


def _save(made: Profile, path: str | os.PathLike[str], places: Mapping[int, Path | None]) -> None:
    save_profile(made, path)
    for place in places.values():
        assert place is not None
        place.unlink(missing_ok=True)


def _part_path(path: str | os.PathLike[str] | None, number: int) -> Path | None:
    return None if path is None else Path(path).with_name(f".{Path(path).name}.part{number}")


@dataclass(frozen=True)
class Task:
    """What is measured of every sample; see `profile`."""

    steps: int
    window: int
    probes: int
    seed: int
    conditional: str | None
    names: Names
    detail: Detail
    tokens: float


@dataclass(frozen=True)
class _Measuring:
    """Measures the sample of a number: what it tells depends on the sample and its number alone.

    `branches` are the sites of which some tokens may be looked at; `uncached` is what the first sample gave
    under another global seed.
    """

    engines: tuple[ProbeEngine, ...]
    sampling: Sampling
    samples: Sequence[Any]
    task: Task
    share: Share
    branches: frozenset[str]
    uncached: Tensor

    def __call__(self, number: int) -> SampleProfile:
        """One generation with its probes."""
        sample, task = self.samples[number], self.task
        recording = Recording(
            task.steps, task.window, task.probes, task.seed, task.conditional, task.tokens, self.branches,
            number, drifts=task.detail == "tokens", mesh=self.sampling.ranks,
        )  # fmt: skip
        left = GradientMemory(self.share.held)
        with ExitStack() as stack:
            observed = [
                stack.enter_context(engine.observed_by(recording, self.share, left))
                for engine in self.engines
            ]
            with nullcontext() if number else global_seed(1):
                models = self.sampling.wrapped(observed)
                result = self.sampling.generate(models, sample, task.steps, gradients=True)
            if not result.requires_grad:
                raise GraphCacheError(
                    "the result does not depend on the model's evaluations through differentiable "
                    "operations; let the sampler return a tensor, such as latents, none detached or rounded"
                )
            refuse_infinite(result)
            same = of_first(self.sampling.mesh, torch.equal(result, self.uncached))
            if not number and not same:
                # a graph's kernels may round otherwise than the model's: what counts is two runs of the model
                refuse_random(self.sampling, sample, task.steps, self.uncached)
            with answered(ON_THE_WAY_BACK):
                recording.turn(result)
                for probe in range(task.probes):
                    seed = (task.seed * 1_000_003 + number) * 1_003 + probe
                    generator = torch.Generator().manual_seed(seed)
                    direction = torch.randn(result.shape, generator=generator).to(result)
                    torch.autograd.backward(result, direction, retain_graph=probe + 1 < task.probes)
                    recording.next_probe()
                part = recording.part()
        refuse_infinite(*map(torch.from_numpy, (*part.gram.values(), *part.effects.values())))
        return part


def merge(parts: Sequence[SampleProfile], subject: Subject, task: Task, sampling: Sampling) -> Profile:
    """The profile of all samples, in their order.

    Raises:
        GraphCacheError: another model takes over at other steps of one than of another.
    """
    handovers = {part.handovers for part in parts}
    if len(handovers) > 1:
        raise GraphCacheError(
            f"the samples' models take over at different steps, {' and '.join(map(str, sorted(handovers)))}; "
            "give samples whose generations go alike"
        )
    sites = [site for site in subject.sites if site.name in parts[0].gram]
    names = [site.name for site in sites]
    count = len(parts)

    def mean(tables: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: by_token([table[name] for table in tables]) / count for name in tables[0]}

    bands = [part.bands for part in parts if part.bands is not None]
    summed = np.sum(bands, axis=0) / count if bands else None
    return Profile(
        provenance=Provenance(
            graph=subject.graph,
            steps=task.steps,
            scheduler=sampling.scheduler,
            samples=count,
            probes=task.probes,
            seed=task.seed,
            conditional=task.conditional,
            versions=versions(),
            tokens=task.tokens,
        ),
        sites=tuple(sites),
        gram=np.stack([np.sum([part.gram[name] for part in parts], axis=0) for name in names]),
        effects=np.stack([np.concatenate([part.effects[name] for part in parts], axis=-1) for name in names]),
        drift=mean([part.drift for part in parts]),
        ranking=mean([part.ranking for part in parts]),
        bands=summed,
        numbers=parts[0].numbers,
        flops=subject.flops,
        calls=parts[0].calls,
        unmeasured=tuple(site for site in subject.sites if site.kind == "branch" and site not in sites),
        handovers=handovers.pop(),
    )


def versions() -> dict[str, str]:
    """Of the libraries that results depend on."""
    found = {}
    for name in ("graphcache-dit", "torch", "diffusers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
