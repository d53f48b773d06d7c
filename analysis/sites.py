"""From residual branches to named sites with roles, context streams and blocks."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import LATENT, Dataflow
from graphcache.analysis.residual import residuals
from graphcache.analysis.roles import Roles
from graphcache.analysis.rows import rows_depend
from graphcache.analysis.spread import Spread
from graphcache.analysis.stems import Blocks, Standing, work_of
from graphcache.analysis.ways import Residual, beginning
from graphcache.ir.graph import Branch, Input, StepGraph, value_of
from graphcache.ir.selector import STEM


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
        roles = Roles(self.flow, merges, self.latent)
        mixed = {beginning(self.flow, r.merge, merges) for r in vectors if roles.holds_attention(r)}
        plain = {r.merge for r in vectors if beginning(self.flow, r.merge, merges) not in mixed}
        return [residual for residual in found if residual.merge not in plain]

    @cached_property
    def merges(self) -> dict[fx.Node, Residual]:
        return {residual.merge: residual for residual in self.found}

    @cached_property
    def latent(self) -> fx.Node:
        ports = self.flow.step.ports()
        return next(node for port, node in ports if isinstance(port, Input) and port.kind == "latent")

    @cached_property
    def roles(self) -> list[str]:
        """By residual add its role, or `stem` outside of the blocks."""
        roles = Roles(self.flow, self.merges, self.latent)
        blocks = Blocks(
            [
                Standing(module_path(residual.merge), roles.role(residual), work_of(roles.work(residual)))
                for residual in self.found
            ]
        )
        return [place.role if blocks.hold(i) else STEM for i, place in enumerate(blocks.places)]

    def branches(self) -> tuple[Branch, ...]:
        contexts = [self.is_context(residual) for residual in self.found]
        paths = _block_paths([residual.merge for residual in self.found], self.roles, contexts)
        inside = [path for path, role in zip(paths, self.roles, strict=True) if role != STEM]
        order = {path: i for i, path in enumerate(dict.fromkeys(inside))}
        used: Counter[str] = Counter()
        result: list[Branch] = []
        for residual, role, context, path in zip(self.found, self.roles, contexts, paths, strict=True):
            name = f"{path}.{role}{'.context' if context else ''}"
            used[name] += 1
            if used[name] > 1:
                name = f"{name}.{used[name] - 1}"
            block, depth = _place(role, path, order, result)
            value, merge, stream = residual.value.name, residual.merge.name, residual.stream.name
            result.append(Branch(name, role, context, block, depth, value, merge, stream))
        return tuple(result)

    def is_context(self, residual: Residual) -> bool:
        """Whether the stream began without the latents: text that the image's tokens are mixed into."""
        return self._began_apart(residual.stream)

    def _began_apart(self, value: fx.Node) -> bool:
        if not rows_depend(self.flow, value, LATENT):
            return True
        node = ops.behind(value, ops.VIEWS | ops.COPIES | ops.SLICES)
        if node in self.merges:
            return self._began_apart(self.merges[node].stream)
        return node.target is ops.aten.cat.default and all(map(self._began_apart, node.all_input_nodes))


def _place(role: str, path: str, order: dict[str, int], before: Sequence[Branch]) -> tuple[int, float]:
    """Number and depth of a branch's block; a stem has none, and stands before all blocks or behind."""
    if role == STEM:
        return -1, float(any(branch.role != STEM for branch in before))
    return order[path], order[path] / (len(order) - 1) if len(order) > 1 else 0.0


def _block_paths(merges: list[fx.Node], roles: list[str], contexts: list[bool]) -> list[str]:
    """The module that runs each residual add; adds of the top module are grouped by their roles' order."""
    paths: list[str] = []
    loose, seen = -1, set[tuple[str, bool]]()
    for node, role, context in zip(merges, roles, contexts, strict=True):
        path = module_path(node) or ("model" if role == STEM else "")
        if not path:
            if loose < 0 or (role, context) in seen:
                loose, seen = loose + 1, set()
            seen.add((role, context))
            path = f"block{loose}"
        paths.append(path)
    return paths


def module_path(node: fx.Node) -> str:
    """The path of the innermost module around a node; a second call of a module ends in `@1`."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    key, (path, _) = list(stack.items())[-1]
    path = re.sub(r"^model\.?", "", path)
    again = re.search(r"@(\d+)$", key)
    return f"{path}@{again[1]}" if again and "@" not in path else path
