"""`profile`: measure a model's sensitivity along its own sampling, from few runs."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphcache.analysis.branches import branch_flops
from graphcache.analysis.cost import graph_flops
from graphcache.analysis.dataflow import Dataflow
from graphcache.analysis.tokens import cut_tokens
from graphcache.compiler.backends import Backend, refuse_unknown
from graphcache.compiler.guidance_half import is_doubled
from graphcache.compiler.program import Program
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.graph import Branch, storage_bytes, value_of
from graphcache.ir.history import GUIDANCE, OUTPUT, History, range_site
from graphcache.ir.plan import COMPUTE, REUSE, Plan, Row
from graphcache.ir.roles import Names
from graphcache.ir.selector import Selector
from graphcache.planning.calibration import site_seconds, step_seconds
from graphcache.planning.gradient_memory import MEMORY
from graphcache.planning.probing import ProbeEngine
from graphcache.planning.profile import Profile, Provenance, SampleProfile, Site, families
from graphcache.planning.profile_file import load_part, save_part, save_profile
from graphcache.planning.recording import Recording
from graphcache.planning.sampling import (
    Sampler,
    Sampling,
    global_seed,
    refuse_infinite,
    refuse_random,
    with_frozen_weights,
)
from graphcache.runtime.engine import Engine
from graphcache.runtime.options import Options
from graphcache.runtime.transform import wrapped

Progress = Callable[[int, int], None]
Run = Callable[[Callable[[int], SampleProfile], Sequence[int]], Iterable[SampleProfile]]
RANGES = ((0.0, 1.0), (0.0, 0.5))


@with_frozen_weights
def profile(
    model_or_pipe: Any,
    samples: Sequence[Any],
    *,
    steps: int,
    sampler: Sampler | None = None,
    probes: int = 2,
    window: int = 12,
    conditional: str | None = None,
    timestep: str | None = None,
    latents: str | Sequence[str] = (),
    seed: int = 0,
    memory: int = MEMORY,
    backend: Backend = None,
    path: str | os.PathLike[str] | None = None,
    progress: Progress = lambda done, total: None,
    run: Run = map,
) -> Profile:
    """Measure a model's sensitivity along its own sampling.

    Each sample costs one generation, and two to three more for each probe. Of evaluations that do not fit
    into `memory` the inputs are kept alone, and they are computed again for each probe; gradients are held
    for `window` steps.

    Args:
        model_or_pipe: a module in eval mode, a pipeline with one transformer, or a `Sampling` of either,
            which then has the sampler, the names and the conditional half.
        samples: what the sampler takes; of a pipeline mappings of its call's arguments.
        steps: model evaluations of one generation.
        sampler: runs a bare module through a generation; a pipeline is its own.
        probes: random vectors carried back through each generation.
        window: steps back to which effects are followed.
        conditional: "first" or "last", the conditional half of a doubled batch; two calls tell by context.
        timestep: the name of the timestep argument, if it is not found.
        latents: those of the latents, as for `transform`.
        seed: of the probes and the sketch.
        memory: bytes that evaluations' intermediate results may take, in each worker of a cluster; changes no
            result on a CPU.
        backend: compiles and times a step of every family of sites; None leaves times out, and plans are
            priced by their FLOPs.
        path: where to write; until then every sample's part lies beside it, and the next call takes those up.
        progress: told (samples done, samples in all).
        run: maps a function over the samples' numbers; a cluster's map gives the same result.

    Raises:
        GraphCacheError: the sampler is random, or the model cannot be captured.
    """
    if not samples:
        raise GraphCacheError("samples is empty: profiling needs at least one")
    refuse_unknown(backend)
    sampling = Sampling.of(model_or_pipe, sampler, timestep, latents, conditional)
    task = Task(steps, min(window, steps - 1), probes, seed, sampling.conditional, sampling.names)
    engine = ProbeEngine(sampling.model, Options(Plan(steps), names=sampling.names), sampling.pipe, memory)
    subject = describe(engine, sampling.first_call(samples[0], steps), sampling.conditional)
    engine.ranges = subject.ranges
    kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in engine.flat(subject.inputs)]
    key = hashlib.sha256(repr((task, subject.graph, kinds, versions())).encode()).hexdigest()
    parts: dict[int, SampleProfile] = {}
    places = {number: _part_path(path, number) for number in range(len(samples))}
    for number, place in places.items():
        known = None if place is None else load_part(f"{key} {number}", place)
        if known is not None:
            parts[number] = known
    missing = [number for number in range(len(samples)) if number not in parts]
    progress(len(parts), len(samples))
    uncached = {}
    for number in missing[:1]:
        with global_seed(0):
            uncached[number] = sampling.generate(sampling.model, samples[number], steps)
    measuring = _Measuring(engine, sampling, samples, task, uncached)
    for number, part in zip(missing, run(measuring, missing), strict=True):
        place = places[number]
        if place is not None:
            save_part(part, f"{key} {number}", place)
        parts[number] = part
        progress(len(parts), len(samples))
    made = merge([parts[number] for number in range(len(samples))], subject, task, sampling)
    if backend is not None:
        sites = {name: [site.name for site in group] for name, group in families(made).items()}
        seconds = step_seconds(sampling.model, subject.inputs, sites, backend=backend, names=sampling.names)
        made = replace(made, timings=seconds)
    if path is not None:
        save_profile(made, path)
        for place in places.values():
            assert place is not None
            place.unlink(missing_ok=True)
    return made


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


@dataclass(frozen=True)
class Subject:
    """What a model looks like from outside: its fingerprint, sites and ranges, and one call's arguments."""

    graph: str
    sites: tuple[Site, ...]
    ranges: tuple[tuple[str, int, int], ...]
    flops: int
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class _Measuring:
    """Measures the sample of a number; `uncached`: results under another global seed, by number."""

    engine: ProbeEngine
    sampling: Sampling
    samples: Sequence[Any]
    task: Task
    uncached: Mapping[int, Tensor]

    def __call__(self, number: int) -> SampleProfile:
        sample, uncached = self.samples[number], self.uncached.get(number)
        return measure(self.engine, self.sampling, sample, number, self.task, uncached)


