"""Residual adds outside of a model's repeated blocks: pre- and post-convolutions, embedders, refiners."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from graphcache.analysis import ops
from graphcache.ir.graph import is_tensor, value_of

Work = tuple[tuple[object, ...], ...]
"""The products of a branch, each with the shapes of what it multiplies, but for the tokens."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a branch stands: the module of its residual add (empty for the model itself), role and work."""

    path: str
    role: str
    work: Work


def work_of(nodes: Sequence[fx.Node]) -> Work:
    """The products among a branch's nodes, the same for branches that are alike."""
    products = [node for node in nodes if ops.is_product(node)]
    return tuple(sorted(((str(n.target), *map(_weight, n.all_input_nodes)) for n in products), key=str))


def _weight(node: fx.Node) -> tuple[int, ...]:
    return tuple(value_of(node).shape) if node.op == "get_attr" and is_tensor(node) else ()


@dataclass(frozen=True)
class Blocks:
    """What of a model's branches, in execution order, stands in its blocks.

    Blocks begin with the first branch that holds attention and end with the last, with what stands in the
    same module as one in between or is alike. A lone branch before or behind is a stem if it is made of
    convolutions or of one product, or if the blocks have MLPs of their own. Without attention all are blocks.
    """

    places: Sequence[Standing]

    def hold(self, index: int) -> bool:
        """Whether a branch stands in a block."""
        place = self.places[index]
        if not self._anchors or place in self._inside:
            return True
        if place.path and not self._is_inlined(place.path):
            if self._is_near(place.path):
                return True
        elif any(place.work == other.work for other in self._inside if other.role == "mlp"):
            return True
        return not _is_plain(place.work) and not self._have_own

    @cached_property
    def _anchors(self) -> list[int]:
        return [i for i, place in enumerate(self.places) if place.role != "mlp"]

    @cached_property
    def _inside(self) -> list[Standing]:
        return list(self.places[self._anchors[0] : self._anchors[-1] + 1])

    @cached_property
    def _have_own(self) -> bool:
        """Whether a branch that is surely a block's is an MLP."""
        paths = {place.path for place in self._inside if place.path and not self._is_inlined(place.path)}
        return any(p.role == "mlp" and (p in self._inside or p.path in paths) for p in self.places)

    def _is_inlined(self, path: str) -> bool:
        """Whether a module adds the branches of several blocks itself."""
        held = [place.role for place in self._inside if place.path == path]
        return len(set(held)) < len(held)

    def _is_near(self, path: str) -> bool:
        """Whether a module is a block, a part of one, or a further one of the same list."""
        paths = {place.path for place in self._inside}
        patterns = {_pattern(other) for other in paths if _pattern(other) != other}
        parents = {_parent(other) for other in paths if re.search(r"\d", _parent(other))}
        return path in paths or _pattern(path) in patterns or _parent(path) in parents


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _is_plain(work: Work) -> bool:
    return len(work) == 1 or all("conv" in str(target) for target, *_ in work)
