"""Compiled graphs, kept by their structure: one that is captured again is not compiled again."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from graphcache.compiler.compile import Compiled, Kept
from graphcache.ir.graph import StepGraph
from graphcache.ir.opaque import Opaque
from graphcache.ir.structure import structure


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
