"""What a capture bakes in of a model, and whether it is still so."""

import functools
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from graphcache.ir.attributes import attributes_of
from graphcache.ir.graph import layout
from graphcache.libraries.torch_private import FORWARD_HOOKS, is_traceable_wrapper_subclass
from graphcache.tracing.homes import Homes
from graphcache.tracing.hooks import BOOKKEEPING, Worn, worn
from graphcache.tracing.unlifted import parts_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Values that are the same when they are equal; all others are compared by identity."""

_CONTAINERS = (dict, list, set, tuple)
_NOT_FOLLOWED = (nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType, *_PLAIN)

_NEEDS_GRADIENT = operator.attrgetter("requires_grad")
_DEEPEST = 4
"""How far containers within containers are followed."""

_PASSED_OVER = BOOKKEEPING | {"forward"}
_SKIPPED = _PASSED_OVER | vars(nn.Module()).keys()


class Watch:
    """Everything that a capture baked in, held so that no identity is reused, to be compared cheaply.

    Its *structure* are modules, parameters and buffers by identity, tensors also by dtype, device, layout
    and the tensors that they are made of, and the classes' forwards; of weights that are kept elsewhere
    shape, dtype and where they are computed with. Its *surface* are the other attributes, by value where
    they are plain, the contents of those that are dicts, lists or sets, the attributes of objects such as
    attention processors, which tensors need a gradient, and what stands around forwards. Values inside
    weights do not count.
    """

    def __init__(self, model: nn.Module, homes: Homes) -> None:
        self._modules = list(model.modules())
        self._homes, self._away = homes, homes.layouts(self._modules)
        self._states = [module.__dict__ for module in self._modules]
        self._tables = [
            state[name] for state in self._states for name in ("_parameters", "_buffers", "_modules")
        ]
        self._entries = [*self._kept_here()]
        self._tensors = [item for item in self._entries if isinstance(item, torch.Tensor)]
        self._layouts = [*map(layout, self._tensors)]
        self._wrappers = [item for item in self._tensors if is_traceable_wrapper_subclass(item)]
        self._parts = [*_parts(self._wrappers)]
        self._methods = {kind: kind.forward for kind in {type(module) for module in self._modules}}
        self._hooks = [state[name] for state in self._states for name in FORWARD_HOOKS]
        self._take()

    def _kept_here(self) -> Iterator[Any]:
        """What modules hold; None for weights that are kept elsewhere, whose tensors come and go."""
        if not self._away:
            return _values(self._tables)
        away = self._away
        return (
            None if (id(table), name) in away else item
            for table in self._tables
            for name, item in table.items()
        )

    def _take(self) -> None:
        """Note the surface as it is."""
        self._copies = [state.copy() for state in self._states]
        self._attributes = [*_values(self._states)]
        self._containers = [*_containers(self._states)]
        self._contents = [live.copy() for live in self._containers]
        self._lively = [*_lively(self._states)]
        self._seen = [read() for read in self._lively]
        self._gradients = [*map(_NEEDS_GRADIENT, self._tensors)]
        # every hook of PyTorch's has a number; as long as none was given, there is none to look for
        self._registered = RemovableHandle.next_id
        self._worn = [(module, worn(module)) for module in self._modules if "forward" in module.__dict__]
        self._count_forwards()

    def _count_forwards(self) -> None:
        self._size = sum(map(len, self._states))
        self._forwards = [module.__dict__["forward"] for module, _ in self._worn]

    def has_other_structure(self) -> bool:
        """Whether modules, weights or forwards are other ones, so that nothing captured can be used again."""
        return (
            not _identical(self._kept_here(), self._entries)
            or self._homes.layouts(self._modules) != self._away
            or [*map(layout, self._tensors)] != self._layouts
            or not _identical(_parts(self._wrappers), self._parts)
            or any(kind.forward is not method for kind, method in self._methods.items())
        )

    def has_other_surface(self) -> bool:
        """Whether attributes or hooks are other ones; well under a microsecond a module when they are not."""
        return (
            any(self._hooks)
            or [*map(_NEEDS_GRADIENT, self._tensors)] != self._gradients
            or not _equal(self._containers, self._contents)
            or self._wears_others()
            or not (_same(self._states, self._attributes) or self._equal_attributes())
        )

    def is_touched(self) -> bool:
        """Whether what may change within a generation did: hooks, adapters, processors.

        Cheap enough for every call: a fiftieth of a microsecond a module.
        """
        try:
            return (
                (RemovableHandle.next_id != self._registered and any(self._hooks))
                or [read() for read in self._lively] != self._seen
                or self._containers != self._contents
                or (self._wears_others() if self._is_rearranged() else False)
            )
        except (KeyError, RuntimeError, TypeError, ValueError):  # gone, changing just now, or tensors in it
            return True

    def _is_rearranged(self) -> bool:
        """Whether attributes came or went, or a forward is another object."""
        return sum(map(len, self._states)) != self._size or any(
            module.__dict__.get("forward") is not forward
            for (module, _), forward in zip(self._worn, self._forwards, strict=True)
        )

    def _wears_others(self) -> bool:
        """Whether something else stands around forwards; what merely left its traces does not count."""
        if not self._is_rearranged():
            return False
        now = [(module, worn(module)) for module in self._modules if "forward" in module.__dict__]
        before = {id(module): around for module, around in self._worn if around}
        if len(before) != sum(bool(around) for _, around in now):
            return True
        if not all(_is_worn(around, before.get(id(module), ())) for module, around in now):
            return True
        if sum(map(_others, self._states)) != sum(map(_others, self._copies)):
            return True
        self._worn = now
        self._count_forwards()
        return False

    def _equal_attributes(self) -> bool:
        """Whether all that became another object is a plain value that equals the old one, or hooks' own."""
        if not all(map(_same_attributes, self._states, self._copies)):
            return False
        self._take()
        return True


