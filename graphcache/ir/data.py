"""What files hold of arguments, results and graphs: leaves and plain values in lists, tuples and dicts, of
nobody's classes, and tensors without their values.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch

from graphcache.ir.errors import CaptureError, GraphCacheError
from graphcache.ir.tree import Leaf, Record, fields_of, is_record

_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
"""What PyTorch has a name for."""


class TensorLine(msgspec.Struct, frozen=True):
    """A tensor without its values."""

    dtype: str
    shape: list[int]
    stride: list[int]
    device: str

    @staticmethod
    def of(tensor: torch.Tensor) -> "TensorLine":
        return TensorLine(dtype_name(tensor.dtype), [*tensor.shape], [*tensor.stride()], str(tensor.device))

    def empty(self) -> torch.Tensor:
        """One such tensor, with any values."""
        return torch.empty_strided(self.shape, self.stride, dtype=dtype_named(self.dtype), device=self.device)

    def laid(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with this layout: itself, if it has it; strides of dimensions of one entry are no matter.

        Raises:
            GraphCacheError: it has another shape, dtype or device.
        """
        given = TensorLine.of(tensor)
        if given == self:
            return tensor
        if (given.dtype, given.shape, given.device) != (self.dtype, self.shape, self.device):
            raise GraphCacheError(
                f"native code for {self} on {self.device} was given {given} on {given.device}; package the "
                "model again"
            )
        strides = zip(self.shape, self.stride, given.stride, strict=True)
        if all(size == 1 or ours == theirs for size, ours, theirs in strides) or not tensor.numel():
            return tensor
        return self.empty().copy_(tensor)

    def weightless(self) -> torch.Tensor:
        """A tensor of this shape, dtype and device that takes no memory."""
        return torch.empty((), dtype=dtype_named(self.dtype), device=self.device).expand(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}({', '.join(map(str, self.shape))})"


class Result:
    """What a model returned as an object of a class of its own: by attribute, by name or by place."""

    def __getitem__(self, key: Any) -> Any:
        held = vars(self)
        return [*held.values()][key] if isinstance(key, (int, slice)) else held[key]

    def __repr__(self) -> str:
        return f"Result({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def described(value: Any, where: str) -> Any:
    """A tree as what JSON can hold.

    Raises:
        CaptureError: there is something else in it than leaves, plain values, lists, tuples and dicts.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Leaf):
        return {"leaf": value.index}
    if isinstance(value, int) and type(value) is int:
        return {"int": str(value)}
    if isinstance(value, float) and type(value) is float:
        return {"float": value.hex()}
    if isinstance(value, _CONSTANTS):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, Mapping):
        return {"dict": _pairs(value, where)}
    if type(value) in (list, tuple):
        items = [described(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return {type(value).__name__: items}
    raise CaptureError(
        f"{where} is a {type(value).__name__}, which a package cannot hold: it takes tensors, numbers, "
        "strings, lists, tuples and dicts of them; wrap the model in a module that takes and returns these"
    )


def _pairs(items: Mapping[Any, Any], where: str) -> list[Any]:
    return [[described(key, where), described(item, f"{where}.{key}")] for key, item in items.items()]


def described_result(value: Any, leaves: Mapping[int, int]) -> Any:
    """A model's result; `leaves` are the places of its tensors, by identity.

    Objects become a `Result` each, in which what they hold is found as in them.
    """
    if isinstance(value, torch.Tensor):
        return {"leaf": leaves[id(value)]}
    held = _held(value)
    if held is not None:
        return {"record": [[name, described_result(item, leaves)] for name, item in held.items()]}
    if isinstance(value, Mapping):
        entries = value.items()
        return {"dict": [[described(key, "result"), described_result(v, leaves)] for key, v in entries]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [described_result(item, leaves) for item in value]}
    return described(value, "the model's result")


def _held(value: Any) -> dict[str, Any] | None:
    """What an object of a class of its own holds, by name; None of anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return fields_of(value) if is_record(value) else None


def tree(data: Any) -> Any:
    """What was described, to be filled in."""
    if not isinstance(data, dict):
        return data
    (kind, value), *_ = data.items()
    if kind == "leaf":
        return Leaf(value)
    if kind in ("list", "tuple"):
        items = [tree(item) for item in value]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {tree(key): tree(item) for key, item in value}
    if kind == "record":
        return Record(Result, {name: tree(item) for name, item in value})
    if kind == "device":
        return torch.device(value)
    plain: dict[str, Callable[[str], Any]] = {"int": int, "float": float.fromhex}
    return plain[kind](value) if kind in plain else _constant(kind, value)


def _constant(kind: str, name: str) -> Any:
    """`float32` as PyTorch has it.

    Raises:
        ValueError: it has no such.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, _CONSTANTS) or type(found).__name__ != kind:
        raise ValueError(f"PyTorch has no {kind} {name!r}")
    return found


def dtype_named(name: str) -> torch.dtype:
    """`float32` as PyTorch has it."""
    found: torch.dtype = _constant("dtype", name)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
