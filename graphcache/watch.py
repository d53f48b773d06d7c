"""What a capture bakes in of a model, and whether it is still so."""

import operator
import types
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from graphcache.ir.errors import CaptureError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Values that are the same when they are equal; all others are compared by identity."""

_CONTAINERS = (dict, list, set, tuple)
_NOT_FOLLOWED = (nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType, *_PLAIN)

_TENSOR_TRAITS = operator.attrgetter("dtype", "device", "requires_grad")
_DEEPEST = 4
"""How far containers within containers are followed."""


class Watch:
    """Everything that a capture baked in, held so that no identity is reused, to be compared cheaply.

    Modules, parameters and buffers count by identity, tensors also by dtype, device and need of a gradient,
    other attributes by value where they are plain; so do the contents of attributes that are dicts, lists or
    sets, and the attributes of objects such as attention processors. Values inside weights do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._states = [module.__dict__ for module in modules]
        self._copies = [state.copy() for state in self._states]
        self._attributes = [*_values(self._states)]
        self._tables = [
            state[name] for state in self._states for name in ("_parameters", "_buffers", "_modules")
        ]
        self._entries = [*_values(self._tables)]
        self._tensors = [item for item in self._entries if isinstance(item, torch.Tensor)]
        self._traits = [*map(_TENSOR_TRAITS, self._tensors)]
        self._hooks = [state[name] for state in self._states for name in _HOOKS]
        self._methods = {kind: kind.forward for kind in {type(module) for module in modules}}
        self._contents = [*_contents(self._states)]

    def has_changed(self) -> bool:
        """Whether another capture is needed; well under a microsecond a module when it is not."""
        return (
            any(map(len, self._hooks))
            or not _same(self._tables, self._entries)
            or [*map(_TENSOR_TRAITS, self._tensors)] != self._traits
            or any(kind.forward is not method for kind, method in self._methods.items())
            or any(not _equal(live, copy) for live, copy in self._contents)
            or not (_same(self._states, self._attributes) or self._equal_attributes())
        )

    def _equal_attributes(self) -> bool:
        """Whether all that became another object is a plain value that equals the old one, or hooks' own."""
        if not all(map(_same_attributes, self._states, self._copies)):
            return False
        self._copies = [state.copy() for state in self._states]
        self._attributes = [*_values(self._states)]
        self._contents = [*_contents(self._states)]
        return True


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BOOKKEEPING = frozenset(("_diffusers_hook", "_hf_hook", "_old_forward"))
"""What hooks of diffusers and accelerate leave on a module; they act through its forward, which counts."""
_SKIPPED = _BOOKKEEPING | vars(nn.Module()).keys()


def refuse_uncapturable(model: nn.Module) -> None:
    """Say what a captured graph would lose silently.

    Raises:
        CaptureError: training mode, hooks, or a forward set on an instance.
    """
    if model.training:
        raise CaptureError("the model is in training mode; call model.eval() before the first generation")
    for name, module in model.named_modules():
        where = name or "the model"
        state = module.__dict__
        if any(state[hooks] for hooks in _HOOKS):
            raise _lost(where, "forward hooks")
        if _is_replaced(module):
            raise _lost(where, "a forward of its own, set on the instance (accelerate's hooks do that)")


def _lost(where: str, what: str) -> CaptureError:
    return CaptureError(
        f"{where} has {what}, which would run once during the capture and never again; remove it before "
        "transforming (diffusers' caches: model.disable_cache(); offloading: enable it on the whole model, "
        "after transform, not by layers; torch.compile: compile the model, not its forward)"
    )


def _is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's own (diffusers leaves such behind)."""
    own = module.__dict__.get("forward")
    if own is None:
        return False
    return getattr(own, "__func__", None) is not type(module).forward or own.__self__ is not module


def _values(tables: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, tables))


def _same(tables: list[dict[str, Any]], expected: list[Any]) -> bool:
    return sum(map(len, tables)) == len(expected) and all(map(operator.is_, _values(tables), expected))


def _same_attributes(now: dict[str, Any], before: dict[str, Any]) -> bool:
    names = now.keys() | before.keys()
    return all(
        name in now and name in before and _is_same_value(now[name], before[name])
        for name in names - _BOOKKEEPING
    )


def _is_same_value(new: Any, old: Any) -> bool:
    """Whether nothing changed; torch.export leaves equal copies of the containers that it finds."""
    comparable = type(new) is type(old) and isinstance(new, (*_PLAIN, *_CONTAINERS))
    return new is old or (comparable and _equal(new, old))


def _equal(live: Any, copy: Any) -> bool:
    try:
        return bool(live == copy)
    except Exception:  # tensors and arrays in it, and others than before
        return False


def _contents(states: list[dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
    """Every container among the modules' attributes, and the attributes of every object, with a copy."""
    seen: set[int] = set()
    todo = [(value, 0) for state in states for name, value in state.items() if name not in _SKIPPED]
    while todo:
        value, depth = todo.pop()
        if id(value) in seen or isinstance(value, _NOT_FOLLOWED):
            continue
        seen.add(id(value))
        live = value if isinstance(value, _CONTAINERS) else getattr(value, "__dict__", ())
        if isinstance(live, (dict, list, set)):
            yield live, live.copy()
        if depth < _DEEPEST:
            todo.extend((item, depth + 1) for item in (live.values() if isinstance(live, dict) else live))
