"""Which part of every value a rank holds, where streams are split, and what has to be exchanged for it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import Dataflow
from graphcache.analysis.layout import AxisFactor, axes
from graphcache.analysis.ranges import cut_range
from graphcache.analysis.shard_layout import Axis, Segment, joined
from graphcache.analysis.shard_operands import Placed, Share, Unshared
from graphcache.analysis.shard_products import share
from graphcache.analysis.ways import unwrap
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import StepGraph, value_of
from graphcache.ir.history import OUTPUT, History
from graphcache.ir.ranks import Ranks
from graphcache.ir.schedule import Memory

aten = ops.aten

Entry = tuple[History, int]
"""A site's values or an operand that its tokens meet, and which of its tensors."""


@dataclass
class Shards:
    """How each node is computed by a rank.

    Attributes:
        held: the axes of the values that are split.
        shares: how they are computed, and what of their operands has to be there.
        narrowed: values that are whole, by the axis along which a rank takes its part of them from there on.
        mixed: for values that are whole because some operation needs all parts, that operation.
    """

    held: dict[fx.Node, Placed] = field(default_factory=dict)
    shares: dict[fx.Node, Share] = field(default_factory=dict)
    narrowed: dict[fx.Node, Axis] = field(default_factory=dict)
    mixed: dict[fx.Node, tuple[fx.Node, str]] = field(default_factory=dict)

    def axis(self, node: fx.Node) -> Axis | None:
        found = self.held.get(node)
        return None if isinstance(found, tuple) else found


@dataclass(frozen=True)
class Given:
    """What the ranks hold at the edges of a graph, by the names of nodes.

    Attributes:
        starts: where a stream is whole and is split from there on.
        entries: inputs that are parts, cache entries.
        ends: values that are whole on all ranks from there on.
    """

    starts: Mapping[str, Axis]
    entries: Mapping[str, Axis] = field(default_factory=dict)
    ends: frozenset[str] = frozenset()


def shards(step: StepGraph, given: Given) -> Shards:
    """Follow the parts through a graph.

    Raises:
        PlanError: an operation between the streams' beginning and the model's results mixes what different
            ranks hold; named.
    """
    found = Shards()
    for node in step.graph.nodes:
        if node.op == "call_function":
            _follow(node, found)
        elif node.name in given.entries:
            found.held[node] = given.entries[node.name]
        if found.axis(node) is not None and node.name in given.ends:
            found.held[node] = None
            found.mixed[node] = node, "is a result of the model"
        elif found.axis(node) is None and node.name in given.starts:
            _refuse_mixed(node, found)
            found.narrowed[node] = found.held[node] = given.starts[node.name]
    return found


def _follow(node: fx.Node, found: Shards) -> None:
    mixed = next((found.mixed[item] for item in node.all_input_nodes if item in found.mixed), None)
    writes = node.target in ops.WRITES
    if mixed is not None and not writes:
        found.mixed[node] = mixed
    try:
        made = share(node, found.held)
        if writes and node.args[0] in found.mixed:
            raise Unshared("writes into what is put together of all ranks' parts")
    except Unshared as error:
        if writes:
            raise _unwritable(node, str(error)) from None
        made = Share(None, dict.fromkeys(node.all_input_nodes))
        found.mixed.setdefault(node, (node, str(error)))
    found.shares[node], found.held[node] = made, made.axis
    for item, axis in made.needs.items():
        if axis is not None and found.axis(item) is None:
            _refuse_mixed(item, found)


def _refuse_mixed(node: fx.Node, found: Shards) -> None:
    """Refuse to split again what was put together of all ranks' parts, beside attention."""
    if node in found.mixed:
        raise refusal(*found.mixed[node])


def _unwritable(node: fx.Node, why: str) -> PlanError:
    return PlanError(
        f"mesh=: chosen tokens are written into a cache entry by node {node.name} ({node.target}), which "
        f"{why}; let the site compute or reuse whole, or run the plan without mesh="
    )


def refusal(node: fx.Node, why: str) -> PlanError:
    """What is said of an operation that mixes what different ranks hold."""
    return PlanError(
        f"mesh=: node {node.name} ({node.target}) {why}, and it is neither attention nor behind the last "
        "block, so that ranks cannot share this model's streams out; run the model without mesh="
    )


