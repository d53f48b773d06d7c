"""Tensors made in inference mode, which cannot be traced, behind others that can and share their memory."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from graphcache.tracing.keepers import Entries, Items, Keeper


class Originals:
    """Stands plain tensors in for inference tensors, and knows which one stands for which."""

    def __init__(self) -> None:
        self._plain: dict[int, torch.Tensor] = {}
        self._original: dict[int, torch.Tensor] = {}

    def of(self, tensor: Any) -> Any:
        """What a plain tensor stands for; anything else itself."""
        return self._original.get(id(tensor), tensor)

    def plain(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that can be traced, of the same values; one and the same for the same tensor."""
        if not _is_unfit(tensor):
            return tensor
        if id(tensor) not in self._plain:
            made = _alias(tensor)
            self._plain[id(tensor)] = made
            self._original[id(made)] = tensor
        return self._plain[id(tensor)]

    @contextlib.contextmanager
    def hidden(self, keepers: Iterable[Keeper]) -> Iterator[None]:
        """Let plain tensors stand in wherever these things hold an inference tensor."""
        hidden = [(live, key, self.plain(value)) for live, key, value in _unfit(keepers)]
        for live, key, made in hidden:
            _set(live, key, made)
        try:
            yield
        finally:
            for live, key, made in hidden:
                if _get(live, key) is made:
                    _set(live, key, self.of(made))


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        made.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, tensor.requires_grad)
        return made


def _is_unfit(value: Any) -> bool:
    # what a subclass adds, such as a quantized weight's scales, would be lost
    return type(value) in (torch.Tensor, nn.Parameter) and value.is_inference()


def _unfit(keepers: Iterable[Keeper]) -> Iterator[tuple[Any, Any, torch.Tensor]]:
    for keeper in keepers:
        if isinstance(keeper, Entries):
            named: Iterable[tuple[Any, Any]] = dict.items(keeper.live)
        elif isinstance(keeper, Items) and isinstance(keeper.live, list):
            named = enumerate(keeper.live)
        else:
            continue
        yield from ((keeper.live, key, value) for key, value in named if _is_unfit(value))


def _set(live: Any, key: Any, value: Any) -> None:
    (list if isinstance(live, list) else dict).__setitem__(live, key, value)


def _get(live: Any, key: Any) -> Any:
    if isinstance(live, list):
        return live[key] if key < len(live) else None
    return dict.get(live, key)
