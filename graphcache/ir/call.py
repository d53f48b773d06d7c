"""The structure around a call's tensors: what a signature counts, what a graph leaves out."""

import dataclasses
import enum
import inspect
import numbers
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import InputKind
from graphcache.ir.tree import (
    INSTEAD_OF_A_CACHE,
    Leaf,
    fields_of,
    fill,
    is_record,
    refuse_filled,
    sequence_of,
    strip,
)

_BY_IDENTITY = (torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum, type)
_BY_VALUE = (type(None), bool, int, float, complex, str, bytes)
_PLAIN = (*_BY_VALUE, *_BY_IDENTITY, numbers.Number, range, slice)
"""Of a result: what a graph hands out at every step as it was at capture."""


class Binder:
    """Turns one forward's positional and keyword arguments into flat tensors and a signature."""

    def __init__(self, parameters: Mapping[str, inspect.Parameter]) -> None:
        kinds = {p.kind for p in parameters.values()}
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            raise CaptureError("the model's forward takes *args; give its arguments names")
        self.names = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        self.required = {n for n in self.names if parameters[n].default is inspect.Parameter.empty}
        self._position = {name: i for i, name in enumerate(self.names)}
        self.positional_only = {
            n for n, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_ONLY
        }

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, in signature order; unnamed ones are an error as in a plain call."""
        if len(args) > len(self.names):
            raise TypeError(f"forward takes {len(self.names)} arguments, {len(args)} were given")
        bound = dict(zip(self.names, args, strict=False))
        if not bound.keys().isdisjoint(kwargs):
            twice = sorted(bound.keys() & kwargs)
            raise TypeError(f"forward got several values for {', '.join(twice)}")
        bound.update(kwargs)
        if missing := self.required - bound.keys():
            raise TypeError(f"forward is missing {', '.join(sorted(missing))}")
        last = len(self.names)
        return dict(sorted(bound.items(), key=lambda item: (self._position.get(item[0], last), item[0])))

    def signature(self, bound: Mapping[str, Any]) -> tuple[tuple[Hashable, ...], list[torch.Tensor]]:
        """The key under which a capture is valid, and the tensor leaves in order.

        The key holds the tree, each tensor's shape, dtype, device and need of a gradient, and every other
        leaf's value.
        """
        key: list[Hashable] = []
        tensors: list[torch.Tensor] = []
        for name, value in bound.items():
            key.append(name)
            _sign(value, key, tensors, name)
        return tuple(key), tensors


def _sign(value: Any, key: list[Hashable], tensors: list[torch.Tensor], where: str) -> None:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        key.append((value.shape, value.dtype, value.device, value.requires_grad))
    elif isinstance(value, _BY_VALUE):
        key.append((value.__class__, value))
    elif isinstance(value, (list, tuple)):
        key.append((value.__class__, len(value)))
        for i, item in enumerate(value):
            _sign(item, key, tensors, f"{where}[{i}]")
    elif isinstance(value, dict) and (value.__class__ is dict or not is_record(value)):
        key.append((dict, tuple(value)))
        for name, item in value.items():
            _sign(item, key, tensors, f"{where}.{name}")
    elif isinstance(value, _BY_IDENTITY):
        key.append(value)
    elif is_record(value):
        key.append(value.__class__)
        for name, item in fields_of(value).items():
            _sign(item, key, tensors, f"{where}.{name}")
    else:
        raise CaptureError(
            f"argument {where} is a {type(value).__name__}, whose value cannot be compared between "
            "calls; pass tensors, numbers, strings, lists, dicts or dataclasses of them. If it is a cache of "
            f"keys and values, {INSTEAD_OF_A_CACHE}"
        )


@dataclass(frozen=True)
class CallSpec:
    """How flat tensors make up a call's arguments: rebuilt once, at capture."""

    template: dict[str, Any]
    positional_only: frozenset[str]
    leaf_names: tuple[str, ...]
    latent: int
    timestep: int

    @staticmethod
    def of(binder: Binder, bound: Mapping[str, Any], timestep: str) -> "CallSpec":
        """Describe one call.

        Raises:
            CaptureError: the timestep is missing or no tensor, or nothing looks like latents.
        """
        names: list[str] = []
        template = {name: strip(value, name, names) for name, value in bound.items()}
        step = template.get(timestep)
        if not isinstance(step, Leaf):
            raise CallSpec.missing_timestep(bound, timestep)
        latent = next(
            (
                leaf.index
                for name, leaf in template.items()
                if isinstance(leaf, Leaf) and name != timestep and bound[name].is_floating_point()
            ),
            None,
        )
        if latent is None:
            raise CaptureError(
                "no argument of this call is a floating-point tensor that could be the latents"
            )
        return CallSpec(template, frozenset(binder.positional_only), tuple(names), latent, step.index)

    @staticmethod
    def missing_timestep(bound: Mapping[str, Any], timestep: str) -> CaptureError:
        """The error for a call whose timestep is absent or no tensor."""
        found = "absent" if timestep not in bound else f"a {type(bound[timestep]).__name__}"
        return CaptureError(
            f"the timestep argument '{timestep}' is {found}, a tensor is needed; "
            f"name it with transform(..., timestep=...): this call has {', '.join(bound) or 'no arguments'}"
        )

    def constants(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The inputs that a generation is expected to keep."""
        varies = (self.latent, self.timestep)
        return tuple([tensor for index, tensor in enumerate(tensors) if index not in varies])

    def kind(self, index: int) -> InputKind:
        if index == self.latent:
            return "latent"
        return "timestep" if index == self.timestep else "constant"

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled = {name: fill(value, tensors) for name, value in self.template.items()}
        args = tuple(filled.pop(name) for name in list(filled) if name in self.positional_only)
        return args, filled

    def run(self, model: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Any:
        """The model's result for these leaves.

        Raises:
            CaptureError: the call has put something into one of its arguments.
        """
        given, named = self.arguments(tensors)
        result = model(*given, **named)
        before, named_before = self.arguments(tensors)
        positional = [name for name in self.template if name in self.positional_only]
        for name, old, new in zip(positional, before, given, strict=True):
            refuse_filled(name, old, new)
        for name, old in named_before.items():
            refuse_filled(name, old, named[name])
        return result


@dataclass(frozen=True)
class OutputSpec:
    """The structure of a model's result: tuples, dicts and dataclasses such as diffusers' outputs."""

    count: int
    build: Callable[[Sequence[torch.Tensor]], Any]

    @staticmethod
    def of(result: Any) -> tuple["OutputSpec", tuple[torch.Tensor, ...]]:
        """Take a result apart.

        Raises:
            CaptureError: it has no tensor, or an object in it that a graph cannot make anew at each step.
        """
        leaves: list[torch.Tensor] = []
        build = _builder(result, leaves, "the model's result")
        if not leaves:
            raise CaptureError(f"the model returned {type(result).__name__} without a tensor in it")
        return OutputSpec(len(leaves), build), tuple(leaves)


def _builder(value: Any, leaves: list[torch.Tensor], where: str) -> Callable[[Sequence[torch.Tensor]], Any]:
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        index = len(leaves) - 1
        return lambda tensors: tensors[index]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind: Any = type(value)
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        parts = {name: _builder(getattr(value, name), leaves, f"{where}.{name}") for name in fields}
        return lambda tensors: kind(**{name: part(tensors) for name, part in parts.items()})
    if isinstance(value, Mapping):
        entries = {key: _builder(item, leaves, f"{where}[{key!r}]") for key, item in value.items()}
        mapping: Any = type(value)
        return lambda tensors: mapping({key: entry(tensors) for key, entry in entries.items()})
    if isinstance(value, (list, tuple)):
        items = [_builder(item, leaves, f"{where}[{i}]") for i, item in enumerate(value)]
        sequence = type(value)
        return lambda tensors: sequence_of(sequence, [item(tensors) for item in items])
    if not isinstance(value, _PLAIN):
        raise CaptureError(
            f"{where} is a {type(value).__name__}, of which a graph could only hand out the first step's at "
            f"every step; {INSTEAD_OF_A_CACHE}"
        )
    return lambda tensors: value
