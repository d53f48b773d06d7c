"""The sizes in a graph: all that differs between graphs of one model for inputs of other sizes."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import fx, nn

from graphcache.ir.structure import Place
from graphcache.libraries.torch_private import FakeTensor, OpOverload, schema_of

_SYMBOLIC = ("SymIntType", "NumberType", "TensorType")
"""Kinds of arguments of operations whose numbers may be symbols; dimensions, as of `transpose`, are none."""

Change = Callable[[int], Any]


class Skeleton(NamedTuple):
    """A graph without its sizes, and these in the order in which they stand in it.

    0, 1 and negative numbers are no sizes: to PyTorch they mean something of their own.
    """

    form: str
    sizes: tuple[int, ...]


def skeleton(graph: fx.Graph, fed: Sequence[torch.Tensor]) -> Skeleton:
    """Tell graphs apart that compute different things, or with weights of other sizes.

    `fed`: for each of the graph's inputs a tensor of the same layout. Those that are parameters keep their
    sizes: they are the model's.
    """
    digest, sizes = hashlib.sha256(), list[int]()

    def note(size: int) -> str:
        sizes.append(size)
        return "#"

    numbers = {node: number for number, node in enumerate(graph.nodes)}
    tensors = iter(fed)
    for node in graph.nodes:
        if node.op == "placeholder":
            text: Any = _kind(next(tensors), note)
        else:
            arguments: Any = with_sizes(node, note)
            text = fx.map_arg(arguments, lambda other: cast(Any, Place(numbers[other])))
        digest.update(repr((node.op, str(node.target), text)).encode())
    return Skeleton(digest.hexdigest(), tuple(sizes))


def _kind(tensor: torch.Tensor, note: Change) -> Any:
    kind = torch.Tensor if isinstance(tensor, FakeTensor) else type(tensor)
    return (
        tensor.dtype,
        tensor.device,
        kind.__name__,
        tensor.is_inference(),
        *layout_with(tensor, note),
    )


def layout_with(tensor: torch.Tensor, change: Change) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A tensor's shape and strides, with what `change` makes of each size; a parameter's as they are."""
    shape, strides = tuple(tensor.shape), tensor.stride()
    if isinstance(tensor, nn.Parameter):
        return shape, strides
    return _changed(shape, change), _changed(strides, change)


def with_sizes(node: fx.Node, change: Change) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """An operation's arguments, with what `change` makes of each size among them."""
    if not isinstance(node.target, OpOverload):
        return node.args, node.kwargs
    symbolic = _symbolic_arguments(node.target)
    args = [
        _changed(value, change) if takes else value
        for value, takes in zip(node.args, symbolic.values(), strict=False)
    ]
    kwargs = {
        name: _changed(value, change) if symbolic[name] else value for name, value in node.kwargs.items()
    }
    return tuple(args), kwargs


@cache
def _symbolic_arguments(target: Any) -> dict[str, bool]:
    """Which of an operation's arguments may be symbols, by name, in order."""
    return {
        argument.name: _element(argument.real_type) in _SYMBOLIC for argument in schema_of(target).arguments
    }


def _element(kind: Any) -> str:
    while kind.kind() in ("ListType", "OptionalType"):
        kind = kind.getElementType()
    name: str = kind.kind()
    return name


def _changed(value: Any, change: Change) -> Any:
    if type(value) is int:
        return change(value) if value > 1 else value
    if isinstance(value, list | tuple):
        return tuple([_changed(item, change) for item in value])
    return value
