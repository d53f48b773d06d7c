"""The structure around a call's tensors: what a signature counts, what a graph leaves out."""

import dataclasses
import enum
import inspect
import itertools
import numbers
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import Input, InputKind
from graphcache.ir.roles import UNNAMED, Argument, Names, find_latents, find_times, may_be_time
from graphcache.ir.tree import (
    INSTEAD_OF_A_CACHE,
    Taken,
    fields_of,
    fill,
    is_record,
    made_anew,
    sequence_of,
    strip,
    taken,
)

Signature = tuple[Hashable, ...]
"""What the arguments of a call have in common with those of others; see `Binder.signature`."""
Key = tuple[Hashable, ...]
"""The form of the model, a signature, and what else code depends on; gradient mode comes last."""
_BY_IDENTITY = (torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum, type)
_BY_VALUE = (type(None), bool, int, float, complex, str, bytes)
_PLAIN = (*_BY_VALUE, *_BY_IDENTITY, numbers.Number, range, slice)
"""Of a result: what a graph hands out at every step as it was at capture."""
_KNOWN_NUMBERS = 256
"""Tensors of numbers that are kept."""
_KNOWN_ORDERS = 64
"""Ways of giving the arguments whose order is kept."""


class Binder:
    """Turns one forward's positional and keyword arguments into flat tensors and a signature.

    Args:
        parameters: those of forward, without self.
        names: which arguments are latents and timestep, if they are to be found under names of their own.
    """

    def __init__(self, parameters: Mapping[str, inspect.Parameter], names: Names = UNNAMED) -> None:
        kinds = {p.kind for p in parameters.values()}
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            raise CaptureError("the model's forward takes *args; give its arguments names")
        self.roles = names
        self.names = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        self.required = {n for n in self.names if parameters[n].default is inspect.Parameter.empty}
        self._position = {name: i for i, name in enumerate(self.names)}
        self._orders: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._numbers: dict[tuple[type, float], torch.Tensor] = {}
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
        given = tuple(bound)
        order = self._orders.get(given)
        if order is None:
            order = self._orders[given] = self._ordered(given)
        return bound if order == given else {name: bound[name] for name in order}

    def _ordered(self, given: tuple[str, ...]) -> tuple[str, ...]:
        if missing := self.required.difference(given):
            raise TypeError(f"forward is missing {', '.join(sorted(missing))}")
        if len(self._orders) >= _KNOWN_ORDERS:
            self._orders.clear()
        last = len(self.names)
        return tuple(sorted(given, key=lambda name: (self._position.get(name, last), name)))

    def signature(self, bound: Mapping[str, Any]) -> tuple[tuple[Hashable, ...], list[torch.Tensor]]:
        """The key under which a capture is valid, and the tensor leaves in order.

        The key holds the tree, each tensor's shape, dtype, device and need of a gradient, and every other
        leaf's value. A number that tells the time is a tensor, since it is another one at each step.
        """
        signer = _Signer(self.roles)
        signer.sign(bound)
        if signer.doubtful:
            numbers = self.numbers(bound)
            if numbers:
                signer = _Signer(self.roles, {path: self._as_tensor(n) for path, n in numbers.items()})
                signer.sign(bound)
        return tuple(signer.key), signer.tensors

    def numbers(self, bound: Mapping[str, Any]) -> dict[str, float]:
        """The numbers that tell the time, by their paths."""
        times = find_times(bound, self.roles)
        return {place.path: place.value for place in times if not place.is_tensor}

    def _as_tensor(self, number: float) -> torch.Tensor:
        """A number as PyTorch computes with it; the same object for the same number."""
        known = self._numbers.get((type(number), number))
        if known is None:
            if len(self._numbers) >= _KNOWN_NUMBERS:
                self._numbers.clear()
            dtype = torch.int64 if isinstance(number, int) else torch.float64
            with torch.inference_mode(False):
                known = self._numbers[type(number), number] = torch.tensor(number, dtype=dtype, device="cpu")
        return known


