"""How ranks share a captured step: one `Shard` pass for each dimension of a mesh."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graphcache.analysis.dataflow import Dataflow
from graphcache.analysis.shard_layout import Axis
from graphcache.analysis.shards import Entry, Given, beginnings, shards, values
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import CacheRead, Hoisted, Output, StepGraph, fake_mode, value_of
from graphcache.ir.history import History
from graphcache.ir.ranks import Ranks
from graphcache.ir.schedule import Memory, Phase, Schedule
from graphcache.passes.shard import Shard

Ranges = tuple[tuple[str, int, int], ...]
Memories = tuple[Memory, ...]


@dataclass
class Sharding:
    """The passes for the phases of one step: as it was captured, and without what is computed once."""

    captured: StepGraph
    step: StepGraph
    mesh: tuple[Ranks, ...]
    _made: dict[tuple[Ranges, Memories, bool], tuple[Shard, ...]] = field(default_factory=dict)

    def passes(self, phase: Phase, schedule: Schedule) -> list[Shard]:
        """What makes a rank's part of a phase.

        Raises:
            PlanError: ranks cannot share the model, or the plan.
        """
        refuse_unshared(schedule, self.mesh)
        found = self.shared(schedule.ranges, schedule.memories, schedule.guided is not None)
        return [_packed(item, phase) for item in found]

    def shared(self, ranges: Ranges, memories: Memories = (), guided: bool = False) -> tuple[Shard, ...]:
        """What makes a rank's part of the step, where the values of these ranges are handed out.

        Raises:
            PlanError: ranks cannot share the model.
        """
        key = ranges, memories, guided
        if key not in self._made:
            self._made[key] = tuple(self._passes(*key))
        return self._made[key]

    def _passes(self, ranges: Ranges, memories: Memories, guided: bool) -> list[Shard]:
        captured, step, found = self.captured, self.step, list[Shard]()
        # what guidance makes of results it makes of whole ones
        ends = frozenset(node.name for node in step.results() if guided)
        for ranks in self.mesh:
            before, made = _first_way(captured, step, ranks, ends, ranges, memories)
            if ranks is not self.mesh[-1]:
                captured, step = before(captured), made(step)
            found.append(made)
        return found


def _first_way(
    captured: StepGraph,
    step: StepGraph,
    ranks: Ranks,
    ends: frozenset[str],
    ranges: Ranges,
    memories: Memories,
) -> tuple[Shard, Shard]:
    """The first way to share the streams out that needs no exchange but in attention and at the end: for the
    captured step, and for what is left of it at every step.
    """
    refused: PlanError | None = None
    for starts in beginnings(Dataflow(captured), ranks):
        try:
            before = shards(captured, Given(starts, ends=ends))
            nodes = captured.nodes()
            # what is computed once of a stream is whole, and a part of it is read
            held = {
                node.name: axis
                for port, node in step.ports()
                if isinstance(port, Hoisted) and (axis := before.axis(nodes[port.name]))
            }
            given = Given(starts | held, ends=ends)
            entries = values(step, given, ranges, memories)
            return Shard(ranks, starts, {}, ends), Shard(ranks, given.starts, entries, ends)
        except PlanError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _packed(item: Shard, phase: Phase) -> Shard:
    """The same pass where a value is cached in three parts, each split as it is."""
    names = {history.site for history, action in phase.actions if action.packed}
    entries = dict[Entry, Axis]()
    for (history, part), axis in item.entries.items():
        packed = history.is_value and history.site in names
        places = range(3 * part, 3 * part + 3) if packed else [part]
        entries |= {(history, place): axis for place in places}
    return Shard(item.ranks, item.starts, entries, item.ends)


def handed_on(step: StepGraph, history: History, halved: bool) -> StepGraph:
    """A graph that gives a site's newest value as it is; `halved`: of half the batch's rows."""
    graph, value = fx.Graph(), value_of(step.nodes()[_value(step, history.site)])
    with fake_mode(value):
        size = [value.shape[0] // 2, *value.shape[1:]] if halved else list(value.shape)
        entry = torch.empty(size, dtype=value.dtype, device=value.device)
    node = graph.placeholder("entry")
    node.meta["val"] = entry
    result = graph.call_function(torch.ops.aten.alias.default, (node,))
    result.meta["val"] = entry
    graph.output((result,))
    port = CacheRead(history, 0, 0)
    return StepGraph(step.root, graph, (port,), (Output(0),))


def _value(step: StepGraph, site: str) -> str:
    return next(branch.value for branch in step.branches if branch.name == site)


def refuse_unshared(schedule: Schedule, mesh: Sequence[Ranks]) -> None:
    """Raise PlanError if a plan asks for what ranks cannot share."""
    if schedule.guided is not None and any(ranks.shared == "guidance" for ranks in mesh):
        raise PlanError(
            "mesh=: the ranks share out the samples of guidance's branches, and row guidance leaves out one "
            "of the branches: share out tokens, or take a plan without that row"
        )
