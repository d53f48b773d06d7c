"""One signature of a model, made ready to run: captured, tagged, hoisted, and a graph per phase."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from graphcache.analysis.cost import graph_flops
from graphcache.analysis.invariant import invariant_values
from graphcache.analysis.liveness import lower
from graphcache.capture import capture
from graphcache.compile import COMPILING, Backend, Compiled, build
from graphcache.ir.call import CallSpec, OutputSpec
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import (
    CacheWrite,
    Coefficients,
    Input,
    StepGraph,
    storage_bytes,
    value_of,
)
from graphcache.ir.plan import Plan
from graphcache.ir.schedule import Phase, Schedule
from graphcache.passes.base import Observer, run
from graphcache.passes.hoist import Hoist, Prologue
from graphcache.passes.simplify import Simplify
from graphcache.passes.specialize import Specialize, entry_values
from graphcache.passes.tag import Tag


@dataclass(frozen=True)
class Captured:
    """A model's step for one signature, before any plan."""

    step: StepGraph
    call: CallSpec
    output: OutputSpec
    strides: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(
        model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor], observers: Sequence[Observer] = ()
    ) -> "Captured":
        examples = distinct([_dense(tensor) for tensor in tensors])
        step, output = capture(model, call, tuple(examples))
        step = run((Simplify(), Tag()), step, observers)
        strides = tuple(tensor.stride() for tensor in examples)
        return Captured(step, call, output, strides)


def distinct(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors, none of them twice the same object.

    Tracing would make one input of two that are one object in the first call, and without guards keep to
    that when they are two.
    """
    seen: set[int] = set()
    result = []
    for tensor in tensors:
        result.append(tensor.view_as(tensor) if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return result


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The layout that the graph will be given: an expanded or sliced input is made contiguous."""
    dense = torch.empty_like(tensor).stride()
    return tensor if tensor.stride() == dense else tensor.contiguous()


@dataclass(frozen=True)
class Runnable:
    """A callable graph and where its inputs come from."""

    step: StepGraph
    call: Compiled
    _coefficients: dict[tuple[int, tuple[float, ...]], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def stored(self) -> tuple[tuple[str, int], ...]:
        """(site, number of parts) in the order in which the stores follow the results."""
        parts: dict[str, int] = {}
        for port in self.step.outputs:
            if isinstance(port, CacheWrite):
                parts[port.site] = parts.get(port.site, 0) + 1
        return tuple(parts.items())

    @cached_property
    def _weights(self) -> dict[int, torch.Tensor]:
        """Fake tensors with dtype and device of each group's coefficients."""
        ports = self.step.ports()
        return {port.group: value_of(node) for port, node in ports if isinstance(port, Coefficients)}

    def coefficients(self, group: int, values: tuple[float, ...]) -> torch.Tensor:
        """The coefficients as a tensor; made once, so that later generations copy nothing to the device."""
        made = self._coefficients.get((group, values))
        if made is None:
            like = self._weights[group]
            made = torch.tensor(values, dtype=like.dtype, device=like.device)
            self._coefficients[group, values] = made
        return made


@dataclass
class Program:
    """A captured step made ready to run under any plan: prologue and phases, compiled when first needed."""

    captured: Captured
    backend: Backend
    varying: frozenset[int] = frozenset()
    observers: Sequence[Observer] = ()
    phases: dict[tuple[Phase, tuple[tuple[str, int, int], ...]], Runnable] = field(default_factory=dict)
    _schedules: dict[tuple[Plan, int], Schedule] = field(default_factory=dict)

    def without(self, changed: set[int]) -> "Program":
        """The same, with these inputs taken to change at every step."""
        return Program(self.captured, self.backend, self.varying | changed, self.observers)

    @cached_property
    def _held(self) -> tuple[str, ...]:
        return invariant_values(self.captured.step, self.varying)

    @cached_property
    def prologue(self) -> Runnable | None:
        """Computes the hoisted values; None when there are none."""
        if not self._held:
            return None
        step = run((Prologue(self._held),), self.captured.step, self.observers)
        return Runnable(step, build(step, self.backend))

    @cached_property
    def prologue_inputs(self) -> tuple[int, ...]:
        """Leaves that the prologue reads, and that must therefore not change within a generation."""
        if self.prologue is None:
            return ()
        return tuple(port.index for port in self.prologue.step.inputs if isinstance(port, Input))

    @cached_property
    def step(self) -> StepGraph:
        return run((Hoist(self._held),), self.captured.step, self.observers)

    def schedule(self, plan: Plan, start: int = 0) -> Schedule:
        """The plan from a step on, lowered for this model."""
        key = (plan, start)
        if key not in self._schedules:
            self._schedules[key] = lower(plan, self.captured.step.branches, start)
        return self._schedules[key]

    def phase(self, schedule: Schedule, index: int) -> Runnable:
        """The specialised graph of a phase."""
        key = (schedule.phases[index], schedule.ranges)
        with COMPILING:
            if key not in self.phases:
                step = run((Specialize(*key),), self.step, self.observers)
                self.phases[key] = Runnable(step, build(step, self.backend))
            return self.phases[key]

    def ideal_speedup(self, schedule: Schedule) -> float:
        """FLOPs of the plain model over all steps, by those of the plan, its prologue included."""
        plain = graph_flops(self.captured.step) * len(schedule.steps)
        once = graph_flops(self.prologue.step) if self.prologue else 0
        cost = [graph_flops(self.phase(schedule, i).step) for i in range(len(schedule.phases))]
        planned = sum(cost[step.phase] for step in schedule.steps)
        return plain / (once + planned) if once + planned else float("inf")

    @property
    def graphs(self) -> int:
        """Graphs built so far, the prologue included."""
        return len(self.phases) + ("prologue" in vars(self) and self.prologue is not None)

    @property
    def batch(self) -> int:
        """Samples in a call's latents."""
        ports = self.captured.step.ports()
        latents = next(node for port, node in ports if isinstance(port, Input) and port.kind == "latent")
        return int(value_of(latents).shape[0])

    def entries(self, schedule: Schedule) -> Mapping[str, Sequence[torch.Tensor]]:
        """One history entry of every site that the schedule caches, as fake tensors."""
        names = {name for phase in schedule.phases for name, _ in phase.actions}
        return entry_values(self.captured.step, names, schedule.ranges)

    def entry_bytes(self, schedule: Schedule) -> dict[str, int]:
        """Bytes of one history entry of every site that the schedule caches."""
        return {name: sum(map(storage_bytes, values)) for name, values in self.entries(schedule).items()}

    def check(self, plan: Plan) -> None:
        """Lower a plan and specialise every phase, so that whatever is wrong is said now.

        Raises:
            PlanError: the plan does not fit the model.
        """
        schedule = self.schedule(plan)
        if not self.captured.step.branches and plan.rows:
            raise PlanError("the model has no residual branches that a plan could speak of")
        for index in range(len(schedule.phases)):
            self.phase(schedule, index)
