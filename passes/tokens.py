"""A branch on some of its tokens: gathered before its norm, computed, scattered into the cached value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.token_rules import Axis, is_passed_on
from graphcache.analysis.tokens import TokenCut
from graphcache.ir.graph import value_of
from graphcache.passes.rewrite import Chain, Rewriter

aten = ops.aten

_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


@dataclass
class Tokens:
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

    @property
    def count(self) -> int:
        return int(value_of(self.chosen).shape[1])

    def value(self) -> fx.Node:
        """The cut's value for the chosen tokens, in the value's layout."""
        for node, axis in self.cut.gathered.items():
            self.made[node] = self._gathered(self.rewriter.nodes[node.name], axis)
        for node, axis in self.cut.computed.items():
            self.made[node] = self._computed(node, axis)
        return self.made[self.cut.value]

    def scatter(self, cached: fx.Node, axis: Axis, computed: fx.Node) -> fx.Node:
        """Write the chosen tokens into a value, in place."""
        shape = tuple(value_of(cached).shape)
        if axis.rows > 1:
            cached = self.chain.emit(aten.view.default, cached, [axis.rows, axis.count, *shape[1:]])
            computed = self.chain.emit(aten.view.default, computed, [axis.rows, self.count, *shape[1:]])
            axis = Axis(1, 0, axis.count)
        # not scatter_, which Inductor does on a copy of all of it
        result = self.chain.emit(aten.index_put_.default, cached, self._indices(cached, axis), computed)
        if tuple(value_of(result).shape) != shape:
            result = self.chain.emit(aten.view.default, result, list(shape))
        return result

    def blend(self, cached: fx.Node, computed: fx.Node, clusters: fx.Node, share: float) -> fx.Node:
        """Move every token of a (rows, tokens, channels) value towards what its cluster's token became."""
        shape = list(value_of(cached).shape)
        places = self.chain.emit(aten.unsqueeze.default, clusters, 2)
        places = self.chain.emit(aten.expand.default, places, shape)
        spread = self.chain.emit(aten.gather.default, computed, 1, places)
        kept = self.chain.emit(aten.mul.Tensor, cached, 1 - share)
        mixed = self.chain.emit(aten.add.Tensor, kept, self.chain.emit(aten.mul.Tensor, spread, share))
        return self.chain.emit(aten.copy_.default, cached, mixed)

    def _gathered(self, node: fx.Node, axis: Axis) -> fx.Node:
        if axis.dim == 0:
            node, axis = self.chain.emit(aten.unsqueeze.default, node, 0), Axis(1, axis.start, axis.count)
        shape = [self.cut.rows, *value_of(node).shape[1:]]
        if list(value_of(node).shape) != shape:
            node = self.chain.emit(aten.expand.default, node, shape)
        shape[axis.dim] = self.count
        places = self.chain.emit(aten.expand.default, self._places(axis, len(shape)), shape)
        return self.chain.emit(aten.gather.default, node, axis.dim, places)

    def _indices(self, cached: fx.Node, axis: Axis) -> list[fx.Node]:
        """One index for each dimension up to that of the tokens: all of the outer ones, the chosen places."""
        value, rank = value_of(cached), axis.dim + 1
        indices = []
        for dim, size in enumerate(value.shape[: axis.dim]):
            every = self.chain.emit(aten.arange.default, size, device=value.device)
            view = [size if other == dim else 1 for other in range(rank)]
            indices.append(self.chain.emit(aten.view.default, every, view))
        return [*indices, self._places(axis, rank)]

    def _places(self, axis: Axis, rank: int) -> fx.Node:
        """The chosen places along an axis of a value with so many dimensions, rows outermost."""
        places = self.chosen
        if axis.start:
            places = self.chain.emit(aten.add.Tensor, places, axis.start)
        view = [int(value_of(places).shape[0]), *(1 for _ in range(rank - 1))]
        view[axis.dim] = self.count
        return self.chain.emit(aten.view.default, places, view)

    def _computed(self, node: fx.Node, axis: Axis) -> fx.Node:
        passed = is_passed_on(node, axis)
        if passed is not None:
            return self.made[passed]
        if node.target in _RESHAPES:
            shape = list(value_of(node).shape)
            shape[axis.dim] = axis.rows * self.count
            return self.chain.emit(aten.reshape.default, self._operand(node.args[0]), shape)
        if node.target is aten.expand.default:
            shape = list(value_of(node).shape)
            shape[axis.dim] = self.count
            return self.chain.emit(node.target, self._operand(node.args[0]), shape)
        args = fx.map_arg(node.args, self._operand)
        kwargs = fx.map_arg(node.kwargs, self._operand)
        return self.chain.emit(node.target, *args, **kwargs)

    def _operand(self, node: Any) -> fx.Node:
        if node in self.made:
            return self.made[node]
        if node.name in self.memory:
            return self.memory[node.name]
        if not isinstance(node.meta["val"], torch.Tensor):
            # the pieces of a split that leaves the tokens whole
            args = fx.map_arg(node.args, self._operand)
            self.made[node] = self.chain.emit(node.target, *args, **node.kwargs)
            return self.made[node]
        return self.rewriter.nodes[node.name]