def beginnings(flow: Dataflow, ranks: Ranks) -> Iterator[dict[str, Axis]]:
    """Where the streams of blocks begin, by name, and along which dimension each may be split: one way after
    the other, the one by runs of tokens first, then those by runs within a frame.

    Text that has a stream of its own and does not divide stays whole on every rank.

    Raises:
        PlanError: the latents' tokens, or the batch, do not divide by the ranks, or there are no streams.
    """
    step = flow.step
    nodes, branches = step.nodes(), step.block_branches
    merges = flow.bits(nodes[branch.merge] for branch in branches)
    ways = dict[str, list[Axis]]()
    for branch in branches:
        stream = nodes[branch.stream]
        if flow.ancestors[stream] & merges or stream.name in ways:
            continue
        found = list(_ways(flow, stream, ranks))
        if found:
            ways[stream.name] = found
        elif not branch.context or ranks.shared == "guidance":
            raise _indivisible(stream, ranks)
    if not ways:
        raise PlanError("mesh=: the model has no residual streams that ranks could share out")
    for number in range(max(map(len, ways.values()))):
        yield {name: found[min(number, len(found) - 1)] for name, found in ways.items()}


def _ways(flow: Dataflow, stream: fx.Node, ranks: Ranks) -> Iterator[Axis]:
    """How a stream can be shared out: by its samples, or by tokens along one of the latents' axes."""
    shape = [int(size) for size in value_of(stream).shape]
    batch, layout = int(value_of(flow.latent).shape[0]), flow.layouts.get(stream, ())
    holds = [0 in axes(dimension) for dimension in layout]
    samples = 1 if len(shape) == 3 and shape[1] == batch and holds == [False, True, False] else 0
    if ranks.shared == "guidance":
        axis = Axis.of(samples, shape[samples], ranks.count)
        yield from [axis] if axis and batch % ranks.count == 0 else []
        return
    for dim in range(len(shape) - 1):
        if dim == samples and len(shape) > 2:
            continue
        outer = 1
        for factor in (AxisFactor(None, 1), *(layout[dim] if layout else ())):
            outer *= factor.size
            axis = Axis.of(dim, shape[dim] // outer, ranks.count)
            yield from [replace(axis, outer=outer)] if axis else []
        yield from _by_pieces(stream, dim, ranks)


def _by_pieces(stream: fx.Node, dim: int, ranks: Ranks) -> Iterator[Axis]:
    """A stream that begins with text and picture side by side: of each that divides a part."""
    source, shape = unwrap(stream), value_of(stream).shape
    if source.target is not aten.cat.default or value_of(source).shape != shape:
        return
    if ops.integer(source, 1, default=0) % len(shape) != dim:
        return
    pieces: Any = source.args[0]
    sizes = [int(value_of(piece).shape[dim]) for piece in pieces]
    segments = joined([Segment(size, size > 1 and size % ranks.count == 0) for size in sizes])
    if any(segment.split for segment in segments):
        yield Axis(dim, 1, segments, ranks.count)


def _indivisible(stream: fx.Node, ranks: Ranks) -> PlanError:
    shape = tuple(value_of(stream).shape)
    what = "tokens" if ranks.shared == "tokens" else "samples"
    return PlanError(
        f"mesh=: the stream {stream.name} is {shape}, and its {what} do not divide by {ranks.count} ranks; "
        "take a size or a number of ranks that does"
    )


def values(
    step: StepGraph, given: Given, ranges: Iterable[tuple[str, int, int]], memories: Iterable[Memory] = ()
) -> dict[Entry, Axis]:
    """Which part of its sites' values, and of operands that are kept, a rank holds, for those that are split.

    Raises:
        PlanError: some residual stream is not split throughout.
    """
    found, nodes = shards(step, given), step.nodes()
    for branch in step.block_branches:
        merge = nodes[branch.merge]
        if merge in found.mixed and merge.name not in given.ends:
            raise refusal(*found.mixed[merge])
    places = {(History(branch.name), 0): branch.value for branch in step.branches}
    places |= {(History(OUTPUT), part): node.name for part, node in enumerate(step.results())}
    places |= {(memory.history, 0): memory.node for memory in memories}
    for name, first, last in ranges:
        leaving = cut_range(step, name, first, last).leaving
        places |= {(History(name), part): node for part, node in enumerate(leaving)}
    axes_of = {place: found.axis(nodes[name]) for place, name in places.items()}
    return {place: axis for place, axis in axes_of.items() if axis is not None}
