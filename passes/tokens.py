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
        indices = self._indices(cached, axis.dim, axis.start)
        result = self.chain.emit(aten.index_put_.default, cached, indices, computed)
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
        places = self._spread(shape, axis)
        return self.chain.emit(aten.gather.default, node, axis.dim, places)

    def _indices(self, cached: fx.Node, dim: int, start: int) -> list[fx.Node | None]:
        """One for each dimension up to that of the tokens; Inductor writes in place by these alone."""
        value = value_of(cached)
        places = self._along(dim, start)
        if all(size == 1 for size in value.shape[:dim]):
            return [*(None for _ in range(dim)), self.chain.emit(aten.view.default, places, [self.count])]
        before: list[fx.Node | None] = []
        for outer, size in enumerate(value.shape[:dim]):
            all_of_it = self.chain.emit(aten.arange.default, size, device=value.device)
            view = [size if inner == outer else 1 for inner in range(dim + 1)]
            before.append(self.chain.emit(aten.view.default, all_of_it, view))
        return [*before, places]

    def _along(self, dim: int, start: int) -> fx.Node:
        """The chosen places as dimension `dim`, behind rows and ones."""
        places = self.chosen
        if start:
            places = self.chain.emit(aten.add.Tensor, places, start)
        rows = int(value_of(places).shape[0])
        shape = [self.count] if dim == 0 else [rows, *(1 for _ in range(dim - 1)), self.count]
        return self.chain.emit(aten.view.default, places, shape)

    def _spread(self, shape: list[int], axis: Axis) -> fx.Node:
        """The chosen places along an axis, for every other entry of a shape alike."""
        places = self.chosen
        if axis.start:
            places = self.chain.emit(aten.add.Tensor, places, axis.start)
        view = [shape[0], *(1 for _ in shape[1:])]
        view[axis.dim] = self.count
        places = self.chain.emit(aten.view.default, places, view)
        return self.chain.emit(aten.expand.default, places, shape)

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
