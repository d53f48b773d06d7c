"""A module that is called in the middle of a graph."""

import contextlib
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.ir.errors import CaptureError
from graphcache.ir.opaque import Opaque, describe_layouts
from graphcache.ir.tree import Leaf, Record, fields_of, fill, is_record, sequence_of
from graphcache.ir.versions import memory
from graphcache.libraries.torch_private import FakeTensor, FunctionalTensor, is_traceable_wrapper_subclass

_STILL = (type(None), str, bytes, torch.dtype, torch.device, enum.Enum, type)
"""What may stand beside the tensors of a result; a number may depend on values."""
PLAIN = (*_STILL, bool, int, float, complex, slice, range, torch.memory_format, torch.layout)
"""What may stand beside the tensors of the arguments."""


Autocast = tuple[str, bool, torch.dtype]
"""A kind of device, whether autocast is on there, and to which dtype it casts."""


class Unfit(Exception):
    """A module cannot be called by itself in a graph; one around it may."""


@dataclass(frozen=True)
class Invocation:
    """A module with its arguments, in which leaves stand for tensors, and the autocast around its call."""

    module: nn.Module
    template: Any
    kinds: tuple[tuple[Any, ...], ...]
    autocast: tuple[Autocast, ...]

    @staticmethod
    def of(module: nn.Module, args: Any, kwargs: Any) -> tuple["Invocation", list[Tensor]]:
        """A call and its tensors.

        Raises:
            Unfit: its arguments are no trees of tensors.
        """
        tensors: list[Tensor] = []
        template = _apart((args, kwargs), tensors, PLAIN, "is given")
        if not tensors:
            raise Unfit("is given no tensor")
        kinds = {"cpu", *(tensor.device.type for tensor in (*tensors, *module.parameters()))} - {"meta"}
        autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        return Invocation(module, template, tuple(map(kind_of, tensors)), tuple(autocast)), tensors

    def is_like(self, other: "Invocation") -> bool:
        """Whether both are given the same but for the tensors' values."""
        return self.kinds == other.kinds and bool(self.template == other.template)

    def run(self, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """The module's result for other tensors, taken apart.

        Raises:
            Unfit: it is no tree of tensors.
        """
        args, kwargs = fill(self.template, tensors)
        if all(map(_is_now, self.autocast)):
            return taken_apart(self.module.forward(*args, **kwargs))
        with contextlib.ExitStack() as stack:
            # compiled code is run without autocast, its casts are in it
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            return taken_apart(self.module.forward(*args, **kwargs))


@dataclass(frozen=True, eq=False, kw_only=True)
class OpaqueCall(Opaque):
    """One call of a module, and what it returned at capture.

    `kept` are results in memory that the module holds on to; `weights` the names of its parameters that need
    gradients.
    """

    invocation: Invocation
    template: Any
    layouts: tuple[Any, ...]
    kept: frozenset[int]
    weights: tuple[str, ...]

    @property
    def key(self) -> str:
        called = self.invocation
        shaped = called.template, called.kinds, called.autocast, self.template, self.layouts
        return repr((id(self.module), shaped, sorted(self.kept), self.weights))

    def trained(self) -> list[Tensor]:
        """The module's parameters that need gradients."""
        return [self.module.get_parameter(name) for name in self.weights]

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The module's results for these inputs, laid as at capture and each in memory of its own.

        Raises:
            CaptureError: they are not such as at capture.
        """
        try:
            template, leaves = self.invocation.run(tensors)
        except Unfit as error:
            raise self._other(str(error)) from error
        if template != self.template or [*map(kind_of, leaves)] != [kind[:3] for kind in self.layouts]:
            raise self._other(f"returns {describe_layouts(leaves)}")
        seen = set(map(memory, tensors))
        for index, (leaf, (_, _, shape, strides)) in enumerate(zip(leaves, self.layouts, strict=True)):
            place = memory(leaf)
            if leaf.stride() != strides or index in self.kept or place in seen:
                made = torch.empty_strided(shape, strides, dtype=leaf.dtype, device=leaf.device)
                leaves[index] = made.copy_(leaf)
            seen.add(place)
        return leaves

    def _other(self, does: str) -> CaptureError:
        return CaptureError(
            f"{named(self.place)}, which is called because it cannot be traced, {does} where it returned "
            f"{self.described} at capture: let it return tensors whose sizes follow from those of its inputs"
        )


def taken_apart(result: Any) -> tuple[Any, list[Tensor]]:
    """A result with leaves in the place of its tensors, and these.

    Raises:
        Unfit: there is something else in it, or no tensor.
    """
    leaves: list[Tensor] = []
    template = _apart(result, leaves, _STILL, "returns")
    if not leaves:
        raise Unfit("returns no tensor")
    return template, leaves


def _apart(value: Any, leaves: list[Tensor], plain: tuple[type, ...], does: str) -> Any:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or is_foreign(value):
            raise Unfit(f"{does} a {type(value).__name__} that is no plain tensor")
        leaves.append(value)
        return Leaf(len(leaves) - 1)
    if isinstance(value, (list, tuple)):
        return sequence_of(type(value), [_apart(item, leaves, plain, does) for item in value])
    if type(value) is dict:
        return {key: _apart(item, leaves, plain, does) for key, item in value.items()}
    if is_record(value):
        fields = fields_of(value).items()
        return Record(type(value), {key: _apart(item, leaves, plain, does) for key, item in fields})
    if isinstance(value, plain):
        return value
    raise Unfit(f"{does} a {type(value).__name__} besides tensors")


def is_foreign(tensor: Tensor) -> bool:
    """Whether tracing would lose what a subclass adds to the numbers, such as how they are packed."""
    kind = type(tensor)
    if kind in (Tensor, nn.Parameter) or isinstance(tensor, (FakeTensor, FunctionalTensor)):
        return False
    if is_traceable_wrapper_subclass(tensor):
        return False
    defines = any("__torch_function__" in vars(base) for base in kind.__mro__[: kind.__mro__.index(Tensor)])
    return defines or bool(vars(tensor))


def _is_now(autocast: Autocast) -> bool:
    kind, enabled, dtype = autocast
    return torch.is_autocast_enabled(kind) == enabled and torch.get_autocast_dtype(kind) == dtype


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """Dtype, device and shape."""
    return tensor.dtype, tensor.device, tensor.shape


def named(place: str) -> str:
    """A module in a sentence."""
    return f"module '{place}'"
