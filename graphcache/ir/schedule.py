"""A plan after lowering: few phases, and for every step which of them runs on what."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Kind = Literal["compute", "correct", "reuse", "forecast", "hold"]


@dataclass(frozen=True, slots=True)
class Action:
    """What a phase does to one site.

    `reads` history entries are loaded, combined by the coefficients of `group` (-1: the newest as it
    is); `stores` hands the raw value out. `hold` leaves the site alone: a range around it is reused.
    """

    kind: Kind
    reads: int = 0
    group: int = -1
    stores: bool = False

    def __str__(self) -> str:
        text: str = self.kind
        if self.reads:
            text += f" reads {self.reads}"
        if self.group >= 0:
            text += f" by {self.group}"
        return text + (" stores" if self.stores else "")


@dataclass(frozen=True)
class Phase:
    """A distinct column of the lowered plan: one specialised graph."""

    actions: tuple[tuple[str, Action], ...]


@dataclass(frozen=True)
class Step:
    """One step: its phase, the coefficients of each group, and the entries of each site live after it."""

    phase: int
    coefficients: tuple[tuple[float, ...], ...]
    keep: Mapping[str, int]


@dataclass(frozen=True)
class Schedule:
    """Phases, steps, and the ranges (name, first block, last block) that the phases speak of."""

    phases: tuple[Phase, ...]
    steps: tuple[Step, ...]
    ranges: tuple[tuple[str, int, int], ...]

    @cached_property
    def stores(self) -> tuple[frozenset[str], ...]:
        """Sites that each phase stores."""
        return tuple(frozenset(name for name, act in phase.actions if act.stores) for phase in self.phases)

    def is_skipped(self, phase: Phase, block: int) -> bool:
        """Whether a block lies within a range, or the output, that the phase takes from the cache."""
        taken = {name for name, action in phase.actions if action.kind in ("reuse", "forecast")}
        inside = (name for name, first, last in self.ranges if first <= block <= last)
        return "output" in taken or not taken.isdisjoint(inside)

    def held(self, step: int, size: Mapping[str, int]) -> int:
        """Bytes that the state holds after a step, given the bytes of one entry of each site."""
        return sum(size[name] * count for name, count in self.steps[step].keep.items())

    def peak(self, size: Mapping[str, int]) -> int:
        """The most bytes held at any time: what a step found, and beside it what it stored."""
        most = before = 0
        for index, step in enumerate(self.steps):
            stored = sum(size[name] for name in self.stores[step.phase])
            most = max(most, before + stored)
            before = self.held(index, size)
        return most

    def __str__(self) -> str:
        lines = []
        for index, phase in enumerate(self.phases):
            steps = [str(i) for i, step in enumerate(self.steps) if step.phase == index]
            lines.append(f"phase {index}: steps {' '.join(steps)}")
            lines += [f"  {name}: {action}" for name, action in phase.actions]
        return "\n".join(lines)
