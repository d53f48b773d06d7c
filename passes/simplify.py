"""Drop what an inference graph does not need, changing no bit of its results."""

from dataclasses import dataclass, replace

from torch import fx

from graphcache.analysis import ops
from graphcache.ir.graph import Branch, StepGraph, is_tensor, same_sizes, value_of
from graphcache.passes.prune import sweep

aten = ops.aten

_MOVING = {aten.transpose.int, aten.permute.default, aten.t.default, aten.movedim.int, aten.swapaxes.default}
_REPEATING = (ops.COPIES | ops.VIEWS | {aten.slice.Tensor}) - _MOVING - {aten.detach.default}
"""Operations that change nothing when shape, strides and dtype stay; `detach` changes gradients."""


@dataclass(frozen=True)
class Simplify:
    """Remove asserts, inference-time dropout, and copies, casts and slices that change nothing.

    What functionalisation leaves of an in-place write, `copy`, becomes its source: it has no derivative.
    A value that the graph returns keeps its own copy, so that no result aliases an input.
    """

    def __call__(self, step: StepGraph) -> StepGraph:
        graph, env = step.copy()
        returned = {env[node] for node in step.results()}
        renamed: dict[str, str] = {}
        for node in list(graph.nodes):
            if node.op != "call_function" or node in returned:
                continue
            same = _identical(node)
            if same is not None:
                renamed[node.name] = same.name
                node.replace_all_uses_with(same)
                graph.erase_node(node)
        sweep(graph)
        return step.rebuilt(graph, branches=_renamed(step, renamed))


def _renamed(step: StepGraph, names: dict[str, str]) -> tuple[Branch, ...]:
    def final(name: str) -> str:
        while name in names:
            name = names[name]
        return name

    return tuple(
        replace(b, value=final(b.value), merge=final(b.merge), stream=final(b.stream)) for b in step.branches
    )


def _identical(node: fx.Node) -> fx.Node | None:
    """The operand that the node merely repeats, if it does."""
    source = node.args[node.target is aten.copy.default] if node.args else None
    if not isinstance(source, fx.Node) or not is_tensor(source) or not is_tensor(node):
        return None
    if not _repeats(node):
        return None
    before, after = value_of(source), value_of(node)
    if node.target is aten.copy.default:
        return source if before.dtype == after.dtype and same_sizes(before.shape, after.shape) else None
    same = (
        before.dtype == after.dtype
        and before.device == after.device
        and same_sizes(before.shape, after.shape)
        and same_sizes(before.stride(), after.stride())
    )
    return source if same else None


def _repeats(node: fx.Node) -> bool:
    target = node.target
    if target in _REPEATING or target is aten.copy.default:
        return True
    if target in (aten.div.Tensor, aten.mul.Tensor):
        return isinstance(node.args[1], (int, float)) and node.args[1] == 1
    return False
