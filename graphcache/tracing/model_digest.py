"""Everything that tracing could look at in a model, as a digest that is the same in every process."""

import enum
import functools
import hashlib
import itertools
import logging
import pathlib
import re
import struct
import sys
import threading
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from graphcache.ir.attributes import attributes_of
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import as_bytes, layout
from graphcache.libraries.diffusers_private import DEFAULTED
from graphcache.libraries.torch_private import FORWARD_HOOKS, MODULE_TABLES, OpOverload
from graphcache.tracing.belongings import MAKING, NOT_FOLLOWED, WRAPPERS, is_followed, root_of
from graphcache.tracing.code_digest import code_text, names_in
from graphcache.tracing.keepers import MEMO

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), range, slice)
_NAMED = (
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    np.dtype,
    np.generic,
    pathlib.PurePath,
)
_WRITTEN = (OpOverload, types.GenericAlias, types.UnionType, typing.TypeVar, torch.finfo, torch.iinfo)
"""What its `repr` tells."""
_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)
_IN_C = (types.BuiltinFunctionType, np.ufunc)
_DESCRIPTORS = (
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)
_WITHOUT_NUMBERS = (
    logging.Logger,
    logging.LoggerAdapter,
    torch.library.Library,
    type(threading.Lock()),
    type(threading.RLock()),
)
"""Objects that hold nothing which is computed with."""
_WRAPPED = ("fget", "fset", "func", "__func__", "__self__", "args", "keywords", "__wrapped__")
_FOR_READERS = frozenset(
    """
    __dict__ __weakref__ __doc__ __annotations__ __static_attributes__ __firstlineno__ __abstractmethods__
    __slotnames__ __parameters__ __orig_bases__ __dataclass_params__ __dataclass_fields__ __match_args__
    __signature__
    """.split()  # noqa: SIM905
)
"""What Python keeps in classes and functions beside what their author wrote, or what tells readers alone."""
_SKIPPED = vars(nn.Module()).keys() - {"training", *MODULE_TABLES[2:3]}
"""Attributes of modules: hooks, and tables that are looked at apart."""
_POINTER = struct.calcsize("P")
_DEPTH = 2
"""How far modules named by modules are followed."""


