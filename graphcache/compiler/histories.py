"""What histories hold: entries of one shape and dtype, whichever phase stores and whichever reads them."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from graphcache.compiler.phase_code import Runnable
from graphcache.ir.errors import GraphCacheError, StateError
from graphcache.ir.graph import CacheRead, CacheWrite, StepGraph, may_be_same_sizes, value_of
from graphcache.ir.history import History
from graphcache.ir.state import CacheState
from graphcache.ir.text import describe


def entries(phases: Iterable[StepGraph]) -> Mapping[History, Sequence[torch.Tensor]]:
    """One entry of every history that these phases store, as fake tensors.

    Raises:
        GraphCacheError: what phases store or read under one name differs in shape or dtype.
    """
    steps = list(phases)
    found: dict[tuple[History, int], torch.Tensor] = {}
    for step in steps:
        for port, node in zip(step.outputs, step.results(), strict=True):
            if isinstance(port, CacheWrite):
                _agree(port, found.setdefault((port.history, port.part), value_of(node)), value_of(node))
    for step in steps:
        for read, node in step.ports():
            if isinstance(read, CacheRead) and (read.history, read.part) in found:
                _agree(read, found[read.history, read.part], value_of(node))
    parts: dict[History, dict[int, torch.Tensor]] = {}
    for (history, part), value in found.items():
        parts.setdefault(history, {})[part] = value
    return {history: [values[part] for part in sorted(values)] for history, values in parts.items()}


def refuse_others(cache: CacheState, phase: Runnable) -> None:
    """Raise StateError if what is cached is not what a phase was made to read."""
    for port in phase.step.inputs:
        if not isinstance(port, CacheRead):
            continue
        for entry in cache.entries.get(port.history, ())[port.entry : port.entry + 1]:
            if not phase.takes(port, entry[port.part]):
                raise StateError(
                    f"{port.history}: {describe(entry[port.part])} is cached, and this step reads another "
                    "shape or dtype; call reset(), and report this as a fault of graphcache"
                )


def _agree(port: CacheRead | CacheWrite, known: torch.Tensor, value: torch.Tensor) -> None:
    if known.dtype != value.dtype or not may_be_same_sizes(known.shape, value.shape):
        raise GraphCacheError(
            f"{port}: {describe(value)} in one phase of the plan and {describe(known)} in another; report "
            "this as a fault of graphcache"
        )
