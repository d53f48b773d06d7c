"""`profile`: measure a model's sensitivity along its own sampling, from few runs."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphcache.analysis.branches import branch_flops
from graphcache.analysis.cost import graph_flops
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.graph import storage_bytes, value_of
from graphcache.ir.selector import Selector
from graphcache.probing import OUTPUT, ProbeEngine
from graphcache.profile import Profile, Provenance, Site
from graphcache.program import Program
from graphcache.recording import GUIDANCE, Recording
from graphcache.sampling import Sampler, Sampling, refuse_random
from graphcache.transform import wrapped

Progress = Callable[[int, int], None]
RANGES = ((0.0, 1.0), (0.0, 0.5))


def profile(
    model_or_pipe: Any,
    samples: Sequence[Any],
    *,
    steps: int,
    sampler: Sampler | None = None,
    probes: int = 2,
    window: int = 12,
    conditional: str | None = None,
    timestep: str = "timestep",
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    progress: Progress = lambda done, total: None,
) -> Profile:
    """Measure a model's sensitivity along its own sampling.

    Each sample costs one generation, and about three more for each probe. Nothing is kept of an evaluation
    but its inputs; gradients are held for `window` steps.

    Args:
        model_or_pipe: a module in eval mode, or a pipeline with one transformer.
        samples: what the sampler takes; of a pipeline mappings of its call's arguments.
        steps: model evaluations of one generation.
        sampler: runs a bare module through a generation; a pipeline is its own.
        probes: random vectors carried back through each generation.
        window: steps back to which effects are followed.
        conditional: "first" or "last", the conditional half of a doubled batch; two calls tell by context.
        timestep: the name of the timestep argument.
        seed: of the probes and the sketch.
        path: where to write; until then every sample's part lies beside it, and the next call takes those up.
        progress: told (samples done, samples in all).

    Raises:
        GraphCacheError: the sampler is random, or the model cannot be captured.
    """
    if not samples:
        raise GraphCacheError("samples is empty: profiling needs at least one")
    sampling = Sampling.of(model_or_pipe, sampler)
    refuse_random(sampling, samples[0], steps)
    task = Task(steps, min(window, steps - 1), probes, seed, conditional, timestep)
    subject = describe(sampling, samples[0], task)
    parts = []
    for number, sample in enumerate(samples):
        progress(number, len(samples))
        parts.append(measure(sampling, sample, number, task, subject))
    progress(len(samples), len(samples))
    return merge(parts, subject, task, sampling)


@dataclass(frozen=True)
class Task:
    """What is measured of every sample; see `profile`."""

    steps: int
    window: int
    probes: int
    seed: int
    conditional: str | None
    timestep: str


@dataclass(frozen=True)
class Subject:
    """What a model looks like from outside: its fingerprint, sites and ranges."""

    graph: str
    sites: tuple[Site, ...]
    ranges: tuple[tuple[str, int, int], ...]
    flops: int


class _Silent:
    def saw(self, *_: Any) -> None: ...

    def pulled(self, *_: Any) -> None: ...


class _Enough(Exception):
    """Ends a generation whose first evaluation was all that was needed."""


def describe(sampling: Sampling, sample: Any, task: Task) -> Subject:
    """Capture the model at the first call of a sample."""
    program = first_program(sampling, sample, task)
    step = program.step
    work, nodes = branch_flops(step), step.nodes()
    sites = [
        Site(branch.name, "branch", work[branch.name], storage_bytes(value_of(nodes[branch.value])))
        for branch in step.branches
    ]
    ranges = tuple(dict.fromkeys(_bounds(depths, step.blocks) for depths in RANGES)) if step.blocks else ()
    total = graph_flops(step)
    stream = max((site.bytes_kept for site in sites), default=0)
    for name, first, last in ranges:
        inside = sum(work[b.name] for b in step.branches if first <= b.block <= last)
        sites.append(Site(name, "range", inside, stream))
    result = sum(storage_bytes(value_of(node)) for node in step.results())
    sites.append(Site(OUTPUT, "output", total, result))
    if task.conditional is not None:
        sites.append(Site(GUIDANCE, "guidance", total // 2, result // 2))
    return Subject(program.fingerprint, tuple(sites), ranges, total)


def first_program(sampling: Sampling, sample: Any, task: Task) -> Program:
    """The program of a sample's first call."""

    class _Stopping(ProbeEngine):
        def evaluate(self, branch: Any, state: Any, tensors: Sequence[Tensor]) -> Any:
            found.append(state.program)
            raise _Enough

    found: list[Program] = []
    engine = _Stopping(sampling.model, task.steps, _Silent(), (), task.timestep, sampling.pipe)
    try:
        sampling.generate(wrapped(sampling.model, engine), sample, task.steps)
    except _Enough:
        return found[0]
    raise GraphCacheError("the sampler never called the model it was given; it must call its first argument")


def _bounds(depths: tuple[float, float], blocks: int) -> tuple[str, int, int]:
    inside = Selector.parse(f"range({depths[0]}..{depths[1]})").blocks(blocks)
    return f"range({inside[0]}..{inside[-1]})", inside[0], inside[-1]


def measure(sampling: Sampling, sample: Any, number: int, task: Task, subject: Subject) -> Recording:
    """One generation with its probes: what it tells depends on the sample and its number alone."""
    recording = Recording(task.steps, task.window, task.probes, task.seed, task.conditional)
    engine = ProbeEngine(sampling.model, task.steps, recording, subject.ranges, task.timestep, sampling.pipe)
    result = sampling.generate(wrapped(sampling.model, engine), sample, task.steps, gradients=True)
    if not result.requires_grad:
        raise GraphCacheError(
            "the result does not depend on the model's evaluations through differentiable operations; let "
            "the sampler return a tensor, such as latents, and no detached or rounded one"
        )
    recording.turn(result)
    for probe in range(task.probes):
        generator = torch.Generator().manual_seed((task.seed * 1_000_003 + number) * 1_003 + probe)
        direction = torch.randn(result.shape, generator=generator).to(result)
        torch.autograd.backward(result, direction, retain_graph=probe + 1 < task.probes)
        recording.next_probe()
    return recording


def merge(parts: Sequence[Recording], subject: Subject, task: Task, sampling: Sampling) -> Profile:
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
