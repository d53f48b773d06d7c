"""Which dimension of each value indexes tokens: how a branch is computed for some of them alone."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import Dataflow
from graphcache.analysis.token_rules import Axis, Untokenised, demands
from graphcache.analysis.ways import unwrap
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import Branch, Hoisted, StepGraph, has_static_shape, is_tensor, value_of
from graphcache.ir.opaque import called
from graphcache.ir.schedule import Memory, memory


@dataclass(frozen=True)
class TokenCut:
    """How a branch runs on a budget of its stream's tokens.

    The stream is (rows, tokens, channels). `computed` are the values to be computed for the chosen tokens
    only, in graph order, and `gathered` those of which the chosen tokens are taken; both with the dimension
    that indexes tokens. `memory` are operands that the chosen tokens meet whole, attention's keys and values,
    each with the same analysis of how its own tokens' part is computed.
    """

    site: str
    value: fx.Node
    rows: int
    tokens: int
    computed: Mapping[fx.Node, Axis]
    gathered: Mapping[fx.Node, Axis]
    memory: Mapping[fx.Node, "TokenCut"]


def cut_tokens(flow: Dataflow, branch: Branch) -> TokenCut:
    """Find how a branch is computed for some tokens.

    Raises:
        PlanError: an operation of the branch mixes tokens, or is not known; named with its site.
    """
    search = _Search(flow, branch)
    try:
        return search.cut(search.value, Axis.over(search.value, search.tokens))
    except Untokenised as error:
        raise PlanError(
            f"site {branch.name}: no token budget, since node {error.node.name} ({error.node.target}) "
            f"{error}; let the site compute or reuse whole"
        ) from None


@dataclass
class _Search:
    """Walks back from a branch's value to its stream, asking every operation where its tokens come from."""

    flow: Dataflow
    branch: Branch
    nodes: dict[str, fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = self.flow.step.nodes()

    @cached_property
    def value(self) -> fx.Node:
        return self.nodes[self.branch.value]

    @cached_property
    def stream(self) -> fx.Node:
        return self.nodes[self.branch.stream]

    @cached_property
    def rows(self) -> int:
        return int(value_of(self.stream).shape[0])

    @cached_property
    def tokens(self) -> int:
        shape = value_of(self.stream).shape
        if len(shape) != 3:
            raise Untokenised(self.stream, f"is {tuple(shape)}, not (rows, tokens, channels)")
        return int(shape[1])

    @cached_property
    def own(self) -> set[fx.Node]:
        """Values on the branch's own stream: its tokens in their order."""
        found = set()
        for other in self.flow.step.branches:
            if other.context == self.branch.context:
                found |= {self.nodes[other.stream], self.nodes[other.merge], unwrap(self.nodes[other.stream])}
        shape = value_of(self.stream).shape
        found = {node for node in found if has_static_shape(node) and value_of(node).shape == shape}
        if self.branch.context:
            # of the first block's text a norm may have been hoisted, and with it the stream
            held = (node for port, node in self.flow.step.ports() if isinstance(port, Hoisted))
            found |= {n for n in held if has_static_shape(n) and value_of(n).shape[:2] == shape[:2]}
        return found

    @cached_property
    def streams(self) -> set[fx.Node]:
        found = set()
        for other in self.flow.step.branches:
            found |= {self.nodes[other.stream], self.nodes[other.merge]}
        return found | self.own

    def cut(self, value: fx.Node, axis: Axis) -> TokenCut:
        """What computes the chosen tokens of a value along an axis."""
        computed: dict[fx.Node, Axis] = {}
        gathered: dict[fx.Node, Axis] = {}
        memory: dict[fx.Node, TokenCut] = {}
        todo = [(value, axis)]
        while todo:
            node, axis = todo.pop()
            known = computed.get(node) or gathered.get(node)
            if known is not None:
                if known != axis:
                    raise Untokenised(node, "is read along two dimensions")
                continue
            if self._is_boundary(node):
                gathered[node] = self._gathered(node, axis)
                continue
            if ops.is_result_of_call(node):
                call = called(node.all_input_nodes[0])
                assert call is not None
                raise Untokenised(
                    node, f"calls module '{call.place}', which was not traced and may mix tokens"
                )
            computed[node] = axis
            wanted = demands(node, axis)
            todo += wanted.along
            for item in wanted.whole:
                if item not in memory and self._reads_own(item):
                    memory[item] = self.memory(item)
        if not any(node in self.own for node in gathered):
            raise Untokenised(value, "does not come from the site's own tokens")
        order = [node for node in self.flow.nodes if node in computed]
        ordered = {node: computed[node] for node in order}
        return TokenCut(self.branch.name, value, self.rows, self.tokens, ordered, gathered, memory)

    def memory(self, node: fx.Node) -> TokenCut:
        """How an operand that is read whole gets the chosen tokens' part."""
        reason: Untokenised | None = None
        for axis in self._placements(node):
            try:
                cut = self.cut(node, axis)
            except Untokenised as error:
                reason = reason or error
                continue
            if not cut.memory:
                return cut
        raise reason or Untokenised(node, "holds the stream's tokens in no dimension that is known")

    def _placements(self, node: fx.Node) -> Iterator[Axis]:
        """Where the stream's tokens may lie in a value: at either end of a dimension, the likeliest first."""
        shape = value_of(node).shape
        for dim in sorted(range(len(shape)), key=lambda dim: dim != len(shape) - 2):
            for start in dict.fromkeys((int(shape[dim]) - self.tokens, 0)):
                if start >= 0:
                    yield Axis(dim, start, self.tokens)

    def _is_boundary(self, node: fx.Node) -> bool:
        return node in self.streams or node.op != "call_function" or not self._reads_own(node)

    def _gathered(self, node: fx.Node, axis: Axis) -> Axis:
        shape = value_of(node).shape
        if node in self.streams and (node not in self.own or axis != Axis(1, 0, self.tokens)):
            raise Untokenised(node, "is another stream, or not taken token by token")
        if axis.rows > 1 or (axis.dim and shape[0] not in (1, self.rows)):
            raise Untokenised(node, f"is {tuple(shape)}: its tokens cannot be told by sample")
        return axis

    def _reads_own(self, node: fx.Node) -> bool:
        """Whether a value is computed from the site's own stream within the branch."""
        if not is_tensor(node) or node in self.streams:
            return node in self.own
        ancestors = self.flow.ancestors[node]
        return any(ancestors >> self.flow.index[item] & 1 for item in self._sources)

    @cached_property
    def _sources(self) -> set[fx.Node]:
        """The own stream's values that the branch reads, each way cut at the first one."""
        found, seen, todo = set(), set[fx.Node](), [self.value]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.streams:
                found |= {node} & self.own
            elif node.op == "call_function":
                todo += node.all_input_nodes
        return found


def token_cuts(flow: Dataflow, names: Collection[str]) -> dict[str, TokenCut]:
    """The cuts of some sites."""
    return {branch.name: cut_tokens(flow, branch) for branch in flow.step.branches if branch.name in names}


def memories(step: StepGraph, cuts: Mapping[str, TokenCut]) -> tuple[Memory, ...]:
    """The operands that sites with token budgets need kept whole, and the sites that read each."""
    merges = {branch.merge for branch in step.branches}
    nodes = step.nodes()
    found: dict[fx.Node, list[str]] = {}
    for name, cut in cuts.items():
        for node in cut.memory:
            found.setdefault(node, []).append(name)
    inside = {branch.name: _within(nodes[branch.value], merges) for branch in step.branches if found}
    counts: Counter[str] = Counter()
    result = []
    for node, sites in found.items():
        readers = tuple(name for name, members in inside.items() if node in members)
        result.append(Memory(memory(sites[0], counts[sites[0]]), node.name, tuple(sites), readers))
        counts[sites[0]] += 1
    return tuple(result)


def _within(value: fx.Node, merges: set[str]) -> set[fx.Node]:
    """What a branch's value is computed from, up to the residual adds before it."""
    todo, seen = [value], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node not in seen and node.name not in merges:
            seen.add(node)
            todo += node.all_input_nodes
    return seen
