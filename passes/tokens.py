"""A branch on some of its tokens: gathered before its norm, computed, scattered into the cached value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.token_layout import (
    Layout,
    TokenFactor,
    chosen_shape,
    chosen_size,
    halved,
    is_marked,
    size_of,
    stream_layout,
)
from graphcache.analysis.token_operands import Followed
from graphcache.analysis.tokens import TokenCut
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.graph import is_tensor, value_of
from graphcache.passes.rewrite import Chain, Rewriter

aten = ops.aten


@dataclass
class TokenWise:
    """Emits what computes a cut's value for chosen tokens.

    `chosen` holds their places, int64 (rows, budget). `memory` says, by node name, what stands for operands
    that they meet whole. Operations are emitted behind `chain.last`.
    """

    rewriter: Rewriter
    cut: TokenCut
    chosen: fx.Node
    chain: Chain
    memory: Mapping[str, fx.Node] = field(default_factory=dict)
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)
    gathered: dict[tuple[fx.Node, Layout], fx.Node] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return int(value_of(self.chosen).shape[1])

    @property
    def rows(self) -> int:
        return int(value_of(self.chosen).shape[0])

    def value(self) -> fx.Node:
        """The cut's value for the chosen tokens, in the value's layout."""
        for node, layout in self.cut.gathered:
            self.gathered[node, layout] = self._gathered(self.rewriter.nodes[node.name], layout)
        for node, followed in self.cut.computed.items():
            self.made[node] = self._computed(node, followed)
            if tuple(value_of(self.made[node]).shape) != tuple(self._shape(followed.layout)):
                raise GraphCacheError(f"the tokens of node {node.name} ({node.target}) were followed wrongly")
        return self._taken(self.cut.value, self.cut.layout)

    def scatter(self, cached: fx.Node, layout: Layout, computed: fx.Node) -> fx.Node:
        """Write the chosen tokens into a value, in place."""
        shape = list(value_of(cached).shape)
        factors = [factor for dimension in layout for factor in dimension]
        whole = self._viewed(cached, [factor.size for factor in factors])
        part = self._viewed(computed, [self._size(factor) for factor in factors])
        # not scatter_, which Inductor does on a copy of all of it
        result = self.chain.emit(aten.index_put_.default, whole, self._indices(cached, factors), part)
        return self._viewed(result, shape)

    def blend(self, cached: fx.Node, computed: fx.Node, clusters: fx.Node, share: float) -> fx.Node:
        """Move every token of a (rows, tokens, channels) value towards what its cluster's token became."""
        shape = list(value_of(cached).shape)
        places = self.chain.emit(aten.unsqueeze.default, clusters, 2)
        places = self.chain.emit(aten.expand.default, places, shape)
        spread = self.chain.emit(aten.gather.default, computed, 1, places)
        kept = self.chain.emit(aten.mul.Tensor, cached, 1 - share)
        mixed = self.chain.emit(aten.add.Tensor, kept, self.chain.emit(aten.mul.Tensor, spread, share))
        return self.chain.emit(aten.copy_.default, cached, mixed)

    def _size(self, factor: TokenFactor) -> int:
        return chosen_size(factor, self.cut.tokens, self.count)

    def _shape(self, layout: Layout) -> list[int]:
        return chosen_shape(layout, self.cut.tokens, self.count)

    def _viewed(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        if list(value_of(node).shape) == list(shape):
            return node
        return self.chain.emit(aten.reshape.default, node, list(shape))

    def _gathered(self, node: fx.Node, layout: Layout) -> fx.Node:
        """The chosen tokens of a value that is not computed anew; one for all rows serves each of them."""
        rank = len(layout)
        given = [*(1 for _ in range(rank - value_of(node).dim())), *value_of(node).shape]
        factors, sizes = list[TokenFactor](), list[int]()
        for dimension, size in zip(layout, given, strict=True):
            kept = dimension if is_marked(dimension) else (TokenFactor(size),)
            factors += kept
            sizes += [factor.size if size == size_of(kept) else 1 for factor in kept]
        node = self._viewed(node, sizes)
        node = self._expanded(node, [factor.size for factor in factors])
        node = self._picked(node, factors)
        return self._viewed(node, self._shape_of(layout, given))

    def _shape_of(self, layout: Layout, given: Sequence[int]) -> list[int]:
        chosen = self._shape(layout)
        sizes = zip(chosen, given, layout, strict=True)
        return [size if is_marked(dimension) else own for size, own, dimension in sizes]

    def _expanded(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        if list(value_of(node).shape) == list(shape):
            return node
        return self.chain.emit(aten.expand.default, node, list(shape))

    def _picked(self, node: fx.Node, factors: Sequence[TokenFactor]) -> fx.Node:
        """The chosen entries of a value with one dimension for each factor."""
        tokens = [dim for dim, factor in enumerate(factors) if factor.kind == "token"]
        ordered = sorted(tokens, key=lambda dim: -factors[dim].stride)
        if not ordered:
            return node
        order = [dim for dim in range(len(factors)) if dim not in ordered[1:]]
        place = order.index(ordered[0])
        order[place : place + 1] = ordered
        node = self._permuted(node, order)
        sizes = [int(size) for size in value_of(node).shape]
        total = 1
        for dim in ordered:
            total *= factors[dim].size
        joined = [*sizes[:place], total, *sizes[place + len(ordered) :]]
        node = self._viewed(node, joined)
        rows = [factors[dim] for dim in order if dim not in ordered[1:]]
        index = self._places(rows, place, factors[ordered[0]])
        joined[place] = self.count
        index = self._expanded(index, joined)
        node = self.chain.emit(aten.gather.default, node, place, index)
        node = self._viewed(
            node, [*joined[:place], self.count, *(1 for _ in ordered[1:]), *joined[place + 1 :]]
        )
        return self._permuted(node, [order.index(dim) for dim in range(len(order))])

    def _permuted(self, node: fx.Node, order: Sequence[int]) -> fx.Node:
        in_order = list(order) == sorted(order)
        return node if in_order else self.chain.emit(aten.permute.default, node, list(order))

    def _places(self, factors: Sequence[TokenFactor], place: int, token: TokenFactor) -> fx.Node:
        """The chosen entries, row by row, of a value with a dimension for each factor, tokens at `place`."""
        places = self.chosen
        if token.window is not None:
            places = self._entries(token)
        rows = [dim for dim, factor in enumerate(factors) if factor.kind == "row"]
        ordered = sorted(rows, key=lambda dim: -factors[dim].stride)
        if self.rows > 1:
            places = self._viewed(places, [*(factors[dim].size for dim in ordered), self.count])
            moved = sorted([*ordered, place])
            places = self._permuted(places, [[*ordered, place].index(dim) for dim in moved])
        sizes = [factor.size if factor.kind == "row" else 1 for factor in factors]
        sizes[place] = self.count
        return self._viewed(places, sizes)

    def _entries(self, token: TokenFactor) -> fx.Node:
        """Where a factor of single tokens holds the chosen ones; for those that it lacks any entry."""
        held, places = token.held, self.chosen
        if held.start != held.first:
            places = self.chain.emit(aten.add.Tensor, places, held.start - held.first)
        if held.count < self.cut.tokens:
            places = self.chain.emit(aten.clamp.default, places, 0, token.size - 1)
        return places

    def _indices(self, cached: fx.Node, factors: Sequence[TokenFactor]) -> list[fx.Node]:
        """One index for each factor up to the last that counts tokens, or rows of several."""
        counts = [dim for dim, factor in enumerate(factors) if factor.kind != "other"]
        tokens = [dim for dim in counts if factors[dim].kind == "token"]
        first = max(tokens, key=lambda dim: factors[dim].stride)
        used = factors[: counts[-1] + 1]
        indices = []
        for dim, factor in enumerate(used):
            if factor.kind == "token":
                indices.append(self._digit(used, first, factor))
                continue
            every = self.chain.emit(aten.arange.default, factor.size, device=value_of(cached).device)
            indices.append(self._viewed(every, [factor.size if at == dim else 1 for at in range(len(used))]))
        return indices

    def _digit(self, factors: Sequence[TokenFactor], place: int, factor: TokenFactor) -> fx.Node:
        """Where the chosen tokens lie along one factor of several."""
        index = self._places(factors, place, factor)
        if factor.stride > 1:
            index = self.chain.emit(aten.div.Tensor_mode, index, factor.stride, rounding_mode="floor")
        if factor.window is None and factor.stride * factor.size < self.cut.tokens:
            index = self.chain.emit(aten.remainder.Scalar, index, factor.size)
        return index

    def _computed(self, node: fx.Node, followed: Followed) -> fx.Node:
        taken = [self._taken(item, layout) for item, layout in followed.along.items()]
        if followed.how == "passed":
            return taken[0]
        if followed.how == "joined":
            return self._joined(followed)
        if followed.how == "shaped":
            return self._viewed(taken[0], self._shape(followed.layout))
        if followed.how == "expanded":
            return self._expanded(taken[0], self._shape(followed.layout))
        if node.target is aten.view_as_complex.default:
            return self.chain.emit(node.target, self.chain.emit(aten.contiguous.default, taken[0]))
        return self._applied(node, dict(zip(followed.along, taken, strict=True)))

    def _joined(self, followed: Followed) -> fx.Node:
        """Each token from the part that holds it: the last one that begins no later."""
        factors, sizes = list[TokenFactor](), list[int]()
        for dimension in followed.layout:
            factors += dimension
            sizes += [self._size(factor) if is_marked(dimension) else 1 for factor in dimension]
        place = next(dim for dim, factor in enumerate(factors) if factor.kind == "token")
        index = self._expanded(self._places(factors, place, TokenFactor(1)), sizes)
        shape = self._shape(followed.layout)
        index = self._viewed(
            index, [n if is_marked(dim) else 1 for n, dim in zip(shape, followed.layout, strict=True)]
        )
        (result, _), *further = [
            (self._taken(node, followed.along[node]), first) for node, first in followed.parts
        ]
        for node, first in further:
            inside = self.chain.emit(aten.ge.Scalar, index, first)
            result = self.chain.emit(aten.where.self, inside, node, result)
        return result

    def _taken(self, node: fx.Node, layout: Layout) -> fx.Node:
        return self.made[node] if node in self.made else self.gathered[node, layout]

    def _applied(self, node: fx.Node, taken: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """The operation on the chosen tokens, and on what they meet whole."""

        def operand(item: fx.Node) -> fx.Node:
            if item in taken:
                return taken[item]
            if not is_tensor(item) and not taken.keys().isdisjoint(item.all_input_nodes):
                # the pieces of a split that leaves the tokens whole
                return self._split(item, taken)
            return self.memory.get(item.name) or self.rewriter.nodes[item.name]

        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        return self.chain.emit(node.target, *args, **kwargs)

    def _split(self, node: fx.Node, taken: Mapping[fx.Node, fx.Node]) -> fx.Node:
        if node not in self.made:
            args: Any = fx.map_arg(node.args, lambda item: taken.get(item, item))
            self.made[node] = self.chain.emit(node.target, *args, **node.kwargs)
        return self.made[node]


def is_by_token(cut: TokenCut) -> bool:
    """Whether a cut's value is (rows, tokens, channels)."""
    return cut.layout == stream_layout((cut.rows, cut.tokens, int(value_of(cut.value).shape[-1])))


def by_token(chain: Chain, node: fx.Node, cut: TokenCut) -> fx.Node:
    """A cut's value, or that of half of its rows, as (rows, tokens, channels)."""
    if is_by_token(cut):
        return node
    rows = cut.rows * value_of(node).numel() // value_of(cut.value).numel()
    layout = cut.layout if rows == cut.rows else halved(cut.layout, rows)
    factors = [factor for dimension in layout for factor in dimension]
    kinds = ("row", "token", "other")
    order = sorted(
        range(len(factors)), key=lambda dim: (kinds.index(factors[dim].kind), -factors[dim].stride)
    )
    node = chain.emit(aten.reshape.default, node, [factor.size for factor in factors])
    node = chain.emit(aten.permute.default, node, order)
    return chain.emit(aten.reshape.default, node, [rows, cut.tokens, -1])
