"""What a step reuses, and so what of it is stale, fresh, or a fresh stream plus a stale change."""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import Dataflow
from graphcache.analysis.ranges import cut_range
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import Branch, Hoisted, Input, StepGraph, Table
from graphcache.ir.history import range_site

LINEAR = (
    ops.VIEWS | ops.COPIES | ops.SLICES | {ops.aten.cat.default, ops.aten.add.Tensor, ops.aten.sub.Tensor}
)
"""What a change passes: f(x + d) = f(x) + f(d), but for what does not depend on d."""


class State(Enum):
    """What a value needs at the step. A `SHIFTED` one is a fresh value plus a stale change of its size."""

    FREE, TIMED, FRESH, STALE, SHIFTED = range(5)


@dataclass(frozen=True)
class Reuse:
    """The graph of a step at which `reused` are not computed.

    `freezes`: gates that depend on the timestep are reused with what they multiply.
    """

    step: StepGraph
    reused: tuple[Branch, ...]
    freezes: bool

    @cached_property
    def flow(self) -> Dataflow:
        return Dataflow(self.step)

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        return self.step.nodes()

    @cached_property
    def values(self) -> dict[fx.Node, list[Branch]]:
        found: dict[fx.Node, list[Branch]] = {}
        for branch in self.reused:
            found.setdefault(self.nodes[branch.value], []).append(branch)
        return found

    @cached_property
    def tails(self) -> set[fx.Node]:
        """From a reused value to the residual add: gate, casts, views."""
        ends = [(self.nodes[branch.value], self.nodes[branch.merge]) for branch in self.reused]
        return {node for value, merge in ends for node in self.flow.between(value, merge)}

    @cached_property
    def merges(self) -> dict[fx.Node, Branch]:
        return {self.nodes[branch.merge]: branch for branch in self.reused}

    @cached_property
    def read(self) -> list[fx.Node]:
        """What this step computes, reused values included, in order."""
        todo, seen = list(self.step.results()), set[fx.Node]()
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo.extend([] if node in self.values else node.all_input_nodes)
        return [node for node in self.flow.nodes if node in seen]

    @cached_property
    def ports(self) -> dict[fx.Node, State]:
        kinds = {"latent": State.FRESH, "timestep": State.TIMED, "constant": State.FREE}
        found = dict.fromkeys(self.step.placeholders(), State.FRESH)
        for port, node in self.step.ports():
            if isinstance(port, Input):
                found[node] = kinds[port.kind]
            elif isinstance(port, Hoisted | Table):
                found[node] = State.FREE
        return found

    @cached_property
    def alone(self) -> dict[fx.Node, State]:
        """Every node's state if no change could be kept."""
        return self._states(set())

    @cached_property
    def state(self) -> dict[fx.Node, State]:
        return self._states(self.ranged)

    def _states(self, ranged: set[fx.Node]) -> dict[fx.Node, State]:
        states = dict[fx.Node, State]()
        for node in self.flow.nodes:
            states[node] = self._state(node, states, ranged)
        return states

    def _state(self, node: fx.Node, states: dict[fx.Node, State], ranged: set[fx.Node]) -> State:
        if node in self.values:
            return State.STALE
        if node in self.ports:
            return self.ports[node]
        found = {states[item] for item in node.all_input_nodes}
        if not found & {State.STALE, State.SHIFTED}:
            return max(found, key=lambda state: state.value, default=State.FREE)
        if node in ranged and self._is_shifted(node, states):
            return State.SHIFTED
        if State.SHIFTED in found:
            passes = node.target in LINEAR and State.STALE not in found
            return State.SHIFTED if passes else State.FRESH
        mixes = State.FRESH in found or (State.TIMED in found and not self._is_frozen(node))
        return State.FRESH if mixes else State.STALE

    def _is_shifted(self, merge: fx.Node, states: dict[fx.Node, State]) -> bool:
        """Whether a residual add puts something stale on a stream that is fresh without it."""
        stream = self.nodes[self.merges[merge].stream]
        addends = {states[item] for item in merge.all_input_nodes if item is not stream}
        return states[stream] is not State.STALE and not addends & {State.FRESH, State.SHIFTED}

    def _is_frozen(self, node: fx.Node) -> bool:
        return self.freezes and node in self.tails

    @cached_property
    def outside(self) -> dict[int, str]:
        """Why blocks with reused branches are in no range."""
        blocks = sorted({branch.block for branch in self.reused})
        return {block: reason for block in blocks if (reason := self._outside(block))}

    @cached_property
    def ranged(self) -> set[fx.Node]:
        """The residual adds of blocks that a range may hold."""
        return {merge for merge, branch in self.merges.items() if branch.block not in self.outside}

    def _outside(self, block: int) -> str | None:
        inside = [branch for branch in self.step.branches if branch.block == block]
        if block < 0:
            return f"{inside[0].name} stands in no block"
        computed = [branch.name for branch in inside if branch not in self.reused]
        if computed:
            return f"{computed[0]} of the same block computes"
        try:
            cut_range(self.step, range_site(block, block), block, block)
        except PlanError as error:
            return str(error)
        return next(filter(None, map(self._addend, inside)), None)

    def _addend(self, branch: Branch) -> str | None:
        """Why what a branch adds to its stream is not stale."""
        merge, stream = self.nodes[branch.merge], self.nodes[branch.stream]
        bad = {State.FRESH} if self._is_frozen(merge) else {State.FRESH, State.TIMED}
        for item in merge.all_input_nodes:
            if item is not stream and self.alone[item] in bad:
                return self.mixed(branch)
        return None

    def mixed(self, branch: Branch) -> str:
        """Where this step's values come into the way from a branch's value to its residual add."""
        value, merge = self.nodes[branch.value], self.nodes[branch.merge]
        for node in self.flow.between(value, merge)[1:]:
            for item in node.all_input_nodes:
                if item.name == branch.stream or self.flow.reaches(value, item):
                    continue
                if self.alone[item] is State.FRESH:
                    return f"{node} gates {branch.name} by {item}, which depends on this step's latents"
                if self.alone[item] is State.TIMED and not self.freezes:
                    return f"{node} gates {branch.name} by {item}, which depends on the timestep"
        return f"what {branch.name} adds to the stream depends on this step"

    def carries(self, node: fx.Node) -> bool:
        return self.state[node] in (State.STALE, State.SHIFTED)

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The stale values and changes that a stale value or change is made of."""
        operands = [] if node in self.values else node.all_input_nodes
        return [item for item in operands if self.carries(item)]

    @cached_property
    def behind(self) -> dict[fx.Node, list[Branch]]:
        """The reused branches behind every stale value and change."""
        found: dict[fx.Node, list[Branch]] = {}
        for node in filter(self.carries, self.read):
            names = set(self.values.get(node, ())).union(*(found[item] for item in self.operands(node)))
            found[node] = [branch for branch in self.reused if branch in names]
        return found