class ModelDigest:
    """What can be reached from a model: attributes, the layouts of weights, the values of other tensors,
    classes and the code that forward's code names, as `Belongings` finds it; of Python, PyTorch and NumPy no
    more than names.

    Attributes:
        tensors: those that were met, weights too, in an order that is the same wherever the digest is.

    Args:
        model: what is traced.
        around: what else tracing depends on.

    Raises:
        CaptureError: there is something that another process could not know again.
    """

    def __init__(self, model: nn.Module, around: Any) -> None:
        self.tensors: list[torch.Tensor] = []
        self._weights = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._digest = hashlib.sha256()
        self._met: dict[int, int] = {}
        self._kept: list[Any] = []
        self._todo: deque[Any] = deque()
        self._named = {"forward"}
        self._methods: dict[str, list[Any]] = {}
        self._put("model", model, "around", around)
        while self._todo:
            self._visit(self._todo.popleft())

    def __str__(self) -> str:
        return self._digest.hexdigest()

    def _put(self, *things: Any) -> None:
        """Write things down: those that hold others as numbers, to be looked at later."""
        for thing in things:
            self._digest.update(self._text(thing).encode(errors="surrogatepass") + b"\n")

    def _text(self, thing: Any) -> str:
        kind = type(thing)
        if kind in _PLAIN:
            return f"{kind.__name__} {thing!r}"
        if isinstance(thing, enum.Enum):
            return f"{kind.__module__}.{kind.__qualname__} {thing.name} {self._text(thing.value)}"
        if isinstance(thing, (*_NAMED, *_WRITTEN)) or kind.__module__ == "typing":
            if " at 0x" in repr(thing):  # an address
                raise _unknown(thing)
            return f"{kind.__name__} {thing!r}"
        number = self._met.get(id(thing))
        if number is None:
            number = self._met[id(thing)] = len(self._met)
            self._kept.append(thing)
            self._todo.append(thing)
        return f"#{number}"

    def _visit(self, thing: Any) -> None:
        for known, handler in self._handlers:
            if isinstance(thing, known):
                handler(self, thing)
                return
        self._object(thing)

    def _tensor(self, tensor: torch.Tensor) -> None:
        if type(tensor) not in _TENSORS or tensor.layout is not torch.strided or tensor.is_quantized:
            raise _unknown(tensor)
        self.tensors.append(tensor)
        dtype, device, *sizes = layout(tensor)
        told = type(tensor).__name__, str(dtype), str(device), sizes, tensor.requires_grad, tensor.is_conj()
        is_weight = id(tensor) in self._weights or device.type == "meta"
        self._put(repr(told), b"" if is_weight else hashlib.sha256(as_bytes(tensor)).digest())

    def _array(self, array: Any) -> None:
        if array.dtype.hasobject:
            raise _unknown(array)
        self._put(repr((array.dtype, array.shape)), hashlib.sha256(array.tobytes()).digest())

    def _module(self, module: nn.Module) -> None:
        state = module.__dict__
        if any(state[hooks] for hooks in FORWARD_HOOKS):
            raise CaptureError("it has hooks")
        self._put(type(module), type(module).forward)
        for table in MODULE_TABLES[:2]:
            self._items(state[table])
        self._items({name: item for name, item in state.items() if name not in _SKIPPED})

    def _dict(self, items: Any) -> None:
        self._put(type(items))
        self._items(dict(items))
        self._items(attributes_of(items) or {})

    def _items(self, items: dict[Any, Any]) -> None:
        self._put(len(items))
        for name, item in items.items():
            has_no_order = name == DEFAULTED and isinstance(item, list) and {*map(type, item)} == {str}
            self._put(name, {*item} if has_no_order else item)

    def _sequence(self, items: Any) -> None:
        self._put(type(items), len(items), *items)
        self._items(attributes_of(items) or {})

    def _set(self, items: Any) -> None:
        if not all(isinstance(item, (*_PLAIN, *_NAMED, enum.Enum)) for item in items):
            raise _unknown(next(iter(items)))
        self._put(type(items), len(items), *sorted(map(self._text, items)))

    def _function(self, function: types.FunctionType) -> None:
        self._put(function.__module__, function.__qualname__)
        # a function of PyTorch's may stand around one of the model's
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        is_own = is_followed(function)
        if is_own or "<locals>" in function.__qualname__:
            self._items({name: _content(cell) for name, cell in cells})
        if not is_own:
            return
        self._put(code_text(function.__code__), function.__defaults__, function.__kwdefaults__)
        self._items({name: item for name, item in vars(function).items() if name not in _FOR_READERS})
        names = sorted(names_in(function.__code__))
        self._globals(function.__globals__, names, 0)
        parents = ["", *itertools.accumulate(str(function.__module__).split("."), "{}.{}".format)]
        for name in names:
            # what code imports when it runs
            for module in [f"{parent}.{name}".lstrip(".") for parent in parents]:
                if module in sys.modules and root_of(module) not in NOT_FOLLOWED:
                    self._globals(vars(sys.modules[module]), names, 1)
            if name not in self._named:
                self._named.add(name)
                self._put(*self._methods.pop(name, ()))

    def _globals(self, table: dict[str, Any], names: Iterable[str], depth: int) -> None:
        """What code finds in its Python module, and in those that it names."""
        for name in names:
            item = table.get(name)
            if isinstance(item, types.ModuleType):
                self._put(name, item.__name__)
                if depth < _DEPTH and root_of(item.__name__) not in NOT_FOLLOWED:
                    self._globals(vars(item), names, depth + 1)
            elif name in table:
                self._put(name, item)

    def _class(self, kind: type) -> None:
        self._put(kind.__module__, kind.__qualname__)
        if not is_followed(kind):
            return
        self._put(*kind.__bases__)
        for name, item in vars(kind).items():
            if name in _FOR_READERS or type(item).__name__.endswith("abc_data"):
                continue
            self._put(name)
            is_called = name in self._named or (name[:2] == "__" and name not in MAKING)
            if is_called or not isinstance(item, (types.FunctionType, *WRAPPERS)):
                self._put(item)
            else:
                self._put(_code(item))
                self._methods.setdefault(name, []).append(item)

    def _wrapper(self, thing: Any) -> None:
        """A property, a method, a partial call, a memo: what is behind it."""
        self._put(type(thing).__name__)
        self._items({part: getattr(thing, part) for part in _WRAPPED if hasattr(thing, part)})

    def _in_c(self, thing: Any) -> None:
        owner: Any = getattr(thing, "__self__", None)
        where = getattr(thing, "__module__", None)
        if isinstance(owner, types.ModuleType):
            owner, where = None, owner.__name__
        if where is not None and root_of(where) not in NOT_FOLLOWED | {"builtins"}:
            raise _unknown(thing)
        self._put(type(thing).__name__, str(where), thing.__name__, owner)

    def _by_name(self, thing: Any) -> None:
        self._put(type(thing).__name__, getattr(thing, "__qualname__", None) or getattr(thing, "name", ""))

    def _pattern(self, thing: re.Pattern[Any]) -> None:
        self._put(thing.pattern, thing.flags)

    def _object(self, thing: Any) -> None:
        kind = type(thing)
        if not _is_of_attributes(kind):
            raise _unknown(thing)
        self._put(kind)
        self._items(attributes_of(thing) or {})
        for name in _slots(kind):
            self._put(name, getattr(thing, name, None))

    _handlers: tuple[tuple[Any, Callable[["ModelDigest", Any], None]], ...] = (
        (torch.Tensor, _tensor),
        (np.ndarray, _array),
        (nn.Module, _module),
        ((dict, types.MappingProxyType), _dict),
        ((list, tuple, deque), _sequence),
        ((set, frozenset), _set),
        (types.FunctionType, _function),
        (type, _class),
        (WRAPPERS, _wrapper),
        ((types.MethodType, functools.partial, MEMO), _wrapper),
        (_IN_C, _in_c),
        ((*_DESCRIPTORS, *_WITHOUT_NUMBERS), _by_name),
        (re.Pattern, _pattern),
    )


def _slots(kind: type) -> list[str]:
    """The attributes of a class's objects that are kept in slots; what code in C lays out are none."""
    tables = [vars(base) for base in kind.__mro__ if "__slots__" in vars(base)]
    items = [(name, item) for table in tables for name, item in table.items()]
    return [name for name, item in items if isinstance(item, types.MemberDescriptorType)]


def _is_of_attributes(kind: type) -> bool:
    """Whether all that its objects hold are attributes: what has parts in C is larger."""
    tables = (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    return kind.__basicsize__ == object.__basicsize__ + (len(_slots(kind)) + tables) * _POINTER


def _code(method: Any) -> str:
    """The code of an attribute of a class, of which nothing is known to be called."""
    functions = [getattr(method, name, None) for name in ("fget", "func", "__func__")]
    function = next(filter(None, functions), method)
    return code_text(function.__code__) if isinstance(function, types.FunctionType) else type(method).__name__


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _unknown(thing: Any) -> CaptureError:
    return CaptureError(f"it holds a {type(thing).__module__}.{type(thing).__qualname__}")
