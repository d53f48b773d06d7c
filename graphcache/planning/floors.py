"""The least time in which a device can run a graph: by what it must compute, and by what it must move."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer

from graphcache.analysis.cost import graph_flops
from graphcache.compiler.flat import weights_of
from graphcache.ir.graph import StepGraph, has_static_shape, storage_bytes, value_of

_WIDTH = 2048
"""Rows and columns of the matrices that are multiplied."""
_COPIED = 2**27
"""Bytes of the tensor that is copied."""


@dataclass(frozen=True)
class Rates:
    """What a device was seen to reach: FLOPs a second in a product of matrices, bytes a second in a copy."""

    flops: float
    bytes: float

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype) -> "Rates":
        """Measured now, in about a second."""
        first, second = (torch.randn(_WIDTH, _WIDTH, device=device).to(dtype) for _ in range(2))
        source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        product = _seconds("first @ second", first=first, second=second)
        copy = _seconds("target.copy_(source)", target=target, source=source)
        return Rates(2 * _WIDTH**3 / product, 2 * _COPIED / copy)


def _seconds(statement: str, **values: Any) -> float:
    timer = Timer(statement, globals=values, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=0.3).median)


@dataclass(frozen=True)
class Floor:
    """Milliseconds for the FLOPs of a graph's products, and for reading its weights and inputs and writing
    its results once each.
    """

    flops_ms: float
    bytes_ms: float

    @staticmethod
    def of(step: StepGraph, rates: Rates) -> "Floor":
        nodes = filter(has_static_shape, (*step.placeholders(), *step.results()))
        size = sum(map(storage_bytes, (*map(value_of, nodes), *weights_of(step).values())))
        return Floor(1e3 * graph_flops(step) / rates.flops, 1e3 * size / rates.bytes)

    @property
    def ms(self) -> float:
        """The larger of the two."""
        return max(self.flops_ms, self.bytes_ms)
