"""Rules of ATen operations: where the tokens of a result lie, and which operands they are computed from.

An operation without a rule, or one that mixes tokens, is refused.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.token_joins import concatenated, padded, sliced, written_over
from graphcache.analysis.token_layout import TokenFactor, is_marked, laid, marks, merged, other, viewed
from graphcache.analysis.token_operands import Followed, Known, Untokenised, aligned, refuse
from graphcache.analysis.token_products import attention, einsum, linear, matmul, pointwise_convolution
from graphcache.ir.graph import LINEAR, has_static_shape, value_of
from graphcache.ir.opaque import called
from graphcache.libraries.torch_private import CONJUGATE, INTEGER_MM, UNSAFE_VIEW, OpOverload

aten = ops.aten
Rule = Callable[[fx.Node, Known], Followed]


def follow(node: fx.Node, known: Known) -> Followed:
    """Where the tokens of a result lie, and what they are computed from.

    Raises:
        Untokenised: the operation mixes tokens, or has no rule.
    """
    if ops.is_result_of_call(node):
        call = called(node.all_input_nodes[0])
        assert call is not None
        raise Untokenised(node, f"calls module '{call.place}', which was not traced and may mix tokens")
    if not has_static_shape(node):
        raise Untokenised(node, "has a shape that depends on data")
    rule = linear if node.meta.get(LINEAR) else _RULES.get(node.target) or _by_kind(node.target)
    if rule is None:
        raise Untokenised(node, "has no rule that says where its tokens come from")
    return rule(node, known)


def _by_kind(target: object) -> Rule | None:
    """The rule of an operation that says itself that it goes element by element."""
    tags = target.tags if isinstance(target, OpOverload) else ()
    return (
        _elementwise
        if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
        else None
    )


def _elementwise(node: fx.Node, known: Known) -> Followed:
    return aligned(node, node.all_input_nodes, known)


def _like(node: fx.Node, known: Known) -> Followed:
    """The operand's shape, filled with one number."""
    source: Any = node.args[0]
    return aligned(node, [source], known)


def _normed(node: fx.Node, known: Known) -> Followed:
    """A norm over the last dimensions."""
    source, shape, *_ = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(shape, list | tuple)
    layout = known.needed(node, source)
    refuse(node, any(is_marked(dim) for dim in layout[-len(shape) :]))
    weights = [item for item in node.all_input_nodes if item is not source]
    return Followed(layout, {source: layout}, tuple(weights))


def _reduced(node: fx.Node, known: Known) -> Followed:
    """A mean, sum, softmax or the like over given dimensions."""
    source: Any = node.args[0]
    layout = known.needed(node, source)
    dims = ops.reduced_dimensions(node, len(layout))
    refuse(node, any(is_marked(layout[dim]) for dim in dims))
    if value_of(node).dim() == len(layout):
        return Followed(laid([int(n) for n in value_of(node).shape], marks(layout)), {source: layout})
    return Followed(tuple(found for dim, found in enumerate(layout) if dim not in dims), {source: layout})


def _view(node: fx.Node, known: Known) -> Followed:
    """Dimensions in another order, split and merged: found by where the view of a plain tensor lies in it."""
    source: Any = node.args[0]
    target: Any = node.target
    layout = known.needed(node, source)
    given, shape = tuple(value_of(source).shape), tuple(value_of(node).shape)
    plain = torch.empty(given, device="meta")
    result = plain.view(shape) if target in _REGROUPED else target(plain, *node.args[1:], **node.kwargs)
    found = viewed(layout, result)
    if found is None:
        raise Untokenised(node, f"makes {shape} of {given}, which splits or merges the tokens")
    return Followed(found, {source: layout}, how="shaped" if result.is_contiguous() else "same")


