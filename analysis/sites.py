"""From residual branches to named sites with roles, context streams and blocks."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import LATENT, Dataflow
from graphcache.analysis.layout import Layout, axes, layouts
from graphcache.analysis.residual import residuals
from graphcache.analysis.rows import rows_depend
from graphcache.analysis.spread import Spread
from graphcache.analysis.ways import Residual, beginning, unwrap
from graphcache.ir.graph import Branch, Input, StepGraph, is_tensor, value_of


def find_branches(step: StepGraph) -> tuple[Branch, ...]:
    """The residual branches of a captured step, named `<block path>.<role>[.context][.k]`."""
    return _Sites(Dataflow(step)).branches()


@dataclass(frozen=True)
class _Sites:
    flow: Dataflow

    @cached_property
    def found(self) -> list[Residual]:
        """Without updates of one vector a sample, such as an embedding, where there are streams of tokens.

        A text of a single token is one too; attention tells it apart.
        """
        spread = Spread(int(value_of(self.latent).shape[0]) if value_of(self.latent).dim() else 1)
        found = residuals(self.flow, spread)
        merges = {residual.merge: residual for residual in found}
        vectors = [residual for residual in found if spread.is_vector(residual.merge)]
        if len(vectors) == len(found):
            return found
        mixed = {beginning(self.flow, r.merge, merges) for r in vectors if self.attention(r)}
        plain = {r.merge for r in vectors if beginning(self.flow, r.merge, merges) not in mixed}
        return [residual for residual in found if residual.merge not in plain]

    @cached_property
    def merges(self) -> dict[fx.Node, Residual]:
        return {residual.merge: residual for residual in self.found}

    @cached_property
    def streams(self) -> set[fx.Node]:
        """Every value on a residual stream."""
        values: set[fx.Node] = set()
        for residual in self.found:
            values.update((residual.merge, residual.stream, residual.source, unwrap(residual.stream)))
        return values

    @cached_property
    def latent(self) -> fx.Node:
        ports = self.flow.step.ports()
        return next(node for port, node in ports if isinstance(port, Input) and port.kind == "latent")

    @cached_property
    def layout(self) -> dict[fx.Node, Layout]:
        return layouts(self.flow.nodes, self.latent)

    def branches(self) -> tuple[Branch, ...]:
        roles = [self.role(residual) for residual in self.found]
        contexts = [self.is_context(residual) for residual in self.found]
        paths = _block_paths([residual.merge for residual in self.found], roles, contexts)
        order = {path: i for i, path in enumerate(dict.fromkeys(paths))}
        used: Counter[str] = Counter()
        result = []
        for residual, role, context, path in zip(self.found, roles, contexts, paths, strict=True):
            name = f"{path}.{role}{'.context' if context else ''}"
            used[name] += 1
            if used[name] > 1:
                name = f"{name}.{used[name] - 1}"
            block = order[path]
            depth = block / (len(order) - 1) if len(order) > 1 else 0.0
            value, merge, stream = residual.value.name, residual.merge.name, residual.stream.name
            result.append(Branch(name, role, context, block, depth, value, merge, stream))
        return tuple(result)

    def is_context(self, residual: Residual) -> bool:
        """Whether the stream began without the latents: text that the image's tokens are mixed into."""
        node = ops.behind(residual.stream, ops.VIEWS | ops.COPIES | ops.SLICES)
        if node in self.merges:
            return self.is_context(self.merges[node])
        return not rows_depend(self.flow, residual.stream, LATENT)

    def role(self, residual: Residual) -> str:
        attention = self.attention(residual)
        if not attention:
            return "mlp"
        if self.is_fused(residual, self.flow.between(residual.source, residual.value), attention):
            return "parallel"
        own = {residual.stream, residual.source, unwrap(residual.stream)}
        reads = [self.read_streams(item) for node in attention for item in ops.operands(node)]
        if any(not streams & own for streams in reads):
            return "cross"
        if any(streams - own for streams in reads):
            return "joint"
        return f"self{self.factor(attention)}"

    def attention(self, residual: Residual) -> list[fx.Node]:
        inside = self.flow.between(residual.source, residual.value)
        return [node for node in inside if self.is_attention(node)]

    def is_attention(self, node: fx.Node) -> bool:
        """A product of two activations; one with a weight is a projection."""
        if node.target in ops.ATTENTION:
            return True
        if node.target not in ops.CONTRACTIONS or not ops.is_product(node):
            return False
        return all(self.flow.depends[item] for item in ops.operands(node))

    def is_fused(self, residual: Residual, inside: list[fx.Node], attention: list[fx.Node]) -> bool:
        """Whether a path with work of its own joins the attention's result (a fused attention and MLP)."""
        after = self.flow.bits(
            n for node in attention for n in self.flow.members(self.flow.descendants[node])
        )
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
        query = ops.operands(node)[0]
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


def _block_paths(merges: list[fx.Node], roles: list[str], contexts: list[bool]) -> list[str]:
    """The module that runs each residual add; adds of the top module are grouped by their roles' order."""
    paths: list[str] = []
    loose, seen = -1, set[tuple[str, bool]]()
    for node, role, context in zip(merges, roles, contexts, strict=True):
        path = _module_path(node)
        if not path:
            if loose < 0 or (role, context) in seen:
                loose, seen = loose + 1, set()
            seen.add((role, context))
            path = f"block{loose}"
        paths.append(path)
    return paths


def _module_path(node: fx.Node) -> str:
    """The path of the innermost module around a node; a second call of a module ends in `@1`."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    key, (path, _) = list(stack.items())[-1]
    path = re.sub(r"^model\.?", "", path)
    again = re.search(r"@(\d+)$", key)
    return f"{path}@{again[1]}" if again and "@" not in path else path
