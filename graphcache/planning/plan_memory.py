"""What the calls of a step keep under a plan, before any of them runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.program import Program
from graphcache.ir.graph import storage_bytes, value_of
from graphcache.ir.plan import Plan
from graphcache.ir.schedule import Schedule
from graphcache.runtime.engine import Engine


@dataclass(frozen=True)
class Lowered:
    """A plan for the calls of one branch of guidance."""

    program: Program
    schedule: Schedule

    @property
    def phases(self) -> list[Runnable]:
        """The graph of every step, in order."""
        return [self.program.phase(self.schedule, step.phase) for step in self.schedule.steps]

    @property
    def hoisted(self) -> int:
        """Bytes of what is computed once per generation."""
        return hoisted_bytes(self.program)

    @property
    def peak(self) -> int:
        """The most bytes that its caches hold at any time."""
        return self.schedule.peak(self.program.entry_bytes(self.schedule))

    @property
    def stored(self) -> int:
        """Bytes of all entries that some later step reads, over the whole generation."""
        size, found = self.program.entry_bytes(self.schedule), 0
        for step in self.schedule.steps:
            found += sum(size[name] for name in self.schedule.stores[step.phase] if step.keep.get(name))
        return found


def lowered(engine: Engine, inputs: Mapping[str, Any], plan: Plan, calls: int) -> list[Lowered]:
    """A plan for each of the calls of a step.

    Raises:
        PlanError: it does not fit the model.
    """
    names = ("cond", "uncond") if plan.is_guided and calls > 1 else ("",) * calls
    return [Lowered(*engine.prepared(inputs, plan, name)[:2]) for name in names]


def hoisted_bytes(program: Program) -> int:
    """Of what a program computes once per generation."""
    prologue = program.prologue
    return sum(storage_bytes(value_of(node)) for node in prologue.step.results()) if prologue else 0
