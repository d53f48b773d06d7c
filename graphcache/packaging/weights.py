"""A model's weights, each stored once, by the names that it has for them."""

import torch
from torch import nn

from graphcache.ir.data import TensorLine
from graphcache.ir.errors import CaptureError
from graphcache.packaging.manifest import WeightLine


class Stored:
    """The tensors of a package; `lines` says where each name's values are."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.lines: dict[str, WeightLine] = {}
        self._names: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []
        self._memory: dict[tuple[object, ...], str] = {}
        saved = model.state_dict(keep_vars=True)
        for name, weight in model.named_parameters(remove_duplicate=False):
            self._add(name, weight, "parameter")
        for name, buffer in model.named_buffers(remove_duplicate=False):
            self._add(name, buffer, "buffer" if name in saved else "unsaved")

    def name(self, weight: torch.Tensor) -> str:
        """What a weight of a graph is called; one that the model does not name is stored beside."""
        key = _place(weight)
        if key not in self._memory:
            self._add(f"constant {len(self.lines)}", weight, "constant")
        return self._memory[key]

    def _add(self, name: str, weight: torch.Tensor, kind: str) -> None:
        if type(weight.detach()) is not torch.Tensor:
            raise CaptureError(
                f"{name} is a {type(weight).__name__}, and a package holds plain tensors: use the model with "
                "transform(...)"
            )
        if weight.is_meta:
            raise CaptureError(
                f"{name} is kept elsewhere, as by offloading, and a package holds all weights: take "
                "offloading off the model before it is packaged"
            )
        first = self._memory.setdefault(_place(weight), name)
        if first == name:
            self.tensors[name] = weight.detach().to("cpu", copy=True).contiguous()
        self._kept.append(weight)  # no address is used twice
        self.lines[name] = WeightLine(first, TensorLine.of(weight), kind)


def _place(weight: torch.Tensor) -> tuple[object, ...]:
    """The same for tensors that are one: memory, dtype, shape and strides."""
    return weight.data_ptr(), weight.dtype, weight.device, weight.shape, weight.stride()
