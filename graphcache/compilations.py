"""Compiled graphs, kept by their structure: one that is captured again is not compiled again."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import fx

from graphcache.compile import Compiled, Kept
from graphcache.ir.graph import StepGraph, as_bytes, is_tensor, layout, value_of
from graphcache.ir.opaque import Opaque

VALUES = "values."
"""How the names begin of what a captured graph holds of answers to what forward asked."""


class Compilations:
    """At most so many graphs; the least recently used is dropped. With other weights one is another."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: OrderedDict[Hashable, tuple[Compiled, tuple[Opaque, ...]]] = OrderedDict()

    def under(self, circumstances: Hashable) -> Kept:
        """Those compiled for the same signature and modes, such as autocast: code depends on them."""
        return _Under(self, circumstances)

    def find(self, key: Hashable) -> Compiled | None:
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key][0]
        return None

    def keep(self, key: Hashable, code: Compiled, opaque: tuple[Opaque, ...]) -> None:
        """Note code and own the opaque calls in it, so that a capture that has the same finds them."""
        self._made[key] = code, opaque
        while len(self._made) > self._most:
            self._made.popitem(last=False)

    def clear(self) -> None:
        """Forget all, and with them the weights that they hold."""
        self._made.clear()


@dataclass(frozen=True)
class _Under(Kept):
    compilations: Compilations
    circumstances: Hashable

    def find(self, step: StepGraph) -> Compiled | None:
        return self.compilations.find((self.circumstances, structure(step)))

    def keep(self, step: StepGraph, code: Compiled) -> None:
        self.compilations.keep((self.circumstances, structure(step)), code, step.opaque)


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
