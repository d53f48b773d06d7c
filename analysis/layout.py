"""Which of the latents' axes a dimension runs over: tells spatial from temporal attention."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphcache.analysis import ops
from graphcache.ir.graph import is_tensor, value_of
from graphcache.libraries.torch_private import UNSAFE_VIEW

aten = ops.aten


@dataclass(frozen=True, slots=True)
class AxisFactor:
    """Part of a dimension: `axis` of the latents (None: no such axis), and how many entries it has."""

    axis: int | None
    size: int


Dimension = tuple[AxisFactor, ...]
Layout = tuple[Dimension, ...]


def layouts(nodes: Sequence[fx.Node], latent: fx.Node) -> dict[fx.Node, Layout]:
    """Follow the latents' axes through the graph; a node that no rule covers has no layout."""
    shape = value_of(latent).shape
    found: dict[fx.Node, Layout] = {latent: tuple((AxisFactor(i, int(n)),) for i, n in enumerate(shape))}
    for node in nodes:
        if node.op != "call_function" or not is_tensor(node):
            continue
        layout = _layout(node, found)
        if layout is not None and len(layout) == value_of(node).dim():
            found[node] = layout
    return found


def axes(dimension: Dimension) -> frozenset[int]:
    """The latents' axes that a dimension runs over."""
    return frozenset(f.axis for f in dimension if f.axis is not None and f.size > 1)


def _layout(node: fx.Node, found: dict[fx.Node, Layout]) -> Layout | None:
    pieces = node.target is operator.getitem
    operands = node.all_input_nodes[0].all_input_nodes if pieces else node.all_input_nodes
    known = [item for item in operands if item in found]
    if not known:
        return None
    shape = tuple(value_of(node).shape)
    if not all(isinstance(n, int) for n in shape):
        return None
    source = known[0]
    given = found[source]
    if node.target in (
        aten.view.default,
        aten.reshape.default,
        UNSAFE_VIEW,
        aten.flatten.using_ints,
        aten.unflatten.int,
    ):
        return _regroup(given, shape)
    if node.target in (aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim):
        return _moved(node, given)
    if node.target in (aten.conv2d.default, aten.conv3d.default):
        return _convolved(given, shape)
    if node.target is aten.einsum.default:
        return None
    same = [found[item] for item in known if tuple(value_of(item).shape) == shape]
    if same:
        return same[0]
    if len(given) == len(shape):
        return tuple(_kept(d, n) for d, n in zip(given, shape, strict=True))
    return None


def _kept(dimension: Dimension, size: int) -> Dimension:
    """The factors when the size still fits them; else a dimension of its own (a projection, a slice)."""
    if math.prod(f.size for f in dimension) == size:
        return dimension
    return (AxisFactor(None, size),)


def _moved(node: fx.Node, given: Layout) -> Layout | None:
    dims = list(given)
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return tuple(dims[i] for i in order)
    first = ops.integer(node, 1)
    if node.target is aten.transpose.int:
        second = ops.integer(node, 2)
        dims[first], dims[second] = dims[second], dims[first]
    elif node.target is aten.unsqueeze.default:
        dims.insert(first % (len(dims) + 1), (AxisFactor(None, 1),))
    else:
        del dims[first]
    return tuple(dims)


def _convolved(given: Layout, shape: tuple[int, ...]) -> Layout:
    """A patch embedding: channels are new, each further axis is kept at its new size."""
    kept = [given[0], (AxisFactor(None, shape[1]),)]
    for dimension, size in zip(given[2:], shape[2:], strict=True):
        axis = dimension[0].axis if len(dimension) == 1 else None
        kept.append((AxisFactor(axis, size),))
    return tuple(kept)


def _regroup(given: Layout, shape: tuple[int, ...]) -> Layout | None:
    """Split and merge factors, in order, so that they fill the new shape."""
    factors = [f for dimension in given for f in dimension if f.size != 1]
    result: list[Dimension] = []
    for size in shape:
        taken: list[AxisFactor] = []
        filled = 1
        while filled < size:
            if not factors:
                return None
            head = factors.pop(0)
            rest = math.gcd(head.size, size // filled)
            if rest == 1 or size % filled:
                return None
            taken.append(AxisFactor(head.axis, rest))
            if rest != head.size:
                factors.insert(0, AxisFactor(head.axis, head.size // rest))
            filled *= rest
        result.append(tuple(taken) or (AxisFactor(None, 1),))
    return tuple(result)
