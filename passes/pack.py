"""Cache entries of three bytes an element: a value in bfloat16, its difference to the last in 8 bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphcache.ir.graph import CacheRead, fake_mode, value_of
from graphcache.passes.rewrite import Rewriter, wider

aten = torch.ops.aten

LEVELS = 127.0
"""The largest magnitude of a difference in steps of its token's scale."""
SMALLEST = 1e-30


@dataclass
class Packed:
    """How a value's entry is made and read in a graph; `made` collects the nodes that read it on."""

    rewriter: Rewriter
    raw: fx.Node
    made: set[fx.Node]

    def __post_init__(self) -> None:
        self.last = self.raw
        self.wide = wider(value_of(self.raw).dtype)

    def pack(self, before: CacheRead) -> list[fx.Node]:
        """Value, difference and scale of the newest entry; `before` is the value of the one it follows."""
        value = self._emit(aten._to_copy.default, self._dense(self.raw), dtype=torch.bfloat16)
        difference = self._emit(
            aten.sub.Tensor, self._widened(self.raw), self._widened(self._read(before, value))
        )
        largest = self._emit(aten.amax.default, self._emit(aten.abs.default, difference), [-1], True)
        scale = self._emit(aten.div.Tensor, self._emit(aten.clamp_min.default, largest, SMALLEST), LEVELS)
        levels = self._emit(aten.round.default, self._emit(aten.div.Tensor, difference, scale))
        packed = self._emit(aten._to_copy.default, self._dense(levels), dtype=torch.int8)
        return [value, packed, self._dense(scale)]

    def unpack(self, ports: Sequence[CacheRead], group: int) -> fx.Node:
        """The value, extrapolated along the difference where a group weighs it."""
        total = value = self._widened(self._read(ports[0], self.raw, torch.bfloat16))
        if group >= 0:
            weights = self.rewriter.coefficients(self.raw, 1, group)
            scale = self._read(ports[2], self.raw, self.wide, tokens=True)
            step = self._emit(
                aten.mul.Tensor, self._widened(self._read(ports[1], self.raw, torch.int8)), scale
            )
            step = self._emit(aten.mul.Tensor, step, self._emit(aten.select.int, weights, 0, 0))
            total = self._emit(aten.add.Tensor, value, step)
        dtype = value_of(self.raw).dtype
        return total if dtype == self.wide else self._emit(aten._to_copy.default, total, dtype=dtype)

    def _read(
        self, port: CacheRead, like: fx.Node, dtype: torch.dtype | None = None, tokens: bool = False
    ) -> fx.Node:
        value = value_of(like)
        shape = (*value.shape[:-1], 1) if tokens else value.shape
        with fake_mode(value):
            empty = torch.empty(shape, dtype=dtype or value.dtype, device=value.device)
        return self.rewriter.placeholder(port, empty)

    def _widened(self, node: fx.Node) -> fx.Node:
        if value_of(node).dtype == self.wide:
            return node
        return self._emit(aten._to_copy.default, node, dtype=self.wide)

    def _dense(self, node: fx.Node) -> fx.Node:
        return self._emit(aten.clone.default, node, memory_format=torch.contiguous_format)

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        self.last = self.rewriter.emit(self.last, target, *args, **kwargs)
        self.made.add(self.last)
        return self.last
