"""Rules of ATen operations: to have some tokens of a result, which tokens of the operands are needed.

An operation without a rule, or one that mixes tokens, is refused.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.rows import taken_rows
from graphcache.ir.graph import value_of

aten = ops.aten


@dataclass(frozen=True, slots=True)
class Axis:
    """A dimension that indexes tokens, of which the site's are start, start + 1, …, start + count - 1.

    `rows` > 1: the samples are merged into the dimension, each sample's `count` tokens in a row.
    """

    dim: int
    start: int
    count: int
    rows: int = 1

    @staticmethod
    def over(value: fx.Node, tokens: int) -> "Axis":
        """The axis of a value that has the stream's rows and tokens outermost, merged or not."""
        shape = value_of(value).shape
        if len(shape) > 2 and shape[1] == tokens:
            return Axis(1, 0, tokens)
        if len(shape) > 1 and shape[0] % tokens == 0:
            return Axis(0, 0, tokens, int(shape[0]) // tokens)
        raise Untokenised(value, f"is {tuple(shape)}: not {tokens} tokens of each sample")

    @property
    def size(self) -> int:
        return self.rows * self.count


class Untokenised(Exception):
    """A node has no tokens to be chosen from; `node` says which."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node = node


@dataclass
class Demands:
    """Operands that are needed for the chosen tokens only, with their axis, and those needed whole."""

    along: list[tuple[fx.Node, Axis]] = field(default_factory=list)
    whole: list[fx.Node] = field(default_factory=list)


def demands(node: fx.Node, axis: Axis) -> Demands:
    """What the chosen tokens of a node's result are computed from.

    Raises:
        Untokenised: the operation mixes tokens, or has no rule.
    """
    rule = _RULES.get(node.target)
    if rule is None:
        raise Untokenised(node, "has no rule that says where its tokens come from")
    return rule(node, axis)


def is_passed_on(node: fx.Node, axis: Axis) -> fx.Node | None:
    """The operand whose chosen tokens a result has as they are: of a slice of tokens, of joined streams."""
    dim: Any = None
    if node.target in (operator.getitem, aten.slice.Tensor):
        taken = taken_rows(node)
        dim = taken[1] if taken else None
    elif node.target is aten.cat.default:
        dim = ops.integer(node, 1, default=0) % value_of(node).dim()
    elif node.target is aten.slice_scatter.default:
        dim = ops.integer(node, 2, default=0) % value_of(node).dim()
    return demands(node, axis).along[0][0] if dim == axis.dim else None


def _elementwise(node: fx.Node, axis: Axis) -> Demands:
    wanted = Demands()
    rank = value_of(node).dim()
    size = value_of(node).shape[axis.dim]
    for item in node.all_input_nodes:
        dim = axis.dim - (rank - value_of(item).dim())
        if dim < 0 or value_of(item).shape[dim] != size:
            wanted.whole.append(item)
        else:
            wanted.along.append((item, _at(axis, dim)))
    return wanted


def _last_dim_product(node: fx.Node, axis: Axis) -> Demands:
    """A linear layer, or a norm over the last dimensions: everything before them is a token's own."""
    source, shape, *_ = cast(Any, node.args)
    mixed = 1 if node.target is aten.linear.default else len(shape)
    _refuse(node, axis.dim >= value_of(node).dim() - mixed)
    return Demands([(source, axis)], [item for item in node.all_input_nodes if item is not source])


def _reduction(node: fx.Node, axis: Axis) -> Demands:
    """A mean or softmax over given dimensions."""
    source: Any = node.args[0]
    rank = value_of(source).dim()
    given: Any = node.args[1] if len(node.args) > 1 and node.args[1] is not None else list(range(rank))
    reduced = sorted(d % rank for d in ([given] if isinstance(given, int) else given))
    dim = axis.dim
    if value_of(node).dim() < rank:
        for gone in reduced:
            dim += gone <= dim
    _refuse(node, dim in reduced)
    return Demands([(source, _at(axis, dim))])


def _regrouped(node: fx.Node, axis: Axis) -> Demands:
    """A view: the dimension must be found again, alone or merged with the samples."""
    source: Any = node.args[0]
    given, shape = tuple(value_of(source).shape), tuple(value_of(node).shape)
    before = math.prod(shape[: axis.dim])
    for dim, size in enumerate(given):
        if size == shape[axis.dim] and math.prod(given[:dim]) == before:
            return Demands([(source, _at(axis, dim))])
    if axis.rows > 1 and before == 1:
        for dim in range(1, len(given)):
            if math.prod(given[:dim]) == axis.rows and given[dim] == axis.count:
                return Demands([(source, Axis(dim, 0, axis.count))])
    if (
        axis.rows == 1
        and axis.start == 0
        and shape[axis.dim] == axis.count
        and before * axis.count == given[0]
    ):
        return Demands([(source, Axis(0, 0, axis.count, before))])
    raise Untokenised(node, f"makes {shape} of {given}, which splits or merges the tokens")


def _moved(node: fx.Node, axis: Axis) -> Demands:
    """Dimensions in another order, one more or one less."""
    source: Any = node.args[0]
    rank = value_of(source).dim()
    places = list(range(rank))
    arguments: list[Any] = list(node.args[1:])
    if node.target is aten.permute.default:
        places = [d % rank for d in arguments[0]]
    elif node.target is aten.unsqueeze.default:
        places.insert(arguments[0] % (rank + 1), -1)
    elif node.target is aten.squeeze.dim:
        if value_of(node).dim() < rank:
            del places[arguments[0] % rank]
    elif node.target is aten.select.int:
        del places[arguments[0] % rank]
    elif rank > 1:
        first, second = (d % rank for d in arguments) if arguments else (0, 1)
        places[first], places[second] = places[second], places[first]
    _refuse(node, places[axis.dim] < 0)
    return Demands([(source, _at(axis, places[axis.dim]))])


def _piece(node: fx.Node, axis: Axis) -> Demands:
    """A slice, or one piece of a split."""
    taken = taken_rows(node)
    if taken is None:
        split: Any = node.args[0]
        if node.target is operator.getitem and split.target is aten.unbind.int:
            source: Any = split.args[0]
            rank = value_of(source).dim()
            gone = (split.args[1] if len(split.args) > 1 else 0) % rank
            return Demands([(source, _at(axis, axis.dim + (gone <= axis.dim)))])
        raise Untokenised(node, "takes its part in a way that is not known")
    source, dim, start, stop = taken
    if dim != axis.dim:
        return Demands([(source, axis)])
    _refuse(node, axis.rows > 1 or value_of(node).shape[dim] != stop - start)
    return Demands([(source, Axis(dim, axis.start + start, axis.count))])


def _joined(node: fx.Node, axis: Axis) -> Demands:
    """A concatenation: of streams along the tokens, or of channels."""
    pieces: Any = node.args[0]
    rank = value_of(node).dim()
    dim = ops.integer(node, 1, default=0) % rank
    if node.target is aten.stack.default:
        _refuse(node, dim == axis.dim)
        return Demands([(piece, _at(axis, axis.dim - (dim < axis.dim))) for piece in pieces])
    if dim != axis.dim:
        return Demands([(piece, axis) for piece in pieces])
    _refuse(node, axis.rows > 1)
    offset = 0
    for piece in pieces:
        size = int(value_of(piece).shape[dim])
        if offset <= axis.start and axis.start + axis.count <= offset + size:
            return Demands([(piece, Axis(dim, axis.start - offset, axis.count))])
        offset += size
    raise Untokenised(node, "joins the site's tokens out of several pieces")


def _scattered(node: fx.Node, axis: Axis) -> Demands:
    """A piece written over a value's slice."""
    arguments: list[Any] = [*node.args, *(0, None, None)[len(node.args) - 2 :]]
    base, piece, dim, start, stop = arguments[:5]
    dim %= value_of(node).dim()
    if dim != axis.dim:
        return Demands([(base, axis), (piece, axis)])
    size = int(value_of(node).shape[dim])
    first, last = (min(b + size if b < 0 else b, size) for b in (start or 0, size if stop is None else stop))
    if first <= axis.start and axis.start + axis.count <= last:
        return Demands([(piece, Axis(dim, axis.start - first, axis.count))])
    _refuse(node, axis.start < last and first < axis.start + axis.count)
    return Demands([(base, axis)])


def _attention(node: fx.Node, axis: Axis) -> Demands:
    """The chosen queries against all keys and values."""
    query, key, value, *rest = cast(Any, node.args)
    _refuse(node, axis.dim != value_of(node).dim() - 2)
    wanted = Demands([(query, axis)], [key, value])
    mask = rest[0] if rest else node.kwargs.get("attn_mask")
    _refuse(node, rest[2:3] == [True] or node.kwargs.get("is_causal") is True)
    if isinstance(mask, fx.Node):
        if value_of(mask).shape[-2] == 1:
            wanted.whole.append(mask)
        else:
            wanted.along.append((mask, _at(axis, value_of(mask).dim() - 2)))
    return wanted


def _product(node: fx.Node, axis: Axis) -> Demands:
    """A matrix product: the tokens are the left one's rows or the right one's columns."""
    left, right = (item for item in node.args[:2] if isinstance(item, fx.Node))
    rank = value_of(node).dim()
    if axis.dim == rank - 2:
        return Demands([(left, _at(axis, value_of(left).dim() - 2))], [right])
    _refuse(node, axis.dim != rank - 1)
    return Demands([(right, _at(axis, value_of(right).dim() - 1))], [left])


def _einsum(node: fx.Node, axis: Axis) -> Demands:
    equation, items = str(node.args[0]).replace(" ", ""), ops.operands(node)
    if "->" not in equation or "." in equation:
        raise Untokenised(node, f"has the equation {equation!r}, which is not read")
    terms, result = equation.split("->")
    letter = result[axis.dim]
    wanted = Demands()
    for term, item in zip(terms.split(","), items, strict=True):
        if letter in term:
            wanted.along.append((item, _at(axis, term.index(letter))))
        else:
            wanted.whole.append(item)
    return wanted


def _padded(node: fx.Node, axis: Axis) -> Demands:
    source: Any = node.args[0]
    padding: Any = node.args[1]
    _refuse(node, axis.dim >= value_of(node).dim() - len(padding) // 2)
    return Demands([(source, axis)])


def _complex(node: fx.Node, axis: Axis) -> Demands:
    _refuse(node, axis.dim >= min(value_of(item).dim() for item in (node, node.all_input_nodes[0])))
    return Demands([(node.all_input_nodes[0], axis)])


def _at(axis: Axis, dim: int) -> Axis:
    return Axis(dim, axis.start, axis.count, axis.rows)


def _refuse(node: fx.Node, mixes: bool) -> None:
    if mixes:
        raise Untokenised(node, "mixes tokens or takes them apart")


Rule = Callable[[fx.Node, Axis], Demands]


def _table(rules: Sequence[tuple[Rule, Sequence[object]]]) -> dict[object, Rule]:
    return {target: rule for rule, targets in rules for target in targets}


_RULES = _table(
    [
        (
            _elementwise,
            [
                aten.add.Tensor,
                aten.sub.Tensor,
                aten.mul.Tensor,
                aten.div.Tensor,
                aten.pow.Tensor_Scalar,
                aten.addcmul.default,
                aten.neg.default,
                aten.gelu.default,
                aten.silu.default,
                aten.relu.default,
                aten.sigmoid.default,
                aten.tanh.default,
                aten.exp.default,
                aten.sqrt.default,
                aten.rsqrt.default,
                aten.reciprocal.default,
                aten.abs.default,
                aten.clamp.default,
                aten.clamp_min.default,
                aten.where.self,
                aten.alias.default,
                aten.detach.default,
                aten.contiguous.default,
                aten.expand.default,
                aten.empty_like.default,
                aten.zeros_like.default,
                *ops.COPIES,
            ],
        ),
        (_last_dim_product, [aten.linear.default, aten.layer_norm.default, aten.rms_norm.default]),
        (
            _reduction,
            [
                aten.mean.dim,
                aten.sum.dim_IntList,
                aten.amax.default,
                aten.var.correction,
                aten.softmax.int,
                aten._softmax.default,
            ],
        ),
        (
            _regrouped,
            [
                aten.view.default,
                aten.reshape.default,
                aten._unsafe_view.default,
                aten.flatten.using_ints,
                aten.unflatten.int,
            ],
        ),
        (
            _moved,
            [
                aten.permute.default,
                aten.transpose.int,
                aten.swapaxes.default,
                aten.t.default,
                aten.unsqueeze.default,
                aten.squeeze.dim,
                aten.select.int,
            ],
        ),
        (_piece, [operator.getitem, aten.slice.Tensor]),
        (_joined, [aten.cat.default, aten.stack.default]),
        (_scattered, [aten.slice_scatter.default]),
        (_attention, [aten.scaled_dot_product_attention.default]),
        (_product, [aten.matmul.default, aten.bmm.default]),
        (_einsum, [aten.einsum.default]),
        (_padded, [aten.pad.default, aten.constant_pad_nd.default]),
        (_complex, [aten.view_as_complex.default, aten.view_as_real.default]),
    ]
)
