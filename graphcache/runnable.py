"""A graph that can be called, and what its ports are fed."""

import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from graphcache.analysis.cost import computed_bytes, graph_flops
from graphcache.analysis.frequency import basis, disc
from graphcache.compile import Compiled
from graphcache.halves import Half
from graphcache.ir.graph import CacheRead, CacheWrite, Coefficients, InPort, StepGraph, Table, value_of


class _Kind(NamedTuple):
    """Of tensors that a port is fed."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Runnable:
    """A callable graph and where its inputs come from."""

    step: StepGraph
    call: Compiled
    half: Half | None = None
    _coefficients: dict[tuple[int, tuple[float, ...]], torch.Tensor] = field(init=False, default_factory=dict)
    _kinds: dict[InPort, _Kind] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        # a fake tensor tells another device while some other thread computes with one of its kind
        for port, node in self.step.ports():
            value = value_of(node)
            self._kinds[port] = _Kind(value.shape, value.dtype, value.device)

    @cached_property
    def tables(self) -> dict[Table, torch.Tensor]:
        """The constants that the graph reads."""
        made = {}
        for port, kind in self._kinds.items():
            if isinstance(port, Table):
                table = basis(port.size, port.radius) if port.kind == "basis" else disc(port.radius)
                made[port] = table.to(kind.device, kind.dtype)
        return made

    @cached_property
    def places(self) -> tuple[tuple[InPort, tuple[str, int, int]], ...]:
        """The input ports; those that read a history with its site, entry and part, others with no site.

        Entries that are changed in place are looked up with care: none of them is in its history's place.
        """
        return tuple((port, _place(port)) for port in self.step.inputs)

    def blank(self, port: CacheRead) -> torch.Tensor:
        """What is read where nothing was stored yet."""
        kind = self._kinds[port]
        return torch.zeros(kind.shape, dtype=kind.dtype, device=kind.device)

    @cached_property
    def flops(self) -> int:
        """Of one run."""
        return graph_flops(self.step)

    @cached_property
    def computed_bytes(self) -> int:
        """About what holding a run for its gradients takes."""
        return computed_bytes(self.step)

    @cached_property
    def stored(self) -> tuple[tuple[str, int], ...]:
        """(site, number of parts) in the order in which the stores follow the results."""
        parts: dict[str, int] = {}
        for port in self.step.outputs:
            if isinstance(port, CacheWrite):
                parts[port.site] = parts.get(port.site, 0) + 1
        return tuple(parts.items())

    def coefficients(self, group: int, values: tuple[float, ...]) -> torch.Tensor:
        """The coefficients as a tensor; made once, so that later generations copy nothing to the device."""
        made = self._coefficients.get((group, values))
        if made is None:
            kind = self._kinds[Coefficients(group)]
            made = torch.tensor(values, dtype=kind.dtype, device=kind.device)
            self._coefficients[group, values] = made
        return made


def _place(port: InPort) -> tuple[str, int, int]:
    if not isinstance(port, CacheRead):
        return "", 0, 0
    return port.site, sys.maxsize if port.changed else port.entry, port.part
