"""Compiled graphs, kept by their structure: one that is captured again is not compiled again.

Code that is given its weights serves all models of a process; other code the one whose weights it holds.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from graphcache.compiler.any_size import Family
from graphcache.compiler.backends import Backend, Compiled, arguments
from graphcache.compiler.code import Kept
from graphcache.ir.opaque import Opaque


class _Key(NamedTuple):
    modes: Hashable
    backend: Hashable
    structure: str
    takes_weights: bool


class Compilations:
    """At most so many graphs; the least recently used is dropped."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: OrderedDict[_Key, tuple[Compiled, tuple[Opaque, ...]]] = OrderedDict()
        self._families: OrderedDict[Hashable, Family] = OrderedDict()

    def under(self, signature: Hashable, modes: Hashable) -> Kept:
        """Those compiled under the same modes, such as autocast, on which code depends.

        `signature` tells the calls apart that graphs were made for.
        """
        return _Under(self, signature, modes)

    def family(self, key: Hashable) -> Family:
        """Code of graphs of one form, whatever the signature."""
        found = self._families.get(key) or EVERYONES_FAMILIES.get(key) or Family()
        EVERYONES_FAMILIES[key] = self._families[key] = found
        self._families.move_to_end(key)
        while len(self._families) > self._most:
            self._families.popitem(last=False)
        return found

    def find(self, key: _Key) -> Compiled | None:
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key][0]
        return None

    def keep(self, key: _Key, code: Compiled, opaque: tuple[Opaque, ...]) -> None:
        """Note code and own the opaque calls in it, so that a capture that has the same finds them."""
        self._made[key] = code, opaque
        while len(self._made) > self._most:
            self._made.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        self._made.clear()
        self._families.clear()

    def forget_weights(self) -> None:
        """Forget code that holds weights."""
        for key in [key for key in self._made if not key.takes_weights]:
            del self._made[key]


EVERYONES: WeakValueDictionary[_Key, Any] = WeakValueDictionary()
"""Code that is given its weights, as long as some model keeps it."""

EVERYONES_FAMILIES: WeakValueDictionary[Hashable, Family] = WeakValueDictionary()
"""Code that is given its weights and sizes, as long as some model keeps it."""


@dataclass(frozen=True)
class _Under:
    compilations: Compilations
    signature: Hashable
    modes: Hashable

    def find(self, structure: str, backend: Backend, takes_weights: bool) -> Compiled | None:
        key = self._key(structure, backend, takes_weights)
        own = self.compilations.find(key)
        if own is not None:
            return own
        anyones: Compiled | None = EVERYONES.get(key)
        if anyones is not None:
            self.compilations.keep(key, anyones, ())
        return anyones

    def keep(
        self,
        structure: str,
        backend: Backend,
        takes_weights: bool,
        code: Compiled,
        opaque: tuple[Opaque, ...] = (),
    ) -> None:
        key = self._key(structure, backend, takes_weights)
        self.compilations.keep(key, code, opaque)
        if takes_weights:
            EVERYONES[key] = code

    def family(self, form: str, backend: Backend) -> Family:
        return self.compilations.family((self.modes, _frozen(arguments(backend)), form))

    def _key(self, structure: str, backend: Backend, takes_weights: bool) -> _Key:
        return _Key(self.modes, _frozen(arguments(backend)), structure, takes_weights)


def _frozen(value: Any) -> Hashable:
    """Options of a backend as what can be compared and looked up."""
    if isinstance(value, Mapping):
        return frozenset((name, _frozen(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return value if isinstance(value, Hashable) else object()
