"""How ranks share a captured step: one `Shard` pass for each dimension of a mesh."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from graphcache.analysis.dataflow import Dataflow
from graphcache.analysis.shard_layout import Axis
from graphcache.analysis.shards import Entry, Given, beginnings, shards, values
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import Hoisted, StepGraph
from graphcache.ir.ranks import Ranks
from graphcache.ir.schedule import Phase, Schedule
from graphcache.passes.shard import Shard

Ranges = tuple[tuple[str, int, int], ...]


@dataclass
class Sharding:
    """The passes for the phases of one step: as it was captured, and without what is computed once."""

    captured: StepGraph
    step: StepGraph
    mesh: tuple[Ranks, ...]
    _made: dict[tuple[Ranges, bool], tuple[Shard, ...]] = field(default_factory=dict)

    def passes(self, phase: Phase, schedule: Schedule) -> list[Shard]:
        """What makes a rank's part of a phase.

        Raises:
            PlanError: ranks cannot share the model, or the plan.
        """
        refuse_unshared(schedule, self.mesh)
        return [_packed(item, phase) for item in self.shared(schedule.ranges, schedule.guided is not None)]

    def shared(self, ranges: Ranges, guided: bool = False) -> tuple[Shard, ...]:
        """What makes a rank's part of the step, where the values of these ranges are handed out.

        Raises:
            PlanError: ranks cannot share the model.
        """
        key = ranges, guided
        if key not in self._made:
            self._made[key] = tuple(self._passes(*key))
        return self._made[key]

    def _passes(self, ranges: Ranges, guided: bool) -> list[Shard]:
        captured, step, found = self.captured, self.step, list[Shard]()
        # what guidance makes of results it makes of whole ones
        ends = frozenset(node.name for node in step.results() if guided)
        for ranks in self.mesh:
            before, made = _first_way(captured, step, ranks, ends, ranges)
            if ranks is not self.mesh[-1]:
                captured, step = before(captured), made(step)
            found.append(made)
        return found


def _first_way(
    captured: StepGraph, step: StepGraph, ranks: Ranks, ends: frozenset[str], ranges: Ranges
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
            entries = values(step, given, ranges)
            return Shard(ranks, starts, {}, ends), Shard(ranks, given.starts, entries, ends)
        except PlanError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _packed(item: Shard, phase: Phase) -> Shard:
    """The same pass where a value is cached in three parts, each split as it is."""
    names = {history.site for history, action in phase.actions if action.packed}
    entries = dict[Entry, Axis]()
    for (name, part), axis in item.entries.items():
        places = range(3 * part, 3 * part + 3) if name in names else [part]
        entries |= {(name, place): axis for place in places}
    return Shard(item.ranks, item.starts, entries, item.ends)


def refuse_unshared(schedule: Schedule, mesh: Sequence[Ranks]) -> None:
    """Raise PlanError if a plan asks for what ranks cannot share."""
    actions = [(history, action) for phase in schedule.phases for history, action in phase.actions]
    for history, action in actions:
        if action.budget is not None or action.measure is not None:
            raise PlanError(
                f"mesh=: {history.site} has a budget of tokens, and each rank holds its own part of them "
                "alone: which ones are computed would have to be gathered from all ranks. Let the site "
                "compute or reuse whole, or run the plan without mesh="
            )
    if schedule.guided is not None and any(ranks.shared == "guidance" for ranks in mesh):
        raise PlanError(
            "mesh=: the ranks share out the samples of guidance's branches, and row guidance leaves out one "
            "of the branches: share out tokens, or take a plan without that row"
        )