_REGROUPED = (
    aten.view.default,
    aten.reshape.default,
    UNSAFE_VIEW,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.ravel.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
_REORDERED = (
    aten.permute.default,
    aten.transpose.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
)


def _expanded(node: fx.Node, known: Known) -> Followed:
    source: Any = node.args[0]
    return replace(aligned(node, [source], known), how="expanded")


def _repeated(node: fx.Node, known: Known) -> Followed:
    """Repeats, as outer or as inner part of a dimension."""
    source, given, *_ = node.args
    assert isinstance(source, fx.Node)
    layout = known.needed(node, source)
    if node.target is aten.repeat_interleave.self_int:
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        if not isinstance(dim, int) or not isinstance(given, int):
            raise Untokenised(node, "repeats tokens in a way that is not known")
        dims = list(layout)
        dims[dim % len(dims)] = merged([*dims[dim % len(dims)], TokenFactor(given)])
        return Followed(tuple(dims), {source: layout})
    assert isinstance(given, list | tuple)
    rank = value_of(node).dim()
    counts = [*(1 for _ in range(rank - len(given))), *given]
    dims = [*(() for _ in range(rank - len(layout))), *layout]
    repeated = [merged([TokenFactor(int(n)), *dim]) for n, dim in zip(counts, dims, strict=True)]
    return Followed(tuple(repeated), {source: layout})


def _stacked(node: fx.Node, known: Known) -> Followed:
    """Pieces side by side along a dimension of their own."""
    pieces: Any = node.args[0]
    shape = [int(size) for size in value_of(node).shape]
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim = int(given) % len(shape)
    found = aligned(node, pieces, known, [*shape[:dim], *shape[dim + 1 :]])
    return replace(found, layout=(*found.layout[:dim], other(shape[dim]), *found.layout[dim:]))


def _complex(node: fx.Node, known: Known) -> Followed:
    """Pairs of numbers as complex ones, or back."""
    source: Any = node.args[0]
    layout = known.needed(node, source)
    if node.target is aten.view_as_real.default:
        return Followed((*layout, other(2)), {source: layout})
    refuse(node, is_marked(layout[-1]))
    return Followed(layout[:-1], {source: layout})


def _displaced(node: fx.Node, known: Known) -> Followed:
    """A roll or flip: of channels, since tokens would stand in other places than their stream's."""
    source: Any = node.args[0]
    layout = known.needed(node, source)
    given: Any = node.args[1] if node.target is aten.flip.default else (node.args[2:] or [[]])[0]
    dims = range(len(layout)) if not given else [given] if isinstance(given, int) else given
    if any(is_marked(layout[dim]) for dim in dims):
        raise Untokenised(node, "moves tokens to other places")
    return Followed(layout, {source: layout})


def _table(rules: Sequence[tuple[Rule, Iterable[object]]]) -> dict[object, Rule]:
    return {target: rule for rule, targets in rules for target in targets}


_RULES = _table(
    [
        (
            _elementwise,
            [
                *(ops.COPIES - {aten.type_as.default}),
                aten.alias.default,
                aten.contiguous.default,
                aten.detach.default,
                aten.complex.default,
                aten.polar.default,
                aten.real.default,
                aten.imag.default,
                CONJUGATE,
                aten.resolve_conj.default,
            ],
        ),
        (
            _like,
            [
                aten.empty_like.default,
                aten.zeros_like.default,
                aten.ones_like.default,
                aten.full_like.default,
            ],
        ),
        (linear, [aten.linear.default]),
        (_normed, [aten.layer_norm.default, aten.rms_norm.default]),
        (_reduced, ops.REDUCTIONS),
        (_expanded, [aten.expand.default, aten.broadcast_to.default]),
        (_repeated, [aten.repeat.default, aten.tile.default, aten.repeat_interleave.self_int]),
        (_stacked, [aten.stack.default]),
        (concatenated, [aten.cat.default, aten.concat.default]),
        (sliced, [operator.getitem, aten.slice.Tensor, aten.narrow.default, aten.select.int]),
        (written_over, [aten.slice_scatter.default, aten.select_scatter.default]),
        (padded, [aten.pad.default, aten.constant_pad_nd.default]),
        (attention, [aten.scaled_dot_product_attention.default]),
        (
            matmul,
            [
                aten.matmul.default,
                aten.bmm.default,
                aten.mm.default,
                aten.addmm.default,
                aten.baddbmm.default,
                INTEGER_MM,
            ],
        ),
        (einsum, [aten.einsum.default]),
        (pointwise_convolution, [aten.conv1d.default, aten.conv2d.default, aten.conv3d.default]),
        (_complex, [aten.view_as_complex.default, aten.view_as_real.default]),
        (_displaced, [aten.roll.default, aten.flip.default]),
        (_view, (*_REGROUPED, *_REORDERED)),
    ]
)
