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
from graphcache.ir.graph import StepGraph, is_tensor, value_of


class Compilations:
    """At most so many graphs; the least recently used is dropped. With other weights one is another."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: OrderedDict[Hashable, Compiled] = OrderedDict()

    def under(self, ambient: Hashable) -> Kept:
        """Those compiled under the same modes, such as autocast, on which code depends beside its graph."""
        return _Under(self, ambient)

    def find(self, key: Hashable) -> Compiled | None:
        if key in self._made:
            self._made.move_to_end(key)
        return self._made.get(key)

    def keep(self, key: Hashable, code: Compiled) -> None:
        self._made[key] = code
        while len(self._made) > self._most:
            self._made.popitem(last=False)

    def clear(self) -> None:
        """Forget all, and with them the weights that they hold."""
        self._made.clear()


@dataclass(frozen=True)
class _Under(Kept):
    compilations: Compilations
    ambient: Hashable

    def find(self, step: StepGraph) -> Compiled | None:
        return self.compilations.find((self.ambient, structure(step)))

    def keep(self, step: StepGraph, code: Compiled) -> None:
        self.compilations.keep((self.ambient, structure(step)), code)


def structure(step: StepGraph) -> str:
    """Tells graphs apart that compute different things, or with other weights. Names do not count."""
    digest = hashlib.sha256()
    numbers: dict[fx.Node, int] = {}
    for node in step.graph.nodes:
        numbers[node] = len(numbers)
        held = id(attrgetter(str(node.target))(step.root)) if node.op == "get_attr" else node.target
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda other: cast(Any, _Place(numbers[other])))
        digest.update(repr((node.op, str(held), arguments, _laid(node))).encode())
    return digest.hexdigest()


class _Place:
    """Stands for a node among another one's arguments."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def _laid(node: fx.Node) -> Any:
    if node.op != "placeholder" or not is_tensor(node):
        return None
    value: torch.Tensor = value_of(node)
    return value.shape, value.stride(), value.dtype, value.device
