"""Products of ranks' parts: linear layers keep tokens apart, attention needs all keys for its queries."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.shard_layout import Axis
from graphcache.analysis.shard_operands import Held, Rule, Share, Unshared, axis_of, met, needed, refuse
from graphcache.analysis.shard_rules import RULES, by_kind, table
from graphcache.ir.graph import LINEAR, is_tensor, value_of
from graphcache.libraries.torch_private import INTEGER_MM

aten = ops.aten


def share(node: fx.Node, held: Held) -> Share:
    """How a rank computes its part of a result.

    Raises:
        Unshared: the operation combines what different ranks hold, or has no rule.
    """
    if not any(held.get(item) for item in node.all_input_nodes):
        return Share(None)
    if any(is_tensor(item) and not _is_static(item) for item in (node, *node.all_input_nodes)):
        raise Unshared("has a size that depends on data")
    rule = linear if node.meta.get(LINEAR) else _RULES.get(node.target) or by_kind(node.target)
    if rule is None:
        raise Unshared("has no rule that says how parts of its result are computed")
    return rule(node, held)


def _is_static(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in value_of(node).shape)


def linear(node: fx.Node, held: Held) -> Share:
    """A linear layer: everything before the channels is a token's own."""
    source, *weights = node.all_input_nodes
    axis = needed(source, held)
    refuse(axis.dim == value_of(source).dim() - 1)
    return Share(axis, {source: axis, **dict.fromkeys(weights)})


def convolution(node: fx.Node, held: Held) -> Share:
    """A convolution of whole samples, or whose kernel holds one place: a linear layer over the second
    dimension.
    """
    source, weight, *rest = node.all_input_nodes
    axis = needed(source, held)
    refuse(value_of(source).dim() != value_of(weight).dim())
    if axis.dim:
        refuse(any(size != 1 for size in value_of(weight).shape[2:]) or axis.dim == 1)
        refuse(value_of(node).shape[2:] != value_of(source).shape[2:])
    return Share(axis, {source: axis, **dict.fromkeys((weight, *rest))})


def of_samples(node: fx.Node, held: Held) -> Share:
    """What goes over each sample for itself."""
    source, *rest = node.all_input_nodes
    axis = needed(source, held)
    refuse(axis.dim != 0 or value_of(node).shape[0] != value_of(source).shape[0])
    return Share(axis, {source: axis, **dict.fromkeys(rest)})


def attention(node: fx.Node, held: Held) -> Share:
    """A rank's queries against all keys and values, or whole attentions of its own."""
    query, key, value, *rest = cast(Any, node.args)
    mask = rest[0] if rest else node.kwargs.get("attn_mask")
    rank, axis = value_of(query).dim(), axis_of(query, held)
    others = [item for item in (key, value, mask) if isinstance(item, fx.Node)]
    if axis is None:
        return Share(None, dict.fromkeys((query, *others)))
    grouped = node.kwargs.get("enable_gqa") or rest[4:5] == [True]
    causal = node.kwargs.get("is_causal") or rest[2:3] == [True]
    place = axis.dim - rank
    refuse(place == -1 or (place == -2 and (bool(causal) or query in (key, value))))
    refuse(place == -3 and bool(grouped))
    needs: dict[fx.Node, Axis | None] = {query: axis}
    for item in others:
        is_whole = place == -2 and item is not mask
        needs[item] = None if is_whole else met(item, place, axis)
    _refuse_others(needs, held, spares=(key, value) if place == -2 else ())
    most = max(value_of(item).dim() for item in (query, key, value))
    return Share(axis.at(most + place), needs)


def attention_and_lse(node: fx.Node, held: Held) -> Share:
    """The same by a kernel that also returns the log-sum-exp of each query's row."""
    found = attention(node, held)
    if not isinstance(found.axis, Axis):
        return found
    results: Any = node.meta["val"]
    return replace(found, axis=(found.axis, found.axis, *(None for _ in results[2:])))


def _refuse_others(needs: dict[fx.Node, Axis | None], held: Held, spares: tuple[fx.Node, ...] = ()) -> None:
    """Refuse operands that are split, and in another way than they are needed; the spared are exchanged."""
    for item, axis in needs.items():
        own = axis_of(item, held)
        if own is not None and item not in spares:
            refuse(axis is None or axis.dim != own.dim or not axis.agrees(own))


def matmul(node: fx.Node, held: Held) -> Share:
    """A product: the parts are the left operand's rows, the right one's columns, or a dimension of both.

    Of two that are split the left one's rows go on, which are queries; the right one is exchanged.
    """
    bias = node.args[:1] if node.target in (aten.addmm.default, aten.baddbmm.default) else ()
    left, right = (item for item in node.args[len(bias) :][:2] if isinstance(item, fx.Node))
    refuse(left is right or min(value_of(item).dim() for item in (left, right)) < 2)
    rank = value_of(node).dim()
    for item, beside, row in ((left, right, -2), (right, left, -1)):
        axis = axis_of(item, held)
        if axis is None:
            continue
        place = axis.dim - value_of(item).dim()
        if place == -3 - row:
            continue  # what is summed over
        needs: dict[fx.Node, Axis | None] = {item: axis}
        needs[beside] = None if place == row else met(beside, place, axis)
        result = axis.at(rank + place)
        needs |= {further: met(further, place, result) for further in bias if isinstance(further, fx.Node)}
        _refuse_others(needs, held, spares=(beside,) if place == row else ())
        return Share(result, needs)
    raise Unshared("combines what different ranks hold")


def einsum(node: fx.Node, held: Held) -> Share:
    """A sum over products, whose letters say which dimensions meet."""
    equation, items = str(node.args[0]).replace(" ", ""), ops.operands(node)
    if "->" not in equation or "." in equation:
        raise Unshared(f"has the equation {equation!r}, which is not read")
    inputs, result = equation.split("->")
    terms = inputs.split(",")
    refuse(len(set(items)) != len(items) or any(len(set(term)) != len(term) for term in terms))
    axes = {item: axis for item in items if (axis := axis_of(item, held)) is not None}
    letters = {item: term[axes[item].dim] for item, term in zip(items, terms, strict=True) if item in axes}
    chosen = sorted((letter for letter in letters.values() if letter in result), key=result.find)
    if not chosen:
        raise Unshared("combines what different ranks hold")
    letter = chosen[0]
    axis = next(axes[item] for item in items if letters.get(item) == letter)
    needs: dict[fx.Node, Axis | None] = {
        item: axis.at(term.index(letter)) if letter in term else None
        for item, term in zip(items, terms, strict=True)
    }
    _refuse_others(needs, held, spares=tuple(item for item in items if needs[item] is None))
    return Share(axis.at(result.index(letter)), needs)


_PRODUCTS: list[tuple[Rule, Iterable[object]]] = [
    (linear, [aten.linear.default]),
    (attention, ops.ATTENTION),
    (attention_and_lse, ops.FUSED_ATTENTION),
    (matmul, [aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default]),
    (matmul, [aten.baddbmm.default, INTEGER_MM]),
    (einsum, [aten.einsum.default]),
    (convolution, [aten.conv1d.default, aten.conv2d.default, aten.conv3d.default]),
    (convolution, [aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding]),
    (of_samples, [aten.group_norm.default, aten.avg_pool2d.default, aten.upsample_nearest2d.vec]),
    (of_samples, [aten.upsample_bilinear2d.vec, aten.pixel_shuffle.default]),
    (of_samples, [aten.pixel_unshuffle.default]),
]
_RULES = RULES | table(_PRODUCTS)
