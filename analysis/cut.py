"""Where to cut: the cheapest tensors to keep between two evaluations, as a minimum cut over bytes.

A value is *stale* if this step can make it of nothing but what an earlier step kept and what never
changes; it is *fresh* if it also needs this step's latents or timestep. Stale values that fresh ones read
must be kept, or be computed from kept ones: each set of tensors that separates the reused branches from
the fresh readers will do, and the one of fewest bytes is a minimum cut of the graph whose nodes have their
bytes as capacity.

A residual stream is never stale, since every evaluation begins it anew. But x_out = x_in + Σ g_i, so what
a run of blocks adds to it is, as long as all that is added is stale: the *change* of a range. It passes
adds, views, slices and concatenations of the stream, which are linear; what reads the stream otherwise
needs it, and so the change.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from graphcache.analysis.network import Network
from graphcache.analysis.stale import Reuse, State
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import Branch, StepGraph, has_static_shape, is_tensor, storage_bytes, value_of

Gates = Literal["fresh", "kept"]
Reason = tuple[str, str]
"""A node's name, and why the cut cannot lie behind it."""


@dataclass(frozen=True, slots=True)
class Change:
    """x_out − x_in over the blocks `first` to `last`, of the shape and dtype of `node` on the stream."""

    first: int
    last: int
    node: str

    @property
    def range(self) -> str:
        return f"range({self.first}..{self.last})"

    def __str__(self) -> str:
        return f"{self.range} at {self.node}"


@dataclass(frozen=True)
class Cut:
    """The tensors to keep, in graph order.

    `kept` are nodes by name and changes of ranges, `bytes` is their sum, each kept dense. `covers` says for
    each of them which branches are in it; a branch may be in several. `reasons` name every stale value and
    changed stream that fresh work reads: behind these the cut cannot lie.
    """

    kept: tuple[str | Change, ...]
    bytes: int
    covers: tuple[tuple[str, ...], ...]
    reasons: tuple[Reason, ...]


def cheapest_cut(step: StepGraph, branches: Collection[str], *, gates: Gates = "fresh") -> Cut:
    """The tensors of fewest bytes that stand for branches reused together at a step.

    Args:
        step: a captured step, hoisted or not.
        branches: names of the branches that are reused; all others compute.
        gates: whether what a branch's value is multiplied by on its way to the stream is computed from
            this step's timestep (`fresh`), as a plan's branch sites do, or may be what it was (`kept`), as
            in a plan's ranges, which freeze gates too. Where no gate depends on the timestep the two are
            equal; elsewhere a cut of kept gates is another approximation than reuse branch by branch.

    A range counts whole blocks of which every branch is reused and every addend is stale, because a plan
    has no site for parts of a block. Among cuts of equal bytes a branch's own value goes before a change at
    a residual add, and that before anything else. Constant inputs are taken never to change.

    Raises:
        PlanError: an unknown branch; one of two that share a value; a branch whose size depends on data.
    """
    return _cut(Reuse(step, _checked(step, branches), freezes=gates == "kept"))


def sites_of(cut: Cut) -> tuple[str, ...]:
    """The rows' selectors that make a plan keep such a cut: ranges, then branches that lie in none of them.

    Exact, but not always as small: the site of a node behind a branch's value is the branch, and that of a
    slice of a change is the change. A plan whose range the model does not allow is refused when checked.
    """
    spans = _merged(sorted((item.first, item.last) for item in cut.kept if isinstance(item, Change)))
    pairs = [*zip(cut.kept, cut.covers, strict=True)]
    within = {name for item, names in pairs if isinstance(item, Change) for name in names}
    names = [name for item, covered in pairs if isinstance(item, str) for name in covered]
    alone = dict.fromkeys(name for name in names if name not in within)
    return (*(f"range({first}..{last})" for first, last in spans), *alone)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Overlapping spans as one: a range's changes of several streams are one site."""
    merged: list[tuple[int, int]] = []
    for first, last in spans:
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _checked(step: StepGraph, names: Collection[str]) -> tuple[Branch, ...]:
    known = {branch.name for branch in step.branches}
    for name in names:
        if name not in known:
            shown = ", ".join(sorted(known)[:5]) or "none"
            raise PlanError(f"{name} is no branch of this step; its branches begin with: {shown}")
    reused = tuple(branch for branch in step.branches if branch.name in names)
    values, nodes = {branch.value: branch for branch in reused}, step.nodes()
    for branch in step.branches:
        if branch.value in values and branch.name not in names:
            raise PlanError(
                f"{branch.name} and {values[branch.value].name} are one value added to two streams; "
                "reuse both or neither"
            )
    for branch in reused:
        if not has_static_shape(nodes[branch.value]):
            raise PlanError(f"the size of {branch.name} depends on data, so it has no bytes; let it compute")
    return reused


def _cut(reuse: Reuse) -> Cut:
    network, reasons = Network(), dict[str, str]()
    for node in filter(reuse.carries, reuse.read):
        _enter(network, reuse, node)
    for item, reason in _readings(reuse):
        network.sink(item.name)
        reasons.setdefault(item.name, reason)
    chosen = network.cheapest()
    nodes = [node for node in reuse.read if node.name in chosen]
    total = sum(storage_bytes(value_of(node)) for node in nodes)
    covers = tuple(tuple(branch.name for branch in reuse.behind[node]) for node in nodes)
    return Cut(tuple(_kept(reuse, node) for node in nodes), total, covers, tuple(reasons.items()))


def _enter(network: Network, reuse: Reuse, node: fx.Node) -> None:
    sized = is_tensor(node) and has_static_shape(node)
    rank = 0 if node in reuse.values else 1 if node in reuse.ranged else 1 << 12
    network.node(node.name, storage_bytes(value_of(node)) if sized else None, rank)
    if node in reuse.values:
        network.source(node.name)
    for item in reuse.operands(node):
        network.edge(item.name, node.name)


def _readings(reuse: Reuse) -> Iterator[tuple[fx.Node, str]]:
    """The stale values and changes that the step's own work and its results read, with the reason."""
    for node in reuse.read:
        if node.op == "call_function" and not reuse.carries(node):
            for item in filter(reuse.carries, node.all_input_nodes):
                yield item, _reason(reuse, item, node)
    for i, result in enumerate(reuse.step.results()):
        if reuse.carries(result):
            yield result, f"it is output {i} of the step"


def _kept(reuse: Reuse, node: fx.Node) -> str | Change:
    if reuse.state[node] is State.STALE:
        return node.name
    blocks = [branch.block for branch in reuse.behind[node]]
    return Change(min(blocks), max(blocks), node.name)


def _reason(reuse: Reuse, item: fx.Node, reader: fx.Node) -> str:
    branch = reuse.merges.get(reader)
    if branch is not None and branch.block in reuse.outside:
        does = "adds it to the stream" if item.name != branch.stream else "carries the stream on"
        return f"{reader} {does}, outside of any range: {reuse.outside[branch.block]}"
    if reader in reuse.tails:
        return reuse.mixed(reuse.behind[item][-1])
    for other in reuse.step.branches:
        if other not in reuse.reused and reuse.flow.reaches(reader, reuse.nodes[other.value]):
            return f"{other.name} computes and reads it ({reader})"
    return f"{reader} ({reader.target}) is computed and reads it"