def _parts(wrappers: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors that others are made of; a graph holds these."""
    return (part for wrapper in wrappers for _, part in parts_of(wrapper))


def _values(tables: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, tables))


def _same(tables: list[dict[str, Any]], expected: list[Any]) -> bool:
    return sum(map(len, tables)) == len(expected) and all(map(operator.is_, _values(tables), expected))


def _identical(found: Iterable[Any], expected: list[Any]) -> bool:
    items = [*found]
    return len(items) == len(expected) and all(map(operator.is_, items, expected))


def _others(state: Mapping[str, Any]) -> int:
    """How many attributes a module has beside what hooks leave behind."""
    return len(state) - sum(name in state for name in _PASSED_OVER)


def _is_worn(now: Worn, before: Worn) -> bool:
    return len(now) == len(before) and all(
        kind is other and _equal(attributes, others)
        for (kind, attributes), (other, others) in zip(now, before, strict=True)
    )


def _same_attributes(now: dict[str, Any], before: dict[str, Any]) -> bool:
    names = (now.keys() | before.keys()) - _PASSED_OVER
    return all(name in now and name in before and _is_same_value(now[name], before[name]) for name in names)


def _is_same_value(new: Any, old: Any) -> bool:
    """Whether nothing changed; equal copies of containers are the same."""
    comparable = type(new) is type(old) and isinstance(new, (*_PLAIN, *_CONTAINERS))
    return new is old or (comparable and _equal(new, old))


def _equal(live: Any, copy: Any) -> bool:
    try:
        return bool(live == copy)
    except Exception:  # tensors and arrays in it, and others than before
        return False


def _lively(states: list[dict[str, Any]]) -> Iterator[Callable[[], Any]]:
    """What reads all attributes of the modules that keep objects or containers among them, as adapters do."""
    for state in states:
        names = [name for name in state if name not in _SKIPPED]
        kept = [name for name in names if not isinstance(state[name], (*_NOT_FOLLOWED, tuple))]
        if any(isinstance(state[name], (dict, list, set)) for name in kept):
            kept = names
        if kept:
            yield functools.partial(operator.itemgetter(*kept), state)


def _containers(states: list[dict[str, Any]]) -> Iterator[Any]:
    """Every container among the modules' attributes, and the attributes of every object."""
    seen: set[int] = set()
    todo = [(value, 0) for state in states for name, value in state.items() if name not in _SKIPPED]
    while todo:
        value, depth = todo.pop()
        if id(value) in seen or isinstance(value, _NOT_FOLLOWED):
            continue
        seen.add(id(value))
        live = value if isinstance(value, _CONTAINERS) else attributes_of(value)
        if isinstance(live, (dict, list, set)):
            yield live
        if depth < _DEEPEST and live is not None:
            todo.extend((item, depth + 1) for item in (live.values() if isinstance(live, dict) else live))
