"""Graphs told apart by what they compute, whatever their nodes are called."""

import hashlib
from operator import attrgetter
from typing import Any, cast

import torch
from torch import fx

from graphcache.ir.graph import StepGraph, as_bytes, is_tensor, layout, value_of

VALUES = "values."
"""How the names begin of what a captured graph holds of answers to what forward asked."""


def structure(step: StepGraph) -> str:
    """Tells graphs apart that compute different things, or with other weights. Names do not count."""
    digest = hashlib.sha256()
    numbers: dict[fx.Node, int] = {}
    for node in step.graph.nodes:
        numbers[node] = len(numbers)
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda other: cast(Any, _Place(numbers[other])))
        digest.update(repr((node.op, _target(step, node), arguments, _fed(node))).encode())
    return digest.hexdigest()


def _target(step: StepGraph, node: fx.Node) -> Any:
    """An operation by its name; what the model holds by itself, and by what code is made for; answers by
    their values.
    """
    name = str(node.target)
    if node.op != "get_attr":
        return name
    value = attrgetter(name)(step.root)
    if name.startswith(VALUES):
        return layout(value), as_bytes(value)
    return id(value), (layout(value), value.requires_grad) if isinstance(value, torch.Tensor) else None


class _Place:
    """Stands for a node among another one's arguments."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def _fed(node: fx.Node) -> Any:
    return layout(value_of(node)) if node.op == "placeholder" and is_tensor(node) else None
