"""Graphs told apart by what they compute, whatever their nodes are called."""

import hashlib
from operator import attrgetter
from typing import Any, cast

import torch
from torch import fx, nn

from graphcache.ir.graph import as_bytes, is_tensor, layout, value_of

VALUES = "values."
"""How the names begin of what a captured graph holds of answers to what forward asked."""


def structure(graph: fx.Graph, root: nn.Module, anyones: bool = False) -> str:
    """Tells graphs apart that compute different things, or with other weights. Names do not count.

    `root` holds the weights. Of `anyones` weights only what code is made for counts, and which of them are
    one.
    """
    digest = hashlib.sha256()
    numbers: dict[fx.Node, int] = {}
    met: dict[int, int] | None = {} if anyones else None
    for node in graph.nodes:
        numbers[node] = len(numbers)
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda other: cast(Any, Place(numbers[other])))
        digest.update(repr((node.op, _target(root, node, met), arguments, _fed(node))).encode())
    return digest.hexdigest()


def _target(root: nn.Module, node: fx.Node, met: dict[int, int] | None) -> Any:
    """An operation by its name; what the model holds by itself or by its place among what was `met`, and by
    what code is made for; answers by their values.
    """
    name = str(node.target)
    if node.op != "get_attr":
        return name
    value = attrgetter(name)(root)
    if name.startswith(VALUES):
        return layout(value), as_bytes(value)
    if not isinstance(value, torch.Tensor):
        return id(value), None
    kind = layout(value), value.requires_grad, value.is_inference()
    return id(value) if met is None else met.setdefault(id(value), len(met)), type(value).__name__, kind


class Place:
    """Stands for a node among another one's arguments."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def _fed(node: fx.Node) -> Any:
    return layout(value_of(node)) if node.op == "placeholder" and is_tensor(node) else None