@dataclass
class _Signer:
    """Makes a signature; `numbers` are the tensors in the place of numbers, by path.

    It is `doubtful` whether other numbers tell the time; `around` are the objects that it is within.
    """

    roles: Names
    numbers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    key: list[Hashable] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    doubtful: bool = False
    around: list[int] = field(default_factory=list)

    def sign(self, bound: Mapping[str, Any]) -> None:
        for name, value in bound.items():
            self.key.append(name)
            self._sign(value, name)

    def _sign(self, value: Any, where: str) -> None:
        key = self.key
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            key.append((value.shape, value.dtype, value.device, value.requires_grad))
        elif isinstance(value, _BY_VALUE):
            self._sign_value(value, where)
        elif isinstance(value, (list, tuple)):
            key.append((value.__class__, len(value)))
            for i, item in enumerate(value):
                self._sign(item, f"{where}[{i}]")
        elif isinstance(value, dict) and (value.__class__ is dict or not is_record(value)):
            key.append((dict, tuple(value)))
            for name, item in value.items():
                self._sign(item, f"{where}.{name}")
        elif isinstance(value, _BY_IDENTITY):
            key.append(value)
        elif is_record(value):
            self._sign_record(value, where)
        else:
            raise CaptureError(
                f"argument {where} is a {type(value).__name__}, whose value cannot be compared between "
                "calls; pass tensors, numbers, strings, lists, dicts or objects of them. If it is a "
                f"cache of keys and values, {INSTEAD_OF_A_CACHE}"
            )

    def _sign_record(self, value: Any, where: str) -> None:
        if id(value) in self.around:
            raise CaptureError(f"argument {where} is within itself; pass its tensors without what leads back")
        fields = fields_of(value)
        self.key.append((value.__class__, tuple(fields)))
        self.around.append(id(value))
        for name, item in fields.items():
            self._sign(item, f"{where}.{name}")
        self.around.pop()

    def _sign_value(self, value: Any, where: str) -> None:
        if where in self.numbers:
            self.tensors.append(self.numbers[where])
            self.key.append(("number", value.__class__))
            return
        if isinstance(value, (int, float)) and value.__class__ is not bool:
            self.doubtful = self.doubtful or may_be_time(where, self.roles)
        self.key.append((value.__class__, value))