def describe(engine: Engine, inputs: Mapping[str, Any], conditional: str | None) -> Subject:
    """Capture the model for the arguments of a sample's first call."""
    with torch.no_grad():
        program = engine.prepare(inputs)
    step = program.step
    tensors = engine.flat(inputs)
    call = program.captured.call
    call.sole_latent(tensors, "profile")
    if conditional is not None and not is_doubled(call.given_latents(tensors)):
        raise GraphCacheError(
            f"conditional={conditional!r} is for a model that one call a step runs on both halves of a "
            "doubled batch; here the halves are not the same latents: leave it out without guidance, and "
            "where the branches are called one by one"
        )
    work, nodes, seconds = branch_flops(step), step.nodes(), site_seconds(program, tensors)
    flow = Dataflow(step)
    sites = [
        Site(
            b.name,
            "branch",
            work[b.name],
            storage_bytes(value_of(nodes[b.value])),
            seconds[b.name],
            _token_bytes(flow, b),
        )
        for b in step.block_branches
    ]
    total, result = graph_flops(step), sum(storage_bytes(value_of(node)) for node in step.results())
    ranges = []
    for name, first, last in dict.fromkeys(_bounds(depths, step.blocks) for depths in RANGES if step.blocks):
        try:
            left, kept = _reused(program, name)
        except PlanError:
            continue
        spent = sum(seconds[b.name] for b in step.branches if first <= b.block <= last)
        ranges.append((name, first, last))
        sites.append(Site(name, "range", total - left, kept, spent))
    sites.append(Site(OUTPUT, "output", total, result, seconds[OUTPUT]))
    sites.append(Site(GUIDANCE, "guidance", total // 2, result // 2, seconds[OUTPUT] / 2))
    return Subject(program.fingerprint, tuple(sites), tuple(ranges), total, inputs)


def _reused(program: Program, name: str) -> tuple[int, int]:
    """FLOPs of a step that reuses a site, and the bytes that are kept for it.

    Raises:
        PlanError: the site cannot be cached.
    """
    schedule = program.schedule(Plan(2, rows=(Row(Selector.parse(name), COMPUTE + REUSE),)))
    left = graph_flops(program.phase(schedule, schedule.steps[1].phase).step)
    return left, program.entry_bytes(schedule)[History(name)]


def _token_bytes(flow: Dataflow, branch: Branch) -> int:
    """Bytes kept for a branch that computes some of its tokens alone; 0 if it cannot."""
    try:
        cut = cut_tokens(flow, branch)
    except PlanError:
        return 0
    return sum(storage_bytes(value_of(node)) for node in (cut.value, *cut.memory))


def _bounds(depths: tuple[float, float], blocks: int) -> tuple[str, int, int]:
    inside = Selector.parse(f"range({depths[0]}..{depths[1]})").blocks(blocks)
    return range_site(inside[0], inside[-1]), inside[0], inside[-1]


def measure(
    engine: ProbeEngine,
    sampling: Sampling,
    sample: Any,
    number: int,
    task: Task,
    uncached: Tensor | None = None,
) -> SampleProfile:
    """One generation with its probes: what it tells depends on the sample and its number alone.

    `uncached` is what the sample gave under another global seed.
    """
    recording = Recording(task.steps, task.window, task.probes, task.seed, task.conditional)
    with engine.observed_by(recording) as observed:
        with nullcontext() if uncached is None else global_seed(1):
            model = wrapped(sampling.model, observed)
            result = sampling.generate(model, sample, task.steps, gradients=True)
        if not result.requires_grad:
            raise GraphCacheError(
                "the result does not depend on the model's evaluations through differentiable operations; "
                "let the sampler return a tensor, such as latents, and no detached or rounded one"
            )
        refuse_infinite(result)
        if uncached is not None and not torch.equal(result, uncached):
            # a graph's kernels may round otherwise than the model's: what counts is two runs of the model
            refuse_random(sampling, sample, task.steps)
        recording.turn(result)
        for probe in range(task.probes):
            generator = torch.Generator().manual_seed((task.seed * 1_000_003 + number) * 1_003 + probe)
            direction = torch.randn(result.shape, generator=generator).to(result)
            torch.autograd.backward(result, direction, retain_graph=probe + 1 < task.probes)
            recording.next_probe()
    part = recording.part()
    refuse_infinite(*map(torch.from_numpy, (*part.gram.values(), *part.effects.values())))
    return part


def merge(parts: Sequence[SampleProfile], subject: Subject, task: Task, sampling: Sampling) -> Profile:
    """The profile of all samples, in their order."""
    sites = [site for site in subject.sites if site.name in parts[0].gram]
    names = [site.name for site in sites]
    count = len(parts)

    def mean(tables: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.sum([table[name] for table in tables], axis=0) / count for name in tables[0]}

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
