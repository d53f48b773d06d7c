"""One rank's part of a graph: parts of the streams, and exchanges where attention needs what others hold."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx

from graphcache.analysis.shard_layout import Axis
from graphcache.analysis.shards import Entry, Given, Shards, shards
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.graph import CacheRead, CacheWrite, Chosen, StepGraph, fake_mode, value_of
from graphcache.ir.history import History
from graphcache.ir.ranks import Ranks
from graphcache.libraries.torch_private import ALL_GATHER, WAIT
from graphcache.passes.prune import pruned
from graphcache.passes.rewrite import Chain, Rewriter
from graphcache.passes.shard_named import NamedEntries, filled

aten = torch.ops.aten


@dataclass(frozen=True)
class Shard:
    """Let a rank compute its part of the streams, and keep its part of cache entries.

    Every operation stays where it is and runs on the rank's part of its operands. Keys and values are
    gathered from all ranks where attention reads them, and the model's results once, at the end. Of chosen
    tokens each rank computes an equal part, whoever holds them.

    Attributes:
        ranks: who shares.
        starts: where streams begin, by name, and along which dimension they are split.
        entries: of sites' values and kept operands that are split, the same.
        ends: values that every rank gets whole at once, because of what is made of them.
    """

    ranks: Ranks
    starts: Mapping[str, Axis]
    entries: Mapping[Entry, Axis]
    ends: frozenset[str]

    def __call__(self, step: StepGraph) -> StepGraph:
        reads, clusters = dict[str, Axis](), dict[str, Axis]()
        for read, node in step.ports():
            if isinstance(read, CacheRead):
                axis = self._entry(read.history, read.part, value_of(node).shape)
                reads |= {node.name: axis} if axis else {}
            elif isinstance(read, Chosen) and read.clusters:
                axis = self._entry(read.history, 0, value_of(node).shape)
                clusters |= {node.name: axis} if axis else {}
        rewriter = _Parts(step, ranks=self.ranks)
        given = Given({**self.starts, **clusters}, reads, self.ends | _scored(step))
        rewriter.found = shards(step.rebuilt(rewriter.graph), given)
        shapes = [value_of(result).shape for result in step.results()]
        for node in list(rewriter.graph.nodes):
            rewriter.rewrite(node)
        for index, (port, shape) in enumerate(zip(rewriter.outputs, shapes, strict=True)):
            axis = self._entry(port.history, port.part, shape) if isinstance(port, CacheWrite) else None
            result = rewriter.results[index]
            rewriter.results[index] = rewriter.kept(result, axis) if axis else rewriter.whole(result)
        return pruned(rewriter.finished())

    def _entry(self, history: History, part: int, shape: torch.Size) -> Axis | None:
        """How a cache entry is split; of the halves of a batch each has entries of its own."""
        if history.content in ("patched", "handle"):
            history = history._replace(content="value")
        axis = self.entries.get((history._replace(unconditional=False), part))
        if axis is None or axis.outer * axis.length == shape[axis.dim]:
            return axis
        outer, odd = divmod(int(shape[axis.dim]), axis.length)
        if odd or axis.dim:
            raise GraphCacheError(
                f"mesh=: {history} is {tuple(shape)}, which the ranks' parts do not fit; report this as a "
                "fault of graphcache"
            )
        return Axis(axis.dim, outer, axis.segments, axis.ranks)


def _scored(step: StepGraph) -> frozenset[str]:
    """What the lengths are taken of by which scores are divided: whole, so that all ranks choose alike."""
    scores: list[Any] = [
        node.args[0]
        for port, node in zip(step.outputs, step.results(), strict=True)
        if isinstance(port, CacheWrite) and port.history.content == "scores"
    ]
    return frozenset(node.name for node in scores)


@dataclass
class _Parts(Rewriter):
    """A copy of the graph whose nodes become a rank's parts of them, one after the other.

    `split` are those that became parts; `gathered` and `taken` what was made of one by the other.
    """

    ranks: Ranks = field(default_factory=lambda: Ranks(1, 0, ""))
    found: Shards = field(default_factory=Shards)
    split: dict[fx.Node, Axis] = field(default_factory=dict)
    gathered: dict[fx.Node, fx.Node] = field(default_factory=dict)
    taken: dict[tuple[fx.Node, Axis], fx.Node] = field(default_factory=dict)
    named: NamedEntries = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.named = NamedEntries(self, self.ranks)

    def rewrite(self, node: fx.Node) -> None:
        """Let a node compute the rank's part of its result."""
        made, axis = self.found.shares.get(node), self.found.axis(node)
        if node.op == "placeholder" and axis is not None and node not in self.found.narrowed:
            node.meta["val"], self.split[node] = _part(value_of(node), axis), axis
        if made is None:
            return
        needs = {item: None for item in node.all_input_nodes if item in self.split} | dict(made.needs)
        if not needs and made.axis is None:
            return
        target, args, kwargs = made.call or (node.target, node.args, dict(node.kwargs))
        self._gather([item for item, need in needs.items() if need is None])
        there = {item: self.part(item, need) if need else self.whole(item) for item, need in needs.items()}
        shape = None if isinstance(made.axis, tuple) else made.axis and made.axis.shape(value_of(node).shape)
        node.target = target
        node.args, node.kwargs = fx.map_arg((args, kwargs), lambda item: there.get(item, item))
        if made.named is not None:
            self.named.found_here(node, made.named, made.axis is None)
        self.renew(node)
        if isinstance(made.axis, Axis):
            self.split[node] = made.axis
            if list(value_of(node).shape) != shape:
                raise GraphCacheError(
                    f"mesh=: a rank's part of node {node.name} ({node.target}) came out as "
                    f"{tuple(value_of(node).shape)}; report this as a fault of graphcache"
                )

    def whole(self, node: fx.Node) -> fx.Node:
        """All parts of a value, from all ranks."""
        self._gather([node])
        return self.gathered.get(node, node)

    def _gather(self, nodes: Sequence[fx.Node]) -> None:
        """Gather the parts among these that are not gathered yet, those that are alike by one exchange."""
        alike: dict[Any, list[fx.Node]] = {}
        for node in nodes:
            if node in self.split and node not in self.gathered:
                value = value_of(node)
                key = self.split[node], value.shape, value.dtype, value.device
                alike.setdefault(key, []).append(node)
        for (axis, *_), group in alike.items():
            self.gathered |= zip(group, self._gathered(group, axis), strict=True)

    def part(self, node: fx.Node, axis: Axis) -> fx.Node:
        """The rank's part of a value."""
        if node in self.split:
            return node
        if (node, axis) not in self.taken:
            self.taken[node, axis] = self._taken(node, axis)
        return self.taken[node, axis]

    def kept(self, node: fx.Node, axis: Axis) -> fx.Node:
        """The rank's part of a value, to be cached: it keeps no more alive than itself."""
        if node in self.split:
            return node
        part = self.part(node, axis)
        return self.after(part).copied(part)

    def _behind(self, node: fx.Node) -> Chain:
        return self.after(self.first.prev if node.op == "placeholder" else node)

    def _gathered(self, nodes: Sequence[fx.Node], axis: Axis) -> list[fx.Node]:
        """Exchanged are the split segments alone, of values that are alike."""
        chain, at = self._behind(max(nodes)), axis.dim + (axis.outer > 1)
        before, after = _around(value_of(nodes[0]).shape, axis)
        own, sent = list[list[fx.Node]](), list[fx.Node]()
        for node in nodes:
            grouped = _shaped(chain, node, [*before, axis.held, *after])
            own.append(_cut(chain, grouped, at, [axis.local(segment) for segment in axis.segments]))
            parts = [part for part, segment in zip(own[-1], axis.segments, strict=True) if segment.split]
            sent.append(_joined(chain, parts, at))
        every = zip(own, self._exchanged(chain, sent), strict=True)
        return [self._whole(chain, node, axis, *parts) for node, parts in zip(nodes, every, strict=True)]

    def _exchanged(self, chain: Chain, sent: Sequence[fx.Node]) -> list[fx.Node]:
        """Of each of some values (ranks, its shape), what every rank has sent."""
        size, count = list(value_of(sent[0]).shape), self.ranks.count
        one = sent[0] if len(sent) == 1 else chain.emit(aten.stack.default, list(sent))
        if not value_of(one).is_contiguous():
            one = chain.emit(aten.contiguous.default, one)
        received = chain.emit(WAIT, chain.emit(ALL_GATHER, one, count, self.ranks.group))
        if len(sent) == 1:
            return [chain.emit(aten.reshape.default, received, [count, *size])]
        received = chain.emit(aten.reshape.default, received, [count, len(sent), *size])
        each = chain.emit(aten.unbind.int, received, 1)
        return [chain.emit(operator.getitem, each, place) for place in range(len(sent))]

    def _whole(
        self, chain: Chain, node: fx.Node, axis: Axis, own: Sequence[fx.Node], received: fx.Node
    ) -> fx.Node:
        """A value of its own segments and those that were exchanged: each goes where all values have it."""
        before, after = _around(value_of(node).shape, axis)
        at, whole = axis.dim + (axis.outer > 1), list[fx.Node]()
        if at:
            received = chain.emit(aten.movedim.int, received, 0, at)
        split = [segment for segment in axis.segments if segment.split]
        pieces = iter(_cut(chain, received, at + 1, map(axis.local, split)))
        for part, segment in zip(own, axis.segments, strict=True):
            if segment.split:
                count = self.ranks.count * axis.local(segment)
                part = _shaped(chain, next(pieces), [*before, count, *after])
            if not axis.is_even(segment):
                part = chain.emit(aten.slice.Tensor, part, at, 0, segment.size)
            whole.append(part)
        shape = list(value_of(node).shape)
        shape[axis.dim] = axis.outer * axis.length
        return _shaped(chain, _joined(chain, whole, at), shape)

    def _taken(self, node: fx.Node, axis: Axis) -> fx.Node:
        chain, at = self._behind(node), axis.dim + (axis.outer > 1)
        before, after = _around(value_of(node).shape, axis)
        grouped = _shaped(chain, node, [*before, axis.length, *after])
        parts, offset = list[fx.Node](), 0
        for segment in axis.segments:
            count = axis.local(segment)
            first = offset + self.ranks.rank * count if segment.split else offset
            last = min(first + count, offset + segment.size)
            part = chain.emit(aten.slice.Tensor, grouped, at, min(first, last - 1), last)
            parts.append(filled(chain, part, at, count - max(last - first, 1)))
            offset += segment.size
        return _shaped(chain, _joined(chain, parts, at), axis.shape(value_of(node).shape))


