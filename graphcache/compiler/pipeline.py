"""The passes in their order, from what was captured to what a backend is given.

A captured step is `analysed`. What holds for a whole generation goes into its `prologue`, the rest is
`repeated` at every step: `specialised` for each phase of a plan, or `observed` while a model is profiled.
"""

from collections.abc import Sequence, Set

from graphcache.ir.graph import StepGraph
from graphcache.ir.history import History
from graphcache.ir.schedule import Phase, Schedule
from graphcache.passes.base import Observer, Pass, run
from graphcache.passes.guidance import Guide
from graphcache.passes.hoist import Hoist, Prologue
from graphcache.passes.narrow import Narrow
from graphcache.passes.offload import Offload
from graphcache.passes.probe import Probe
from graphcache.passes.simplify import Simplify
from graphcache.passes.specialize import Specialize
from graphcache.passes.split import Split
from graphcache.passes.tag import Tag


def analysed(captured: StepGraph, split: bool, observers: Sequence[Observer] = ()) -> StepGraph:
    """A captured graph simplified, its branches found; `split`: fused branches as two sites."""
    passes: list[Pass] = [Simplify(), Tag()]
    if split:
        passes.append(Split())
    return run(passes, captured, observers)


def prologue(step: StepGraph, held: tuple[str, ...], observers: Sequence[Observer] = ()) -> StepGraph:
    """What computes the values that hold for a generation."""
    return run([Prologue(held)], step, observers)


def repeated(step: StepGraph, held: tuple[str, ...], observers: Sequence[Observer] = ()) -> StepGraph:
    """What is left to compute at every step."""
    return run([Hoist(held)], step, observers)


def specialised(
    step: StepGraph,
    phase: Phase,
    schedule: Schedule,
    moved: Set[History],
    compiles: bool,
    observers: Sequence[Observer] = (),
    shards: Sequence[Pass] = (),
) -> StepGraph:
    """One phase of a schedule; `moved` histories are kept in host memory, a backend `compiles` it, and
    `shards` make it one rank's part.
    """
    guided = schedule.guided
    conditional = guided.conditional if guided else None
    passes: list[Pass] = [Specialize(phase, schedule.ranges, conditional, schedule.memories)]
    if guided is not None:
        passes.append(Guide(phase, guided))
    passes += shards
    if compiles:
        # what is not compiled keeps the bits of the untouched model
        passes.append(Narrow())
    if moved:
        passes.append(Offload(moved))
    return run(passes, step, observers)


def observed(
    step: StepGraph,
    branches: Sequence[str],
    ranges: Sequence[tuple[str, int, int]],
    shards: Sequence[Pass] = (),
) -> StepGraph:
    """The step that hands out what its sites compute; `shards` make it one rank's part."""
    return run([Probe(branches, ranges), *shards], step)
