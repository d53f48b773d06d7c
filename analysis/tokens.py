"""Which dimension of each value indexes tokens: how a branch is computed for some of them alone."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import fx

from graphcache.analysis.dataflow import Dataflow
from graphcache.analysis.layout import axes
from graphcache.analysis.token_layout import Layout, stream_layout, tokens_of, whole_tokens
from graphcache.analysis.token_operands import Followed, Known, Untokenised
from graphcache.analysis.token_rules import follow
from graphcache.analysis.ways import unwrap
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import Branch, Hoisted, StepGraph, has_static_shape, is_tensor, value_of
from graphcache.ir.history import History
from graphcache.ir.schedule import Memory


@dataclass(frozen=True)
class TokenCut:
    """How a branch runs on a budget of its stream's tokens.

    The stream is (rows, tokens, channels) or (tokens, rows, channels), its tokens along one or several
    dimensions; the `layout` says where the value has them. `computed` are the values to be computed for the
    chosen tokens only, in graph order, and `gathered` those of which the chosen tokens are taken, in the
    layout in which they are met. `memory` are operands that the chosen tokens meet whole, attention's keys
    and values, each with the same analysis of how its own tokens' part is computed; `beside` says the same
    of other streams' parts in it.
    """

    site: str
    value: fx.Node
    rows: int
    tokens: int
    layout: Layout
    computed: Mapping[fx.Node, Followed]
    gathered: tuple[tuple[fx.Node, Layout], ...]
    memory: Mapping[fx.Node, "TokenCut"]
    beside: tuple["TokenCut", ...] = ()


def cut_tokens(flow: Dataflow, branch: Branch) -> TokenCut:
    """Find how a branch is computed for some tokens.

    Raises:
        PlanError: an operation of the branch mixes tokens, or is not known; named with its site.
    """
    search = _Search(flow, branch)
    try:
        return search.found()
    except Untokenised as error:
        raise PlanError(
            f"site {branch.name}: no token budget, since node {error.node.name} ({error.node.target}) "
            f"{error}; let the site compute or reuse whole"
        ) from None


@dataclass
class _Search:
    """Follows the tokens from a branch's stream to its value, then asks back what that is computed from.

    `start` is another stream's value, of which the branch's attention reads tokens as well.
    """

    flow: Dataflow
    branch: Branch
    start: fx.Node | None = None
    nodes: dict[str, fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = self.flow.step.nodes()

    @cached_property
    def value(self) -> fx.Node:
        return self.nodes[self.branch.value]

    @cached_property
    def stream(self) -> fx.Node:
        return self.nodes[self.branch.stream] if self.start is None else self.start

    @cached_property
    def own(self) -> set[fx.Node]:
        """Values on the branch's own stream: its tokens in their order."""
        if self.start is not None:
            return {self.start}
        found = set()
        for other in self.flow.step.branches:
            if other.context == self.branch.context:
                found |= {self.nodes[other.stream], self.nodes[other.merge], unwrap(self.nodes[other.stream])}
        shape = value_of(self.stream).shape
        found = {node for node in found if has_static_shape(node) and value_of(node).shape == shape}
        if self.branch.context:
            # of the first block's text a norm may have been hoisted, and with it the stream
            held = (node for port, node in self.flow.step.ports() if isinstance(port, Hoisted))
            found |= {n for n in held if has_static_shape(n) and value_of(n).shape[:-1] == shape[:-1]}
        return found

    @cached_property
    def streams(self) -> set[fx.Node]:
        found = set()
        for other in self.flow.step.branches:
            found |= {self.nodes[other.stream], self.nodes[other.merge]}
        return found | self.own

    @cached_property
    def way(self) -> set[fx.Node]:
        """What the value is computed from, each way cut at the first stream."""
        found, todo = set[fx.Node](), [self.value]
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += (
                    node.all_input_nodes if node not in self.streams and node.op == "call_function" else ()
                )
        return found

    @cached_property
    def known(self) -> Known:
        """Where the branch's values hold the stream's tokens, as far as that can be told."""
        shape = value_of(self.stream).shape
        if len(shape) < 2 or not has_static_shape(self.stream):
            raise Untokenised(self.stream, f"is {tuple(shape)}, not (rows, tokens, channels)")
        known = Known(*tokens_of(self._laid(self.stream)))
        derived = set[fx.Node]()
        for node in sorted(self.way, key=self.flow.index.__getitem__):
            if node in self.streams:
                if node in self.own:
                    known.layouts[node] = self._laid(node)
            elif node.op == "call_function" and not derived.isdisjoint(node.all_input_nodes):
                self._follow(node, known)
            if known.is_own(node) or not (is_tensor(node) or derived.isdisjoint(node.all_input_nodes)):
                derived.add(node)
        return known

    def _laid(self, stream: fx.Node) -> Layout:
        """Rows before tokens, unless the latents' samples are the second of three dimensions."""
        shape = [int(size) for size in value_of(stream).shape]
        batch = value_of(self.flow.latent).shape[0]
        if len(shape) != 3 or shape[1] != batch:
            return stream_layout(shape)
        samples = [0 in axes(dimension) for dimension in self.flow.layouts.get(self.stream, ())]
        if samples == [False, True, False] or shape[0] % batch or (batch == 1 and shape[0] > 1):
            rows, tokens, channels = stream_layout([shape[1], shape[0], shape[2]])
            return tokens, rows, channels
        return stream_layout(shape)

    def _follow(self, node: fx.Node, known: Known) -> None:
        if not is_tensor(node):
            return  # the pieces of a split, of which each has a rule
        try:
            self.followed[node] = follow(node, known)
            known.layouts[node] = self.followed[node].layout
        except Untokenised as error:
            known.failed[node] = error

    @cached_property
    def followed(self) -> dict[fx.Node, Followed]:
        return {}

    def found(self) -> TokenCut:
        """What computes the chosen tokens of the branch's value."""
        layout = self.known.needed(self.value, self.value)
        if not whole_tokens(layout, self.known.tokens):
            shape = tuple(value_of(self.value).shape)
            raise Untokenised(self.value, f"is {shape}: not {self.known.tokens} tokens of each sample")
        return self._cut(self.value)

    def _cut(self, value: fx.Node) -> TokenCut:
        computed, gathered = set[fx.Node](), dict[tuple[fx.Node, Layout], None]()
        memory: dict[fx.Node, TokenCut] = {}
        todo = [value]
        while todo:
            node = todo.pop()
            if node in computed:
                continue
            if node not in self.followed:
                gathered[node, self.known.layouts[node]] = None
                continue
            computed.add(node)
            for item, layout in self.followed[node].along.items():
                if item in self.known.layouts:
                    todo.append(item)
                else:
                    gathered[item, layout] = None
            for item in self.followed[node].whole:
                if item not in memory and self.known.of(item) is not None:
                    memory[item] = self._memory(item)
        ordered = {node: self.followed[node] for node in self.flow.nodes if node in computed}
        known, name = self.known, self.branch.name
        return TokenCut(
            name, value, known.rows, known.tokens, known.layouts[value], ordered, tuple(gathered), memory
        )

    def _memory(self, node: fx.Node) -> TokenCut:
        """How an operand that is read whole gets the chosen tokens' part."""
        layout = self.known.layouts[node]
        windows = [f.held for dim in layout for f in dim if f.kind == "token" and f.window is not None]
        if any(window.count < self.known.tokens for window in windows):
            raise Untokenised(node, "holds a part of the site's tokens, and is read whole")
        cut = self._cut(node)
        if cut.memory:
            raise Untokenised(node, "is read whole, and mixes tokens itself")
        return replace(cut, beside=tuple(self._beside(node)) if windows else ())

    def _beside(self, node: fx.Node) -> Iterator[TokenCut]:
        """How the other streams' parts of an operand are computed, as far as they can be followed."""
        others = (self.way & self.streams) - self.own if self.start is None else set[fx.Node]()
        for stream in sorted(others, key=self.flow.index.__getitem__):
            search = _Search(self.flow, self.branch, stream)
            try:
                layout = search.known.of(node)
                if layout is not None:
                    yield search._memory(node)
            except Untokenised:
                continue


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
        history = History(sites[0], "operand", counts[sites[0]])
        result.append(Memory(history, node.name, tuple(sites), readers))
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
