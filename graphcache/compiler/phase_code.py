"""A graph that can be called, and what its ports are fed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from graphcache.analysis.cost import computed_bytes, graph_flops
from graphcache.analysis.frequency import basis, disc
from graphcache.compiler.backends import Compiled
from graphcache.compiler.code import Built
from graphcache.compiler.guidance_half import Half
from graphcache.ir.graph import (
    CacheRead,
    CacheWrite,
    Chosen,
    Coefficients,
    InPort,
    StepGraph,
    Table,
    may_be_same_sizes,
    value_of,
)
from graphcache.ir.history import History


class _Kind(NamedTuple):
    """Of tensors that a port is fed."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Places:
    """Input ports by how they are looked up at every step.

    `reads` are those that take an entry of a history as it is, at (history, entry, part) in `entries`;
    `others` are the rest. `order` puts reads and others, one after the other, into the order of the ports; it
    is empty where they stand so.
    """

    reads: tuple[CacheRead, ...]
    entries: tuple[tuple[History, int, int], ...]
    others: tuple[InPort, ...]
    order: tuple[int, ...]

    @staticmethod
    def of(ports: Sequence[InPort]) -> "Places":
        reads = tuple(port for port in ports if isinstance(port, CacheRead) and not port.changed)
        others = tuple(port for port in ports if port not in set(reads))
        found = {port: i for i, port in enumerate((*reads, *others))}
        order = tuple(found[port] for port in ports)
        entries = tuple((port.history, port.entry, port.part) for port in reads)
        return Places(reads, entries, others, () if order == tuple(range(len(order))) else order)


@dataclass(frozen=True, eq=False)
class Runnable:
    """A callable graph and where its inputs come from."""

    step: StepGraph
    call: Compiled | Built
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
    def places(self) -> "Places":
        """Where each input port's tensor is found."""
        return Places.of(self.step.inputs)

    def takes(self, port: InPort, tensor: torch.Tensor) -> bool:
        """Whether a tensor has the shape and dtype that a port was made for."""
        kind = self._kinds[port]
        return tensor.dtype == kind.dtype and may_be_same_sizes(tensor.shape, kind.shape)

    def blank(self, port: CacheRead | Chosen) -> torch.Tensor:
        """What is read where nothing was stored yet."""
        kind = self._kinds[port]
        return torch.zeros(kind.shape, dtype=kind.dtype, device=kind.device)

    def announce(self) -> None:
        """Let what is compiled from now on serve this graph's sizes too, as far as it can."""
        if isinstance(self.call, Built):
            self.call.announce()

    @cached_property
    def flops(self) -> int:
        """Of one run."""
        return graph_flops(self.step)

    @cached_property
    def computed_bytes(self) -> int:
        """About what holding a run for its gradients takes."""
        return computed_bytes(self.step.calls())

    @cached_property
    def stored(self) -> tuple[tuple[History, int], ...]:
        """(history, number of parts) in the order in which the stores follow the results."""
        parts: dict[History, int] = {}
        for port in self.step.outputs:
            if isinstance(port, CacheWrite):
                parts[port.history] = parts.get(port.history, 0) + 1
        return tuple(parts.items())

    def coefficients(self, group: int, values: tuple[float, ...]) -> torch.Tensor:
        """The coefficients as a tensor; made once, so that later generations copy nothing to the device."""
        made = self._coefficients.get((group, values))
        if made is None:
            kind = self._kinds[Coefficients(group)]
            made = torch.tensor(values, dtype=kind.dtype, device=kind.device)
            self._coefficients[group, values] = made
        return made
