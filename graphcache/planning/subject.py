"""What a model looks like from outside: its sites, and what they cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcache.analysis.branches import branch_flops
from graphcache.analysis.cost import graph_flops
from graphcache.analysis.dataflow import Dataflow
from graphcache.analysis.rounding import rounded_within
from graphcache.analysis.tokens import cut_tokens
from graphcache.compiler.guidance_half import is_doubled
from graphcache.compiler.program import Program
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.graph import Branch, StepGraph, storage_bytes, value_of
from graphcache.ir.history import GUIDANCE, OUTPUT, History, range_site
from graphcache.ir.plan import COMPUTE, REUSE, Plan, Row
from graphcache.ir.selector import Selector
from graphcache.planning.calibration import site_seconds
from graphcache.planning.probing import ProbeEngine
from graphcache.planning.profile import Site
from graphcache.runtime.engine import Engine

RANGES = ((0.0, 1.0), (0.0, 0.5))


@dataclass(frozen=True)
class Subject:
    """What a model looks like from outside: its fingerprint, sites and ranges, and one call's arguments."""

    graph: str
    sites: tuple[Site, ...]
    ranges: tuple[tuple[str, int, int], ...]
    flops: int
    inputs: Mapping[str, Any]


def describe(engine: Engine, inputs: Mapping[str, Any], conditional: str | None) -> Subject:
    """Capture the model for the arguments of a sample's first call."""
    with torch.no_grad():
        program = engine.prepare(inputs).alone
    step = program.step
    refuse_rounding(step)
    tensors = engine.flat(inputs)
    call = program.captured.call
    call.latent_argument(tensors, "profile")
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
    found = ranges(program)
    for (name, first, last), (left, kept) in found.items():
        spent = sum(seconds[b.name] for b in step.branches if first <= b.block <= last)
        sites.append(Site(name, "range", total - left, kept, spent))
    sites.append(Site(OUTPUT, "output", total, result, seconds[OUTPUT]))
    sites.append(Site(GUIDANCE, "guidance", total // 2, result // 2, seconds[OUTPUT] / 2))
    return Subject(program.fingerprint, tuple(sites), tuple(found), total, inputs)


def described(
    engines: Sequence[ProbeEngine], calls: Sequence[Mapping[str, Any]], conditional: str | None
) -> Subject:
    """What models that take turns look like; they look alike. Their engines are told of the ranges.

    Raises:
        GraphCacheError: the models' graphs differ.
    """
    found = [describe(*pair, conditional) for pair in zip(engines, calls, strict=True)]
    for subject, engine in zip(found, engines, strict=True):
        if subject.graph != found[0].graph:
            raise GraphCacheError(
                f"the models that take turns have different graphs: {type(engines[0].model).__name__} "
                f"{found[0].graph}, and {type(engine.model).__name__} {subject.graph}; one plan is for one "
                "graph: choose with Sampling.of(pipe, parts=...), or profile each as a module, with a "
                "sampler of its own"
            )
        engine.ranges = subject.ranges
    return found[0]


def refuse_rounding(step: StepGraph) -> None:
    """Raise GraphCacheError if a step has no gradients that say anything, since it rounds activations."""
    place = rounded_within(step)
    if place is not None:
        raise GraphCacheError(
            f"module '{place}' rounds its activations to eight bits, so that there are no gradients through "
            "it to measure or train with: profile and tune the model before it is quantised, or with weights "
            "quantised alone; plans for it fit this model too"
        )


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


def ranges(program: Program) -> dict[tuple[str, int, int], tuple[int, int]]:
    """The ranges of blocks that can be cached: FLOPs of a step that reuses one, and the bytes kept for it."""
    found, blocks = {}, program.step.blocks
    for bounds in dict.fromkeys(_bounds(depths, blocks) for depths in RANGES if blocks):
        try:
            found[bounds] = _reused(program, bounds[0])
        except PlanError:
            continue
    return found


def _bounds(depths: tuple[float, float], blocks: int) -> tuple[str, int, int]:
    inside = Selector.parse(f"range({depths[0]}..{depths[1]})").blocks(blocks)
    return range_site(inside[0], inside[-1]), inside[0], inside[-1]
