"""What can be written to, each beside a copy of what it held, to be put back."""

import functools
import gc
import types
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any, Protocol

from torch import nn

from graphcache.libraries.torch_private import FakeTensor

ABSENT = object()
"""Stands for a name that nothing is bound to."""

_DEEPEST = 6
"""How far what a memo holds is searched."""


class Keeper(Protocol):
    """One thing that may be written to, and what it held."""

    def put_back(self) -> bool:
        """Undo what was written since, and say whether that was anything."""


@dataclass(slots=True)
class Entries:
    """A dict, or the attributes of an object."""

    live: dict[Any, Any]
    before: dict[Any, Any]

    @staticmethod
    def of(live: dict[Any, Any]) -> "Entries":
        base: Any = OrderedDict if isinstance(live, OrderedDict) else dict
        if base is dict:
            return Entries(live, dict.copy(live))
        # an ordered dict's order is not that of the dict below it
        return Entries(live, {key: base.__getitem__(live, key) for key in base.__iter__(live)})

    def put_back(self) -> bool:
        live, before = self.live, self.before
        base: Any = OrderedDict if isinstance(live, OrderedDict) else dict
        if _same(base.keys(live), before.keys()) and _same(base.values(live), before.values()):
            return False
        for key in [key for key in base.keys(live) if key not in before]:
            base.__delitem__(live, key)
        if not _same(base.keys(live), before.keys()):
            base.clear(live)
        for key, value in before.items():
            base.__setitem__(live, key, value)
        return True


@dataclass(slots=True)
class Items:
    """A list, a deque or a set."""

    live: Any
    before: list[Any]

    @staticmethod
    def of(live: Any) -> "Items":
        return Items(live, [*live])

    def put_back(self) -> bool:
        live: Any = self.live
        if _same(live, self.before):
            return False
        live.clear()
        (live.update if isinstance(live, set) else live.extend)(self.before)
        return True


@dataclass(slots=True)
class EnclosedVariable:
    """A variable of an enclosing function."""

    live: types.CellType
    before: Any

    @staticmethod
    def of(live: types.CellType) -> "EnclosedVariable":
        return EnclosedVariable(live, _content(live))

    def put_back(self) -> bool:
        if _content(self.live) is self.before:
            return False
        if self.before is ABSENT:
            del self.live.cell_contents
        else:
            self.live.cell_contents = self.before
        return True


@dataclass(slots=True)
class Globals:
    """Some of a Python module's globals."""

    live: dict[str, Any]
    before: dict[str, Any]

    @staticmethod
    def of(live: dict[str, Any], names: Iterable[str]) -> "Globals":
        return Globals(live, {name: live.get(name, ABSENT) for name in names})

    def put_back(self) -> bool:
        other = [(n, value) for n, value in self.before.items() if self.live.get(n, ABSENT) is not value]
        for name, value in other:
            if value is ABSENT:
                del self.live[name]
            else:
                self.live[name] = value
        return bool(other)


@dataclass(slots=True)
class Slots:
    """The attributes of an object that its classes keep in slots."""

    live: Any
    before: list[tuple[Any, Any]]

    @staticmethod
    def of(live: Any, members: Iterable[Any]) -> "Slots":
        return Slots(live, [(member, _slot(member, live)) for member in members])

    def put_back(self) -> bool:
        other = [(member, value) for member, value in self.before if _slot(member, self.live) is not value]
        for member, value in other:
            if value is ABSENT:
                member.__delete__(self.live)
            else:
                member.__set__(self.live, value)
        return bool(other)


@dataclass(slots=True)
class ClassAttributes:
    """The attributes of a class itself."""

    live: type
    before: Mapping[str, Any]

    @staticmethod
    def of(live: type) -> "ClassAttributes":
        return ClassAttributes(live, dict(vars(live)))

    def put_back(self) -> bool:
        now, before = dict(vars(self.live)), self.before
        added = now.keys() - before.keys()
        other = [(name, value) for name, value in before.items() if now.get(name, ABSENT) is not value]
        for name in added:
            type.__delattr__(self.live, name)
        for name, value in other:
            type.__setattr__(self.live, name, value)
        return bool(added or other)


@dataclass(slots=True)
class Memo:
    """A `functools.lru_cache`: single results cannot be taken out, so all go if one is of the tracing."""

    live: Any

    def put_back(self) -> bool:
        holds_fakes = self._holds_fakes()
        if holds_fakes:
            self.live.cache_clear()
        return holds_fakes

    def _holds_fakes(self) -> bool:
        todo = [(item, 1) for item in gc.get_referents(self.live) if isinstance(item, dict)]
        met: set[int] = set()
        while todo:
            item, depth = todo.pop()
            if isinstance(item, FakeTensor):
                return True
            if id(item) not in met and depth < _DEEPEST and not isinstance(item, _NO_RESULTS):
                met.add(id(item))
                todo += [(part, depth + 1) for part in gc.get_referents(item)]
        return False


MEMO = type(functools.lru_cache(lambda: None))
_NO_RESULTS = (nn.Module, type, types.ModuleType, types.FunctionType, MEMO, str, int)


def keeper_of(container: Any) -> Entries | Items | None:
    """For a container of Python's own that can be written to."""
    if isinstance(container, dict):
        return Entries.of(container)
    return Items.of(container) if isinstance(container, (list, deque, set)) else None


def _same(ones: Collection[Any], others: Collection[Any]) -> bool:
    return len(ones) == len(others) and all(map(is_, ones, others))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def _slot(member: Any, thing: Any) -> Any:
    try:
        return member.__get__(thing, type(thing))
    except AttributeError:
        return ABSENT
