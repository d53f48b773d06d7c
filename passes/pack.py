"""Cache entries of three bytes an element: a value in bfloat16, its difference to the last in 8 bits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from graphcache.ir.graph import CacheRead, value_of
from graphcache.libraries.torch_private import TO_COPY
from graphcache.passes.rewrite import Chain, wider

aten = torch.ops.aten

LEVELS = 127.0
"""The largest magnitude of a difference in steps of its token's scale."""
SMALLEST = 1e-30


@dataclass
class Packed(Chain):
    """How a value's entry is made and read in a graph; begins at the raw value."""

    def __post_init__(self) -> None:
        self.raw = self.last
        self.value = value_of(self.raw)
        self.wide = wider(self.value.dtype)

    def pack(self, before: CacheRead) -> list[fx.Node]:
        """Value, difference and scale of the newest entry; `before` is the value of the one it follows."""
        value = self.emit(TO_COPY, self.copied(self.raw), dtype=torch.bfloat16)
        old = self.rewriter.input(replace(before, optional=True), self.value, dtype=torch.bfloat16)
        terms = self.cast(self.raw, self.wide), self.cast(old, self.wide)
        difference = self.emit(aten.sub.Tensor, *terms)
        largest = self.emit(aten.amax.default, self.emit(aten.abs.default, difference), [-1], True)
        scale = self.emit(aten.div.Tensor, self.emit(aten.clamp_min.default, largest, SMALLEST), LEVELS)
        levels = self.emit(aten.round.default, self.emit(aten.div.Tensor, difference, scale))
        packed = self.emit(TO_COPY, self.copied(levels), dtype=torch.int8)
        return [value, packed, self.copied(scale)]

    def unpack(self, ports: Sequence[CacheRead], group: int) -> fx.Node:
        """The value, extrapolated along the difference where a group weighs it."""
        newest = self.rewriter.input(ports[0], self.value, dtype=torch.bfloat16)
        total = self.cast(newest, self.wide)
        if group >= 0:
            weights = self.rewriter.coefficients(self.raw, 1, group)
            levels = self.rewriter.input(ports[1], self.value, dtype=torch.int8)
            tokens = (*self.value.shape[:-1], 1)
            scale = self.rewriter.input(ports[2], self.value, shape=tokens, dtype=self.wide)
            step = self.emit(aten.mul.Tensor, self.cast(levels, self.wide), scale)
            step = self.emit(aten.mul.Tensor, step, self.emit(aten.select.int, weights, 0, 0))
            total = self.emit(aten.add.Tensor, total, step)
        return self.cast(total, self.value.dtype)
