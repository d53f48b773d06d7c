"""A model's Python that would make numbers of symbols, kept from doing so while it is traced with symbols."""

import ast
import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphcache.libraries.exclusive import COMPILING
from graphcache.tracing.belongings import NOT_FOLLOWED
from graphcache.tracing.keepers import ABSENT, MEMO


@contextlib.contextmanager
def kept_symbols(model: nn.Module) -> Iterator[None]:
    """Within, `int` of a symbol is that symbol, and memos, which cannot look symbols up, are not asked.

    This holds for the Python modules that the classes of the model come from. Other threads that run them
    meanwhile get what they would get without; those that trace wait, or they would put this back for good.
    """
    with COMPILING, contextlib.ExitStack() as stack:
        stack.enter_context(_AsSizes())
        for module in _python_modules(model):
            names: dict[str, Any] = {
                name: value.__wrapped__ for name, value in vars(module).items() if type(value) is MEMO
            }
            if _only_calls_int(module):
                names["int"] = _Whole
            stack.enter_context(_bound(module, names))
        for kind in {kind for part in model.modules() for kind in _own_classes(part)}:
            memos = {name: value.__wrapped__ for name, value in vars(kind).items() if type(value) is MEMO}
            stack.enter_context(_bound(kind, memos))
        yield


class _AsSizes(TorchFunctionMode):
    """Within it, tensors that are made of symbols hold these and not numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MAKERS and len(args) == 1:
            items = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            if any(isinstance(item, torch.SymInt) for item in items) and all(map(_is_whole, items)):
                return self._made(args[0], items, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _made(self, data: Any, items: Any, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
        made = [torch.full((), item, dtype=dtype or torch.int64, device=device) for item in items]
        return torch.stack(made) if isinstance(data, (list, tuple)) else made[0]


_MAKERS = (torch.tensor, torch.as_tensor)


def _is_whole(item: Any) -> bool:
    return isinstance(item, (int, torch.SymInt)) and not isinstance(item, bool)


class _Converting(type):
    """The class of what stands in for `int`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        is_symbol = len(args) == 1 and isinstance(args[0], (torch.SymInt, torch.SymFloat))
        return torch.sym_int(args[0]) if is_symbol else int(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __instancecheck__(cls, item: Any) -> bool:
        return isinstance(item, (int, torch.SymInt))


class _Whole(int, metaclass=_Converting):
    """Is called as `int` is, and knows its instances and symbols for them."""


def _own_classes(module: nn.Module) -> Iterator[type]:
    for kind in type(module).__mro__:
        if kind.__module__.partition(".")[0] not in NOT_FOLLOWED:
            yield kind


def _python_modules(model: nn.Module) -> list[types.ModuleType]:
    names = {kind.__module__ for part in model.modules() for kind in _own_classes(part)}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]


@functools.cache
def _only_calls_int(module: types.ModuleType) -> bool:
    """Whether `int` is Python's own in a module, and only called, named to `isinstance`, or a hint."""
    if "int" in vars(module):
        return False
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return False
    harmless = {id(name) for node in ast.walk(tree) for part in _harmless(node) for name in ast.walk(part)}
    return all(
        id(node) in harmless for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "int"
    )


def _harmless(node: ast.AST) -> list[ast.AST]:
    """The parts of a node in which it does not matter which object the name `int` stands for."""
    if isinstance(node, ast.Call):
        is_question = isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        return [node.func, *(node.args[1:] if is_question else ())]
    hints = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    return [hint for hint in hints if isinstance(hint, ast.AST)]


@contextlib.contextmanager
def _bound(owner: Any, names: dict[str, Any]) -> Iterator[None]:
    before = {name: vars(owner).get(name, ABSENT) for name in names}
    try:
        for name, value in names.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            delattr(owner, name) if value is ABSENT else setattr(owner, name, value)
