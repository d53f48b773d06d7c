"""Drop what an inference graph does not need, changing no bit of its results."""

import sys
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from graphcache.analysis import ops
from graphcache.ir.graph import Branch, StepGraph, is_tensor, same_sizes, value_of
from graphcache.passes.prune import sweep

aten = ops.aten

_MOVING = {aten.transpose.int, aten.permute.default, aten.t.default, aten.movedim.int, aten.swapaxes.default}
_REPEATING = (ops.COPIES | ops.VIEWS | {aten.slice.Tensor}) - _MOVING - {aten.detach.default}
"""Operations that change nothing when shape, strides and dtype stay; `detach` changes gradients."""


_FILLS: dict[Any, Any] = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.full_like.default: None,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
}
_SHAPED: dict[Any, Any] = {
    aten.expand_as.default: aten.expand.default,
    aten.view_as.default: aten.view.default,
    aten.reshape_as.default: aten.reshape.default,
}


@dataclass(frozen=True)
class Simplify:
    """Remove asserts, inference-time dropout, and copies, casts and slices that change nothing.

    What functionalisation leaves of an in-place write, `copy`, becomes its source: it has no derivative.
    A value that the graph returns keeps its own copy, so that no result aliases an input. What takes no more
    than the shape or dtype of an operand says these itself, and depends on it no longer.
    """

    def __call__(self, step: StepGraph) -> StepGraph:
        graph, env = step.copy()
        returned = {env[node] for node in step.results()}
        renamed: dict[str, str] = {}
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            _say_what_is_known(node)
            if node in returned:
                continue
            same = _identical(node)
            if same is not None:
                renamed[node.name] = same.name
                node.replace_all_uses_with(same)
                graph.erase_node(node)
        sweep(graph)
        return step.rebuilt(graph, branches=_renamed(step, renamed))


def _say_what_is_known(node: fx.Node) -> None:
    """Put the shape or dtype of an operand that is read for nothing else into the operation."""
    if node.target is aten.slice.Tensor:
        _say_bounds(node)
    value = value_of(node) if is_tensor(node) else None
    if value is None or not all(isinstance(size, int) for size in value.shape):
        return
    target, sizes = node.target, list(value.shape)
    if target in _FILLS and value.is_contiguous():
        filling = node.args[1] if target is aten.full_like.default else _FILLS[target]
        node.target, node.args = aten.full.default, (sizes, filling)
        node.kwargs = {"dtype": value.dtype, "device": value.device}
    elif target in _SHAPED:
        node.target, node.args = _SHAPED[target], (node.args[0], sizes)
    elif target is aten.type_as.default and value_of(node.all_input_nodes[0]).device == value.device:
        node.target, node.args = aten.to.dtype, (node.args[0], value.dtype)


def _say_bounds(node: fx.Node) -> None:
    """Bounds of a slice that are left out, as numbers: traces with symbols leave some out that others say."""
    given = dict(zip(("dim", "start", "end", "step"), node.args[1:], strict=False))
    start, end = given.get("start"), given.get("end")
    bounds = (0 if start is None else start, sys.maxsize if end is None else end)
    node.args = (node.args[0], given.get("dim", 0), *bounds, *node.args[4:])


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