def _around(shape: Sequence[int], axis: Axis) -> tuple[list[int], list[int]]:
    """The sizes before and after the segments, where they have a dimension of their own."""
    outer = [axis.outer] if axis.outer > 1 else []
    return [*shape[: axis.dim], *outer], list(shape[axis.dim + 1 :])


def _shaped(chain: Chain, node: fx.Node, shape: Sequence[int]) -> fx.Node:
    if list(value_of(node).shape) == list(shape):
        return node
    return chain.emit(aten.reshape.default, node, list(shape))


def _cut(chain: Chain, node: fx.Node, dim: int, sizes: Iterable[int]) -> list[fx.Node]:
    """The pieces of a value along a dimension."""
    ends = list(accumulate(sizes))
    if len(ends) == 1:
        return [node]
    return [chain.emit(aten.slice.Tensor, node, dim, first, last) for first, last in pairwise((0, *ends))]


def _joined(chain: Chain, pieces: Sequence[fx.Node], dim: int) -> fx.Node:
    return pieces[0] if len(pieces) == 1 else chain.emit(aten.cat.default, list(pieces), dim)


def _part(value: torch.Tensor, axis: Axis) -> torch.Tensor:
    """A tensor like a rank's part of another, its dimensions in the same order in memory."""
    with fake_mode(value):
        part = value.narrow(axis.dim, 0, axis.outer * axis.held)
        return torch.empty_like(part, memory_format=torch.preserve_format)
