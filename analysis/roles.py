"""The role of a residual branch, from what its attention reads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import LATENT, Dataflow
from graphcache.analysis.layout import Layout, axes, layouts
from graphcache.analysis.ways import Residual, unwrap
from graphcache.ir.graph import is_tensor, value_of
from graphcache.ir.opaque import OPAQUE, called


@dataclass(frozen=True)
class Roles:
    """Tells the roles of a graph's residual branches, given by their residual adds."""

    flow: Dataflow
    merges: Mapping[fx.Node, Residual]
    latent: fx.Node

    @cached_property
    def streams(self) -> set[fx.Node]:
        """Every value on a residual stream."""
        values: set[fx.Node] = set()
        for residual in self.merges.values():
            values.update((residual.merge, residual.stream, residual.source, unwrap(residual.stream)))
        return values

    @cached_property
    def layout(self) -> dict[fx.Node, Layout]:
        return layouts(self.flow.nodes, self.latent)

    def role(self, residual: Residual) -> str:
        """`cross` only if no attention of the branch has keys and values of the branch's own stream."""
        work = self.work(residual)
        attention = [node for node in work if self.is_attention(node)]
        if not attention:
            return "mlp"
        if self.is_fused(residual, work, attention):
            return "parallel"
        own = {residual.stream, residual.source, unwrap(residual.stream)}
        reads = {node: [self.read_streams(item) for item in self.operands(node)] for node in attention}
        inner = [node for node in attention if all(streams & own for streams in reads[node])]
        if not inner:
            return "cross"
        if any(streams - own for node in inner for streams in reads[node]):
            return "joint"
        return f"self{self.factor(inner)}"

    def work(self, residual: Residual) -> list[fx.Node]:
        """The nodes from a branch's source to its value, without those of another branch added on the way."""
        inside = set(self.flow.between(residual.source, residual.value))
        todo, seen = [residual.value], set[fx.Node]()
        while todo:
            node = todo.pop()
            if node in seen or node not in inside or node in self.merges:
                continue
            seen.add(node)
            if node is not residual.source:
                todo.extend(node.all_input_nodes)
        return sorted(seen, key=self.flow.index.__getitem__)

    def holds_attention(self, residual: Residual) -> bool:
        return any(self.is_attention(node) for node in self.work(residual))

    def is_attention(self, node: fx.Node) -> bool:
        """A product of two activations; one with a weight is a projection."""
        call = called(node)
        if call is not None:
            return call.attends
        if node.target in ops.ATTENTION:
            return True
        if node.target not in ops.CONTRACTIONS or not ops.is_product(node):
            return False
        return all(self.flow.depends[item] for item in ops.operands(node))

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """What attention multiplies; an opaque call's are what it is given of the latents, and texts."""
        items = ops.operands(node)
        if node.target is not OPAQUE:
            return items
        tensors = [(item, value_of(item)) for item in items]
        texts = {item for item, value in tensors if value.dim() == 3 and value.is_floating_point()}
        return [item for item in items if item in texts or self.flow.depends[item] & LATENT]

    def is_fused(self, residual: Residual, inside: list[fx.Node], attention: list[fx.Node]) -> bool:
        """Whether a path with work of its own joins the attention's result (a fused attention and MLP)."""
        after = 0
        for node in attention:
            after |= self.flow.descendants[node]
        for node in inside:
            if node.target not in (ops.aten.cat.default, ops.aten.add.Tensor):
                continue
            if not after >> self.flow.index[node] & 1:
                continue
            for item in node.all_input_nodes:
                apart = not after >> self.flow.index[item] & 1
                if apart and self.flow.reaches(residual.source, item):
                    work = self.flow.between(residual.source, item)
                    if any(ops.is_product(n) for n in work):
                        return True
        return False

    def read_streams(self, node: fx.Node) -> set[fx.Node]:
        """The values on residual streams that a node was computed from, each way cut at the first one."""
        todo, seen, read = [node], set[fx.Node](), set[fx.Node]()
        while todo:
            item = todo.pop()
            if item in seen:
                continue
            seen.add(item)
            if item in self.streams:
                read.add(item)
            else:
                todo.extend(item.all_input_nodes)
        return read

    def factor(self, attention: Iterable[fx.Node]) -> str:
        """`.spatial` or `.temporal` when attention runs over frames or within them, of 5-D latents.

        Channels are contracted away by the patch embedding, so of the axes 1 and 2 only frames remain.
        """
        node = next(iter(attention))
        query = self.operands(node)[0]
        layout = self.layout.get(query)
        if layout is None or not is_tensor(self.latent) or self.latent.meta["val"].dim() != 5:
            return ""
        tokens = axes(layout[-2])
        others: frozenset[int] = frozenset().union(*(axes(d) for d in layout[:-2]))
        if tokens & {3, 4} and others & {1, 2}:
            return ".spatial"
        if tokens & {1, 2} and others & {3, 4}:
            return ".temporal"
        return ""
