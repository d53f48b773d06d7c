"""What values look like at a size: operations are asked once, as blocks that are alike ask the same."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphcache.ir.graph import layout
from graphcache.libraries.torch_private import FakeTensorMode


class Descriptions:
    """Fake tensors, one for all values that look alike, and what operations give for them.

    They tell nothing of memory: values that share theirs may have one description, and so may others.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._tensors: dict[Any, torch.Tensor] = {}
        self._results: dict[Any, Any] = {}

    def tensor(self, real: torch.Tensor) -> torch.Tensor:
        """The description of a tensor that is there."""
        kind = _kind(real)
        if kind not in self._tensors:
            self._tensors[kind] = self._mode.from_tensor(real)
        return self._tensors[kind]

    def result(self, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What an operation gives for described tensors and numbers, under the mode."""
        asked = target, _key(args), _key(kwargs)
        if asked not in self._results:
            self._results[asked] = self._one_of_a_kind(target(*args, **kwargs))
        return self._results[asked]

    def _one_of_a_kind(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensors.setdefault(_kind(value), value)
        return type(value)(map(self._one_of_a_kind, value)) if isinstance(value, list | tuple) else value


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    bits = tensor.requires_grad, tensor.is_conj(), tensor.is_neg()
    place = tensor.storage_offset() if tensor.layout == torch.strided else None
    return issubclass(type(tensor), torch.nn.Parameter), *layout(tensor), place, *bits


def _key(value: Any) -> Any:
    """An argument as a key: a tensor by its one description, equal numbers of different types apart."""
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, Mapping):
        return tuple((name, _key(item)) for name, item in value.items())
    return type(value), value