@dataclass(frozen=True)
class CallSpec:
    """How flat tensors make up a call's arguments: rebuilt once, at capture."""

    template: dict[str, Any]
    positional_only: frozenset[str]
    leaf_names: tuple[str, ...]
    latents: tuple[int, ...]
    times: tuple[int, ...]
    numbers: tuple[int, ...] = ()

    @staticmethod
    def of(binder: Binder, bound: Mapping[str, Any]) -> "CallSpec":
        """Describe one call: `times` tell when it is, `numbers` are leaves that the caller gives as numbers.

        Raises:
            CaptureError: nothing looks like latents, or what was named is not there.
        """
        times = find_times(bound, binder.roles)
        latents = find_latents(bound, times, binder.roles)
        names: list[str] = []
        numbers = frozenset(place.path for place in times if not place.is_tensor)
        template = {name: strip(value, name, names, numbers) for name, value in bound.items()}

        def leaves(places: Sequence[Argument]) -> tuple[int, ...]:
            return tuple([names.index(place.path) for place in places])

        only_numbers = [place for place in times if not place.is_tensor]
        positional_only = frozenset(binder.positional_only)
        return CallSpec(
            template, positional_only, tuple(names), leaves(latents), leaves(times), leaves(only_numbers)
        )

    def timestep(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """What tells the step, if anything does."""
        return tensors[self.times[0]] if self.times else None

    def given_latents(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple([tensors[index] for index in self.latents])

    def latent_argument(self, tensors: Sequence[torch.Tensor], purpose: str) -> str:
        """The argument that holds the latents: one floating-point tensor, or a list with one a sample.

        Raises:
            CaptureError: they are something else; `purpose` says what needs that.
        """
        names = [self.leaf_names[index] for index in self.latents]
        owner = names[0].partition("[")[0]
        held = self.template.get(owner)
        listed = isinstance(held, (list, tuple)) and len(held) == len(names)
        shapes = {tensors[index].shape for index in self.latents}
        if names != ([f"{owner}[{i}]" for i in range(len(names))] if listed else [owner]) or len(shapes) > 1:
            raise CaptureError(
                f"{purpose} needs latents that are one tensor, and an argument of forward, or a list of "
                f"tensors, one a sample and all alike; this model takes {', '.join(names)}: wrap it in a "
                "module that takes one tensor and cuts it up"
            )
        if not tensors[self.latents[0]].is_floating_point():
            raise CaptureError(
                f"{purpose} needs latents with gradients, and {names[0]} holds whole numbers; use a preset, "
                "or a plan written by hand"
            )
        return owner

    @cached_property
    def _varying(self) -> frozenset[int]:
        return frozenset((*self.latents, *self.times))

    def constants(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The inputs that a generation is expected to keep."""
        varies = self._varying
        return tuple([tensor for index, tensor in enumerate(tensors) if index not in varies])

    def kind(self, index: int) -> InputKind:
        if index in self.latents:
            return "latent"
        return "timestep" if index in self.times else "constant"

    def ports(self) -> tuple[Input, ...]:
        """The inputs of a graph of this call."""
        return tuple([Input(self.kind(index), index, name) for index, name in enumerate(self.leaf_names)])

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled = {name: fill(value, tensors) for name, value in self.template.items()}
        args = tuple(filled.pop(name) for name in list(filled) if name in self.positional_only)
        return args, filled

    def run(self, model: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> tuple[Any, Taken]:
        """The model's result for these leaves, and what the call has taken out of its arguments.

        Raises:
            CaptureError: the call has put something into one of its arguments.
        """
        given, named = self.arguments(tensors)
        result = model(*given, **named)
        before, named_before = self.arguments(tensors)
        positional = [name for name in self.template if name in self.positional_only]
        old = {**dict(zip(positional, before, strict=True)), **named_before}
        new = {**dict(zip(positional, given, strict=True)), **named}
        found = [taken(name, old[name], new[name], (name,)) for name in old]
        return result, tuple(itertools.chain.from_iterable(found))


@dataclass(frozen=True)
class OutputSpec:
    """The structure of a model's result: tuples, dicts and dataclasses such as diffusers' outputs.

    `taken` is what the model takes out of its arguments.
    """

    count: int
    build: Callable[[Sequence[torch.Tensor]], Any]
    taken: Taken = ()

    @staticmethod
    def of(result: Any, taken: Taken = ()) -> tuple["OutputSpec", tuple[torch.Tensor, ...]]:
        """Take a result apart.

        Raises:
            CaptureError: it has no tensor, or an object in it that a graph cannot make anew at each step.
        """
        leaves: list[torch.Tensor] = []
        build = _builder(result, leaves, "the model's result")
        if not leaves:
            raise CaptureError(f"the model returned {type(result).__name__} without a tensor in it")
        return OutputSpec(len(leaves), build, taken), tuple(leaves)


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
    if is_record(value):
        kind = type(value)
        held = {name: _builder(item, leaves, f"{where}.{name}") for name, item in fields_of(value).items()}
        return lambda tensors: made_anew(kind, {name: part(tensors) for name, part in held.items()})
    if not isinstance(value, _PLAIN):
        raise CaptureError(
            f"{where} is a {type(value).__name__}, of which a graph could only hand out the first step's at "
            f"every step; {INSTEAD_OF_A_CACHE}"
        )
    return lambda tensors: value
