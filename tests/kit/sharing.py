"""Captures made once for all models that are alike: tracing is half of what these tests would cost.

So are traces with symbols for sizes. Captures know no plan, and weights only by name. Models are alike if
everything that tracing could look at is equal: types, attributes, and what each tensor is but for the values
of parameters and buffers.
"""

import enum
import types
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.graph_module import _assign_attr

from graphcache.compiler.captured import Captured
from graphcache.compiler.modes import ambient
from graphcache.ir.call import CallSpec
from graphcache.ir.graph import StepGraph
from graphcache.ir.opaque import Opaque
from graphcache.libraries.kernels import attention_kernels
from graphcache.libraries.torch_private import is_traceable_wrapper_subclass
from graphcache.tracing.homes import Homes
from graphcache.tracing.symbolic import Symbolic

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    PurePath,
    enum.Enum,
    type,
    torch.dtype,
    torch.device,
)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch._ops.OpOverload)
_WEIGHTS = ("_parameters", "_buffers")


class Sharing:
    """Stands in for `Captured.of`, and its `symbolic` for `Symbolic.of`."""

    def __init__(self, capture: Callable[..., Captured], trace: Callable[..., Symbolic]) -> None:
        self.capture, self.trace = capture, trace
        self.captures: dict[Hashable, list[Captured]] = {}
        self.traces: dict[Hashable, Symbolic] = {}

    def __call__(
        self,
        model: nn.Module,
        call: CallSpec,
        tensors: Sequence[Tensor],
        observers: Sequence[Any] = (),
        split: bool = False,
        asks: bool = False,
        before: Sequence[Opaque] = (),
        homes: Homes | None = None,
    ) -> Captured:
        make = partial(self.capture, model, call, tensors, observers, split, asks, before, homes)
        if observers or (homes is not None and homes.device is not None):
            return make()
        try:
            key = split, _likeness(model, call, tensors)
        except _Unknown:
            return make()
        alike = self.captures.setdefault(key, [])
        known = next((one for one in alike if _holds(one, tensors)), None)
        if known is None:
            made = make()
            if not made.step.opaque:  # opaque calls are of the model's own modules
                alike.append(made)
            return made
        return replace(known, step=_with_weights_of(model, known.step))

    def symbolic(self, model: nn.Module, call: CallSpec, tensors: Sequence[Tensor]) -> Symbolic:
        try:
            key = _likeness(model, call, tensors)
        except _Unknown:
            return self.trace(model, call, tensors)
        if key not in self.traces:
            self.traces[key] = self.trace(model, call, tensors)
        known = self.traces[key]
        return replace(known, step=_with_weights_of(model, known.step))


class _Unknown(Exception):
    """Something whose likeness nobody can tell."""


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to itself alone, whatever the thing thinks."""

    thing: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


class _Likeness:
    """What tells things apart. What may be changed is named by its place when met again: ties count."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.met: dict[int, int] = {}
        self.kept: list[Any] = []

    def of(self, thing: Any) -> Hashable:
        if isinstance(thing, _PLAIN):
            return type(thing), thing
        if isinstance(thing, _CODE):
            return _Same(thing)
        if isinstance(thing, (set, frozenset)):
            return type(thing), frozenset(map(self.of, thing))
        if isinstance(thing, tuple):
            return type(thing), tuple(map(self.of, thing))
        if id(thing) in self.met:
            return "met", self.met[id(thing)]
        self.met[id(thing)] = len(self.met)
        self.kept.append(thing)
        return type(thing), self._parts(thing)

    def _parts(self, thing: Any) -> Hashable:
        if isinstance(thing, nn.Module):
            return self._module(thing)
        if isinstance(thing, Tensor):
            return _laid(thing), _contents(thing)
        if isinstance(thing, list):
            return tuple(map(self.of, thing))
        if isinstance(thing, dict):
            return self._items(thing.items())
        if isinstance(thing, types.MethodType):
            return _Same(thing.__func__), self.of(thing.__self__)
        if isinstance(thing, partial):
            return self.of((thing.func, thing.args, tuple(thing.keywords.items())))
        if type(thing).__dictoffset__:
            return _Same(vars(type(thing)).get("__call__")), self._items(vars(thing).items())
        raise _Unknown(type(thing))

    def _module(self, module: nn.Module) -> Hashable:
        weights = {**module._parameters, **module._buffers}.items()
        kinds = tuple((name, None if item is None else self._weight(item)) for name, item in weights)
        rest = ((name, value) for name, value in vars(module).items() if name not in _WEIGHTS)
        return _Same(type(module).forward), kinds, self._items(rest)

    def _weight(self, tensor: Tensor) -> Hashable:
        if is_traceable_wrapper_subclass(tensor):
            raise _Unknown(type(tensor))  # captures name what it is made of
        self.kept.append(tensor)
        contents = b"" if id(tensor) in self.weights else _contents(tensor)
        return self.met.setdefault(id(tensor), len(self.met)), type(tensor), _laid(tensor), contents

    def _items(self, items: Iterable[tuple[Any, Any]]) -> Hashable:
        return tuple((self.of(name), self.of(value)) for name, value in items)


def _likeness(model: nn.Module, call: CallSpec, tensors: Sequence[Tensor]) -> Hashable:
    """All that tracing a call of a model could look at."""
    around = ambient(), attention_kernels(), torch.get_default_dtype()
    return around, repr(call), _Likeness(model).of(model), tuple(map(_laid, tensors))


def _laid(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _contents(tensor: Tensor) -> bytes:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise _Unknown(tensor.device)
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _holds(known: Captured, tensors: Sequence[Tensor]) -> bool:
    """Whether the values that forward asks for are those that it was captured with."""
    conditions = known.conditions
    return conditions is None or tuple(conditions.found(tensors)) == conditions.expected


def _with_weights_of(model: nn.Module, step: StepGraph) -> StepGraph:
    """The same graph naming this model's parameters and buffers."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    weights: dict[str, Any] = {f"model.{name}": tensor for name, tensor in named}
    graph, root = step.graph, step.root
    unread = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
    names = {str(node.target) for node in graph.find_nodes(op="get_attr")} | {name for name, _ in unread}
    held = {name: weights.get(name, attrgetter(name)(root)) for name in names}
    with _use_lazy_graph_module(True):
        made = fx.GraphModule(held, graph)
    for name, _ in unread:
        _assign_attr(held[name], made, name)
    return replace(step, root=made)
