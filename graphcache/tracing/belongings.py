"""Everything that a model's forward may write to besides the tensors' values, and putting it back."""

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from graphcache.ir.attributes import attributes_of
from graphcache.libraries.torch_private import MODULE_TABLES, FakeTensor
from graphcache.tracing.code_digest import names_in
from graphcache.tracing.keepers import (
    MEMO,
    ClassAttributes,
    EnclosedVariable,
    Entries,
    Globals,
    Keeper,
    Memo,
    Slots,
    keeper_of,
)

_HOLDING = frozenset(("collections", "functools", "types", "weakref", "_thread"))
"""Modules of Python's own library whose objects hold others."""
NOT_FOLLOWED = sys.stdlib_module_names | {"torch", "numpy", "graphcache", "_pytest"}
"""Of pytest, which rewrites asserts, every function with one in a test module names the whole session."""
_HOOKS = vars(nn.Module()).keys() - set(MODULE_TABLES)
"""A module's attributes that forward does not write into."""
MAKING = frozenset(("__init__", "__new__", "__init_subclass__", "__class_getitem__", "__repr__", "__str__"))


WRAPPERS = (property, staticmethod, classmethod, functools.cached_property)


class Path(NamedTuple):
    """How something is reached: from what, and under which name."""

    outer: "Path | None"
    name: Any

    def __str__(self) -> str:
        names: list[str] = []
        path: Path | None = self
        while path is not None:
            names.append(f".{path.name}" if isinstance(path.name, str) else f"[{path.name!r}]")
            path = path.outer
        return "".join(reversed(names)).lstrip(".")


class Belongings:
    """What can be reached from a model: its objects, their classes, and what their forwards' code names.

    Of functions only those are followed that forward may call by name; of classes and functions none of
    Python's, PyTorch's or NumPy's own. `fakes` says where fake tensors are found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.keepers: list[Keeper] = []
        self.fakes: list[Path] = []
        self._met: dict[int, Any] = {}
        self._handlers: dict[type, Callable[[Any, Path], Any] | None] = {}
        self._slots: dict[type, list[Any]] = {}
        self._named = {"forward"}
        self._methods: dict[str, list[tuple[Any, Path]]] = {}
        self._todo: list[tuple[Any, Path]] = [(model, Path(None, "model"))]
        while self._todo:
            self._visit(*self._todo.pop())

    def put_back(self) -> bool:
        """Undo whatever was written to any of it since, and say whether that was anything."""
        written = [keeper for keeper in self.keepers if keeper.put_back()]
        return bool(written)

    def _visit(self, thing: Any, path: Path) -> None:
        kind = type(thing)
        if kind not in self._handlers:
            self._handlers[kind] = self._handler(kind)
        handler = self._handlers[kind]
        if handler is not None and id(thing) not in self._met:
            self._met[id(thing)] = thing
            handler(thing, path)

    def _handler(self, kind: type) -> Callable[[Any, Path], Any] | None:
        """What to do with things of this kind; None if nothing."""
        for known, handler in (
            (FakeTensor, lambda _, path: self.fakes.append(path)),
            ((torch.Tensor, str, int, float, types.ModuleType), None),
            ((dict, list, set, tuple, frozenset, deque), self._container),
            (types.FunctionType, self._function),
            (MEMO, self._memo),
            (type, self._class),
            ((*WRAPPERS, types.MethodType, functools.partial), self._wrapper),
        ):
            if issubclass(kind, known):
                return handler
        holds = issubclass(kind, nn.Module) or is_followed(kind) or root_of(kind.__module__) in _HOLDING
        return self._object if holds else None

    def _push(self, named: Iterable[tuple[Any, Any]], path: Path) -> None:
        handlers = self._handlers
        for name, thing in named:
            if handlers.get(type(thing), True) is not None:
                self._todo.append((thing, Path(path, name)))

    def _container(self, thing: Any, path: Path) -> None:
        keeper = keeper_of(thing)
        if keeper is not None:
            self.keepers.append(keeper)
        # other threads may write to the thing itself meanwhile
        parts = thing if keeper is None else keeper.before
        self._push(parts.items() if isinstance(parts, dict) else enumerate(parts), path)
        if attributes_of(thing) is not None:
            self._object(thing, path)

    def _object(self, thing: Any, path: Path) -> None:
        kind = type(thing)
        state = attributes_of(thing)
        if isinstance(state, dict):
            kept = Entries.of(state)
            self.keepers.append(kept)
            skipped = _HOOKS if isinstance(thing, nn.Module) else ()
            self._push(((name, item) for name, item in kept.before.items() if name not in skipped), path)
        if kind not in self._slots:
            self._slots[kind] = [*_members(kind)]
        if self._slots[kind]:
            slots = Slots.of(thing, self._slots[kind])
            self.keepers.append(slots)
            self._push(((member.__name__, item) for member, item in slots.before), path)
        self._push([("class", kind)], path)

    def _class(self, kind: type, path: Path) -> None:
        if not is_followed(kind):
            return
        self.keepers.append(ClassAttributes.of(kind))
        self._push(((base.__name__, base) for base in kind.__bases__), path)
        for name, item in list(vars(kind).items()):
            called = name in self._named or (name[:2] == "__" and name not in MAKING)
            if called or not isinstance(item, (types.FunctionType, *WRAPPERS)):
                self._push([(name, item)], path)
            else:
                self._methods.setdefault(name, []).append((item, Path(path, name)))

    def _memo(self, thing: Any, path: Path) -> None:
        self.keepers.append(Memo(thing))
        self._push([("__wrapped__", thing.__wrapped__)], path)

    def _wrapper(self, thing: Any, path: Path) -> None:
        """A property, a method, a partial call: what is behind it."""
        parts = ("fget", "func", "__func__", "__self__", "args", "keywords")
        self._push([(part, getattr(thing, part)) for part in parts if hasattr(thing, part)], path)

    def _function(self, function: types.FunctionType, path: Path) -> None:
        if not is_followed(function):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            kept = EnclosedVariable.of(cell)
            self.keepers.append(kept)
            self._push([(name, kept.before)], path)
        defaults = (function.__defaults__, function.__kwdefaults__, vars(function))
        self._push((("default", part) for part in defaults if part), path)
        names = names_in(function.__code__)
        self._globals(function.__globals__, names, path)
        for name in names - self._named:
            self._named.add(name)
            self._todo.extend(self._methods.pop(name, ()))

    def _globals(self, table: dict[str, Any], names: set[str], path: Path, depth: int = 0) -> None:
        """What code finds in its Python module, and in those that it names: `tables.rotary[size]`."""
        kept = Globals.of(table, names)
        self.keepers.append(kept)
        for name, item in kept.before.items():
            if not isinstance(item, types.ModuleType):
                self._push([(name, item)], path)
            elif depth < 2 and root_of(item.__name__) not in NOT_FOLLOWED:
                self._globals(vars(item), names, Path(path, name), depth + 1)


def is_followed(thing: type | types.FunctionType) -> bool:
    """Whether a class or function is of none of Python's, PyTorch's, NumPy's or graphcache's modules."""
    return root_of(thing.__module__) not in NOT_FOLLOWED


def root_of(module: Any) -> str:
    """The package at the top of a module's name."""
    return str(module).partition(".")[0]


def _members(kind: type) -> Iterator[Any]:
    """The slots of the classes of a kind; what code in C lays out may be readable alone."""
    tables = [vars(base) for base in kind.__mro__ if "__slots__" in vars(base) and is_followed(base)]
    items = chain.from_iterable(table.values() for table in tables)
    return (item for item in items if isinstance(item, types.MemberDescriptorType))
