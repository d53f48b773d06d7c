"""Operations on entries that an index names, where ranks hold parts of them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.shard_layout import Axis
from graphcache.analysis.shard_operands import Named
from graphcache.ir.graph import value_of
from graphcache.ir.ranks import Ranks
from graphcache.libraries.torch_private import ALL_GATHER, ALL_TO_ALL, WAIT
from graphcache.passes.rewrite import Chain, Rewriter

aten = ops.aten

_MOVES = frozenset({aten.reshape.default, aten.view.default, aten.permute.default, aten.expand.default})


@dataclass
class NamedEntries:
    """Finds entries in ranks' parts: which rank has them, and where.

    `found` are the answers for indices that were asked for before, `given` the entries that were exchanged.
    """

    rewriter: Rewriter
    ranks: Ranks
    found: dict[tuple[fx.Node, Axis], tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    given: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)

    def found_here(self, node: fx.Node, named: Named, whole: bool) -> None:
        """Let an operation, whose operands are there, find the named entries in ranks' parts.

        A gather gives the rank's part of them, or all where they are to be `whole`.
        """
        if node.target is aten.gather.default:
            self._take(node, named.axis, whole)
        else:
            self._write(node, named)

    def _take(self, node: fx.Node, axis: Axis, whole: bool) -> None:
        """Every rank takes an entry from where its holder has it, since parts are laid out alike.

        What ranks exchange is then taken from whoever held it: once for queries, keys and values.
        """
        given: Any = node.args
        source, dim, index = given[:3]
        key = source, dim, _spelled(index)
        if key in self.given:
            node.target, node.args, node.kwargs = aten.alias.default, (self.given[key],), {}
            return
        if ops.behind(source, ops.VIEWS).op == "call_function":
            self.given[key] = node
        places, holders = self._located(node, index, axis)
        chain, count = self.rewriter.after(node.prev), self.ranks.count
        dim %= value_of(source).dim()
        if whole:
            sent = chain.emit(aten.gather.default, source, dim, places)
            received = chain.emit(
                ALL_GATHER, chain.emit(aten.unsqueeze.default, sent, 0), count, self.ranks.group
            )
        else:
            size = int(value_of(index).shape[dim])
            held = -(-size // count)
            places, holders = (filled(chain, item, dim, count * held - size) for item in (places, holders))
            sent = chain.emit(aten.gather.default, source, dim, places)
            shape = list(value_of(sent).shape)
            sent = chain.emit(aten.reshape.default, sent, [*shape[:dim], count, held, *shape[dim + 1 :]])
            sent = chain.emit(aten.movedim.int, sent, dim, 0) if dim else sent
            sent = sent if value_of(sent).is_contiguous() else chain.emit(aten.contiguous.default, sent)
            received = chain.emit(ALL_TO_ALL, sent, [1] * count, [1] * count, self.ranks.group)
            first = self.ranks.rank * held
            holders = chain.emit(aten.slice.Tensor, holders, dim, first, first + held)
        received = chain.emit(WAIT, received)
        holders = chain.emit(aten.unsqueeze.default, holders, 0)
        picked = chain.emit(aten.gather.default, received, 0, holders)
        node.target, node.args, node.kwargs = aten.squeeze.dim, (picked, 0), {}

    def _write(self, node: fx.Node, named: Named) -> None:
        arguments: Any = node.args
        into, given, values = arguments[:3]
        indices = list(given)
        dim = named.axis.dim
        indices[dim], holders = self._located(node, indices[dim], named.axis)
        if named.elsewhere:
            indices, values = self._own(self.rewriter.after(node.prev), into, indices, holders, values)
        node.args = into, indices, values

    def _own(
        self, chain: Chain, into: fx.Node, indices: list[fx.Node], holders: fx.Node, values: fx.Node
    ) -> tuple[list[fx.Node], fx.Node]:
        """The rank's own of what is to be written, and the first of these in place of all others.

        So no other entry is touched, and what stands twice is the same. A rank that holds none writes what is
        there already.
        """
        rank = max(value_of(index).dim() for index in indices)
        sizes = [[1] * (rank - value_of(index).dim()) + list(value_of(index).shape) for index in indices]
        shape = [int(max(along)) for along in zip(*sizes, strict=True)]
        count, further = torch.Size(shape).numel(), list(value_of(into).shape[len(indices) :])
        mine = chain.emit(aten.eq.Scalar, holders, self.ranks.rank)
        mine = _listed(chain, mine, shape, [])
        some = chain.emit(aten.any.default, mine)
        first = chain.emit(aten.argmax.default, chain.cast(mine, torch.int32), 0)
        every = chain.emit(aten.arange.default, count, device=value_of(into).device)
        chosen = chain.emit(aten.where.self, mine, every, first)
        own = [
            chain.emit(aten.index_select.default, _listed(chain, index, shape, []), 0, chosen)
            for index in indices
        ]
        values = chain.emit(aten.index_select.default, _listed(chain, values, shape, further), 0, chosen)
        there = chain.emit(aten.index.Tensor, into, own)
        return own, chain.emit(aten.where.self, some, values, there)

    def _located(self, node: fx.Node, index: fx.Node, axis: Axis) -> tuple[fx.Node, fx.Node]:
        """Where in its holder's part an entry is, and which rank that is; of what all have, each itself.

        What the node reads of that is placed before it.
        """
        if index.target in _MOVES:
            source: Any = index.args[0]
            both = self._located(node, source, axis)
            chain = self.rewriter.after(node.prev)
            places, holders = (chain.emit(index.target, item, *index.args[1:]) for item in both)
            return places, holders
        key = index, axis.at(0)
        if key not in self.found:
            behind = index if index.op != "placeholder" else self.rewriter.first.prev
            self.found[key] = self._counted(self.rewriter.after(behind), index, axis)
        return self.found[key]

    def _counted(self, chain: Chain, index: fx.Node, axis: Axis) -> tuple[fx.Node, fx.Node]:
        within, before = index, None
        if axis.outer > 1:
            turn = chain.emit(aten.div.Tensor_mode, index, axis.length, rounding_mode="floor")
            within = chain.emit(aten.remainder.Scalar, index, axis.length)
            before = chain.emit(aten.mul.Tensor, turn, axis.held)
        result: tuple[fx.Node, fx.Node] | None = None
        offset = start = 0
        for segment in axis.segments:
            inside = chain.emit(aten.sub.Tensor, within, offset) if offset else within
            if segment.split:
                held = axis.local(segment)
                holder = chain.emit(aten.div.Tensor_mode, inside, held, rounding_mode="floor")
                place = chain.emit(aten.remainder.Scalar, inside, held)
            else:
                holder = chain.emit(aten.full_like.default, inside, self.ranks.rank)
                place = inside
            place = chain.emit(aten.add.Tensor, place, start) if start else place
            if result is None:
                result = place, holder
            else:
                here = chain.emit(aten.ge.Scalar, within, offset)
                result = (
                    chain.emit(aten.where.self, here, place, result[0]),
                    chain.emit(aten.where.self, here, holder, result[1]),
                )
            offset, start = offset + segment.size, start + axis.local(segment)
        assert result is not None
        place, holder = result
        return (chain.emit(aten.add.Tensor, before, place) if before is not None else place), holder


def _spelled(index: fx.Node) -> Any:
    """What an index is made of, the same for indices that are made alike."""
    if index.target not in _MOVES:
        return index
    source: Any = index.args[0]
    return index.target, _spelled(source), str(index.args[1:])


def _listed(chain: Chain, node: fx.Node, shape: list[int], further: list[int]) -> fx.Node:
    """The entries of a value that meets this shape, one after the other, each with further dimensions."""
    if list(value_of(node).shape) != [*shape, *further]:
        node = chain.emit(aten.expand.default, node, [*shape, *further])
    return chain.emit(aten.reshape.default, node, [torch.Size(shape).numel(), *further])


def filled(chain: Chain, node: fx.Node, dim: int, count: int) -> fx.Node:
    """So many entries more along a dimension: the last one again."""
    if not count:
        return node
    last = chain.emit(aten.slice.Tensor, node, dim, -1, 2**62)
    return chain.emit(aten.cat.default, [node, *[last] * count], dim)
