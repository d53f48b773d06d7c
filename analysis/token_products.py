"""Tokens in products: linear layers, attention, and products of two activations."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.token_layout import Dimension, Layout, is_marked, laid, marks, other, size_of
from graphcache.analysis.token_operands import Followed, Known, Untokenised, meets_tokens, refuse
from graphcache.ir.graph import value_of

aten = ops.aten


def linear(node: fx.Node, known: Known) -> Followed:
    """A linear layer: everything before the channels is a token's own."""
    source, *weights = node.all_input_nodes
    layout = known.needed(node, source)
    refuse(node, is_marked(layout[-1]))
    return Followed((*layout[:-1], other(int(value_of(node).shape[-1]))), {source: layout}, tuple(weights))


def pointwise_convolution(node: fx.Node, known: Known) -> Followed:
    """A convolution whose kernel holds one place: a linear layer over the second dimension."""
    source, weight, *rest = node.all_input_nodes
    layout = known.needed(node, source)
    shape = [int(size) for size in value_of(node).shape]
    refuse(node, any(size != 1 for size in value_of(weight).shape[2:]) or is_marked(layout[1]))
    refuse(node, shape[2:] != list(value_of(source).shape[2:]))
    return Followed(laid(shape, marks(layout)), {source: layout}, (weight, *rest))


def attention(node: fx.Node, known: Known) -> Followed:
    """The chosen queries against all keys and values."""
    query, key, value, *rest = cast(Any, node.args)
    layout = known.needed(node, query)
    if any(is_marked(dim, "token") for dim in layout[:-2]):
        raise Untokenised(node, "attends within groups of tokens, each of which has keys of its own")
    refuse(node, is_marked(layout[-1]) or rest[2:3] == [True] or node.kwargs.get("is_causal") is True)
    shape = [int(size) for size in value_of(node).shape]
    found = laid(shape, marks(layout))
    mask = rest[0] if rest else node.kwargs.get("attn_mask")
    along, whole = {query: layout}, list(dict.fromkeys([key, value]))
    refuse(node, query in whole)
    if isinstance(mask, fx.Node):
        met = laid([*shape[:-1], int(value_of(mask).shape[-1])], marks(layout))
        _meet(node, mask, met, known, along, whole)
    return Followed(found, along, tuple(whole))


def _meet(
    node: fx.Node,
    item: fx.Node,
    met: Layout,
    known: Known,
    along: dict[fx.Node, Layout],
    whole: list[fx.Node],
) -> None:
    """Sort a further operand by whether the chosen tokens' part of it is needed, or all of it."""
    own = known.of(item)
    if own is not None and marks(own) != marks(met):
        raise Untokenised(node, "meets tokens along different dimensions")
    if own is not None or meets_tokens(value_of(item).shape, met):
        along[item] = own or met
    else:
        whole.append(item)


def matmul(node: fx.Node, known: Known) -> Followed:
    """A product: the tokens are the left operand's rows, the right one's columns, or a dimension of both.

    Of two that hold them, the left one's tokens are followed: they are queries, those on the right keys.
    """
    bias = node.args[:1] if node.target in (aten.addmm.default, aten.baddbmm.default) else ()
    left, right = (item for item in node.args[len(bias) :][:2] if isinstance(item, fx.Node))
    shape = [int(size) for size in value_of(node).shape]
    refuse(node, left is right or min(value_of(item).dim() for item in (left, right)) < 2)
    for item, beside, place in ((left, right, -2), (right, left, -1)):
        layout = known.layouts.get(item)
        if layout is None or is_marked(layout[-3 - place]):
            continue
        found = laid(shape, marks(layout))
        along, whole = {item: layout}, list[fx.Node]()
        if is_marked(layout[place], "token") and not any(is_marked(d, "token") for d in layout[:-2]):
            whole.append(beside)
        elif marks(layout).keys().isdisjoint((-1, -2)):
            sizes = [
                *(size_of(dim) for dim in found[:-2]),
                *(int(size) for size in value_of(beside).shape[-2:]),
            ]
            _meet(node, beside, laid(sizes, marks(layout)), known, along, whole)
        else:
            continue
        refuse(node, any(size_of(dim) != shape[at] for at, dim in marks(layout).items()))
        for further in bias:
            assert isinstance(further, fx.Node)
            _meet(node, further, found, known, along, whole)
        return Followed(found, along, tuple(whole))
    for item in (left, right):
        known.of(item)
    raise Untokenised(node, "mixes tokens or takes them apart")


def einsum(node: fx.Node, known: Known) -> Followed:
    """A sum over products, whose letters say which dimensions meet."""
    equation, items = str(node.args[0]).replace(" ", ""), ops.operands(node)
    if "->" not in equation or "." in equation:
        raise Untokenised(node, f"has the equation {equation!r}, which is not read")
    inputs, result = equation.split("->")
    terms = inputs.split(",")
    refuse(node, len(set(items)) != len(items) or any(len(set(term)) != len(term) for term in terms))
    held = _letters(terms, items, known)
    for place, _ in sorted(enumerate(held), key=lambda pair: _first_place(pair[1], result)):
        chosen = held[place]
        if not chosen or any(letter not in result for letter in chosen):
            continue
        return _by_letters(node, terms, items, result, chosen, known)
    for item in items:
        known.of(item)
    raise Untokenised(node, "mixes tokens or takes them apart")


def _letters(terms: Sequence[str], items: Sequence[fx.Node], known: Known) -> list[Mapping[str, Dimension]]:
    """Of each operand, the letters that run over rows or tokens."""
    result = list[Mapping[str, Dimension]]()
    for term, item in zip(terms, items, strict=True):
        layout = known.layouts.get(item, ())
        result.append({letter: dim for letter, dim in zip(term, layout, strict=False) if is_marked(dim)})
    return result


def _first_place(letters: Mapping[str, Dimension], result: str) -> int:
    """Where the result has the operand's tokens: queries come before keys."""
    places = [result.find(letter) for letter, dim in letters.items() if is_marked(dim, "token")]
    return min(places, default=len(result))


def _by_letters(
    node: fx.Node,
    terms: Sequence[str],
    items: Sequence[fx.Node],
    result: str,
    chosen: Mapping[str, Dimension],
    known: Known,
) -> Followed:
    tokens = {letter for letter, dim in chosen.items() if is_marked(dim, "token")}
    along, whole = dict[fx.Node, Layout](), list[fx.Node]()
    for term, item in zip(terms, items, strict=True):
        own = known.of(item)
        if tokens.isdisjoint(term):
            whole.append(item)
            continue
        refuse(node, not set(chosen) <= set(term))
        met = tuple(
            chosen.get(letter, other(int(size)))
            for letter, size in zip(term, value_of(item).shape, strict=True)
        )
        refuse(node, own is not None and own != met)
        along[item] = met
    layout = tuple(
        chosen.get(letter, other(int(size)))
        for letter, size in zip(result, value_of(node).shape, strict=True)
    )
    return Followed(layout, along, tuple(whole))
