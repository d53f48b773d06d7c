"""One signature of a model, made ready to run: captured, tagged, hoisted, and a graph per phase."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from graphcache.analysis.cost import graph_flops
from graphcache.analysis.dataflow import Dataflow
from graphcache.analysis.fingerprint import fingerprint
from graphcache.analysis.invariant import invariant_values
from graphcache.analysis.liveness import lower
from graphcache.analysis.ranges import cut_range
from graphcache.analysis.tokens import memories, token_cuts
from graphcache.compiler import pipeline
from graphcache.compiler.backends import Backend, replays_cuda_graphs
from graphcache.compiler.captured import Captured, laid
from graphcache.compiler.code import FIXED, Kept, Ways, build
from graphcache.compiler.guidance_half import Filled, Half, Rows, capture_half
from graphcache.compiler.histories import entries
from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.sharding import Sharding, handed_on
from graphcache.ir.errors import CaptureError, PlanError
from graphcache.ir.graph import Input, StepGraph, storage_bytes, value_of
from graphcache.ir.history import History
from graphcache.ir.plan import Plan, Row
from graphcache.ir.ranks import Ranks
from graphcache.ir.resolve import resolve
from graphcache.ir.schedule import Guided, Memory, Phase, Role, Schedule
from graphcache.libraries.exclusive import COMPILING
from graphcache.passes.base import Observer
from graphcache.passes.shard import Shard


class Elsewhere(NamedTuple):
    """The program of a call at other sizes, which is never run, and tensors of that call."""

    program: "Program"
    tensors: Sequence[torch.Tensor]


PhaseKey = tuple[
    Phase, tuple[tuple[str, int, int], ...], Guided | None, tuple[Memory, ...], frozenset[History]
]


@dataclass(eq=False)
class Program:
    """A captured step, its prologue, and its phases under any plan, each made when first needed.

    Attributes:
        captured: the step for one signature.
        backend: compiles the phases; the prologue runs as it is.
        varying: leaves that change within a generation, though nothing says so: nothing is hoisted from them.
        offload: whether caches are kept in host memory.
        observers: told of every pass.
        kept: compiled code of graphs that were captured before.
        ways: how phases are compiled.
        mesh: the ranks that share the step, one for each dimension of the mesh.
        elsewhere: tells what differs at another size, where code is for any size from the first on.
        half: the step for the conditional half of a doubled batch, once a plan needs it.
        tokens: rows and tokens of the sites that have had budgets.
        phases: the code of those that were needed so far.
    """

    captured: Captured
    backend: Backend
    varying: frozenset[int] = frozenset()
    offload: bool = False
    observers: Sequence[Observer] = ()
    kept: Kept | None = None
    ways: Ways = FIXED
    mesh: tuple[Ranks, ...] = ()
    elsewhere: Elsewhere | None = None
    half: Half | None = None
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    phases: dict[PhaseKey, Runnable] = field(default_factory=dict)
    _schedules: dict[tuple[Plan, int, Role, bool], Schedule] = field(default_factory=dict)
    _sizes: dict[int, tuple[Schedule, dict[History, int]]] = field(default_factory=dict)
    _elsewhere: dict[int, tuple[Schedule, Schedule]] = field(default_factory=dict)
    _shardings: dict[bool, Sharding] = field(default_factory=dict)
    _gatherings: dict[tuple[History, bool], Runnable] = field(default_factory=dict)

    def without(self, changed: set[int]) -> "Program":
        """The same, with these inputs taken to change at every step."""
        varying = self.varying | changed
        return self._alone(varying=varying, half=None, _schedules={}, _sizes={})

    def compiled_with(self, backend: Backend) -> "Program":
        """The same, its phases made anew for another backend."""
        return self._alone(backend=backend)

    def _alone(self, **changes: Any) -> "Program":
        return replace(
            self, phases={}, elsewhere=None, _elsewhere={}, _shardings={}, _gatherings={}, **changes
        )

    @cached_property
    def offloaded(self) -> "Program":
        """The same, with its caches in host memory."""
        return self if self.offload else replace(self, offload=True, elsewhere=None).prepared()

    def halve(
        self,
        model: nn.Module,
        tensors: Sequence[torch.Tensor],
        conditional: str,
        filled: Filled | None = None,
        before: Rows | None = None,
    ) -> None:
        """Capture the step for the conditional half of these inputs as well, if need be by tracing it.

        Raises:
            CaptureError: one half of the batch cannot run alone.
        """
        inputs = laid(self.captured.strides, tensors)
        told = conditional, self.observers, filled, before
        self.half = capture_half(model, self.captured, self._held, inputs, *told)
        self.__dict__.pop("offloaded", None)  # it has no half
        if self.elsewhere is not None:
            other, others = self.elsewhere
            try:
                other.halve(model, others, conditional)
            except CaptureError:  # without an example of another size, code is for this one
                self.elsewhere = None

    @cached_property
    def replays_cuda_graphs(self) -> bool:
        """Whether phases run as CUDA graphs where there are some."""
        return replays_cuda_graphs(self.backend)

    @cached_property
    def _held(self) -> tuple[str, ...]:
        return invariant_values(self.captured.step, self.varying)

    @cached_property
    def prologue(self) -> Runnable | None:
        """Computes the hoisted values; None when there are none.

        It is never compiled, which takes longer than one run in a generation could gain.
        """
        if not self._held:
            return None
        step = pipeline.prologue(self.captured.step, self._held, self.observers)
        return Runnable(step, build(step, None))

    def prepared(self) -> "Program":
        """Itself, its prologue made, before other threads can see it."""
        with COMPILING:
            _ = self.prologue
        return self

    @cached_property
    def prologue_inputs(self) -> tuple[int, ...]:
        """Leaves that the prologue reads, and that must therefore not change within a generation."""
        if self.prologue is None:
            return ()
        return tuple(port.index for port in self.prologue.step.inputs if isinstance(port, Input))

    @cached_property
    def step(self) -> StepGraph:
        return pipeline.repeated(self.captured.step, self._held, self.observers)

    @cached_property
    def half_step(self) -> StepGraph:
        assert self.half is not None
        names = tuple(name for name in self._held if name in self.half.hoisted)
        return pipeline.repeated(self.half.step, names, self.observers)

    @cached_property
    def _flow(self) -> Dataflow:
        return Dataflow(self.captured.step)

    def _cut(
        self, plan: Plan, rows: Mapping[str, Row]
    ) -> tuple[tuple[Memory, ...], Mapping[str, tuple[int, int]]]:
        """What the sites whose rows have token budgets need whole, and their rows and tokens."""
        symbols = {letter.symbol for letter in plan.letters if letter.is_tokens}
        budgeted = [name for name, row in rows.items() if not symbols.isdisjoint(row.actions)]
        cuts = token_cuts(self._flow, budgeted) if budgeted else {}
        tokens = {name: (cut.rows, cut.tokens) for name, cut in cuts.items()}
        return memories(self.captured.step, cuts), tokens

    def schedule(self, plan: Plan, start: int = 0, role: Role = "only", shared: bool = False) -> Schedule:
        """The plan from a step on, lowered for this model and for calls of this role.

        `shared`: both halves of the batch are the same latents.
        """
        key = (plan, start, role, shared)
        if key not in self._schedules:
            with COMPILING:
                self._refuse_other_model(plan)
                step = self.captured.step
                rows = resolve(plan, step.branches, step.blocks)
                operands, tokens = self._cut(plan, rows.branches)
                schedule = lower(plan, step.branches, rows, start, role, operands, shared)
                self.tokens |= tokens
                if role == "doubled":
                    self._refuse_mixed(schedule)
                if self.elsewhere is not None:
                    other = self.elsewhere.program.schedule(*key)
                    self._elsewhere[id(schedule)] = schedule, other
                self._schedules[key] = schedule
        return self._schedules[key]

    def _refuse_other_model(self, plan: Plan) -> None:
        if plan.graph is not None and plan.graph != self.fingerprint:
            raise PlanError(
                f"the plan was made for model {plan.graph}, and this one is {self.fingerprint}; profile this "
                "model and search a plan for it, or take graph= out of the plan's header to use it anyway"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Tells models apart; see `graphcache.analysis.fingerprint`."""
        return fingerprint(self.captured.step)

    def _refuse_mixed(self, schedule: Schedule) -> None:
        """Only what holds the branches one half after the other can be cached for each of them."""
        assert self.half is not None
        step = self.captured.step
        values = {branch.name: {branch.value} for branch in step.branches}
        values |= {
            name: set(cut_range(step, name, first, last).leaving) for name, first, last in schedule.ranges
        }
        for name in {history.site for phase in schedule.phases for history, _ in phase.actions}:
            if not self.half.mixed.isdisjoint(values.get(name, ())):
                raise PlanError(
                    f"row guidance: {name} mixes the samples of both branches within one dimension, so "
                    "neither can have a cache of its own; let the site compute, or call the branches one by "
                    "one, each in its model.cache_context('cond') or ('uncond')"
                )

    def phase(self, schedule: Schedule, index: int) -> Runnable:
        """The specialised graph of a phase."""
        key = self._key(schedule, index)
        if key not in self.phases:
            with COMPILING:
                if key not in self.phases:
                    self.phases[key] = self._made(schedule.phases[index], schedule, self.moved(schedule))
                    if self.elsewhere is not None and id(schedule) in self._elsewhere:
                        other = self._elsewhere[id(schedule)][1]
                        self.elsewhere.program.phase(other, index).announce()
        return self.phases[key]

    def leave_eager(self, schedule: Schedule, index: int) -> None:
        """Take a phase that was not needed yet out of what is compiled."""
        self.phases[self._key(schedule, index)] = self.compiled_with(None).phase(schedule, index)

    def _key(self, schedule: Schedule, index: int) -> PhaseKey:
        phase, moved = schedule.phases[index], self.moved(schedule)
        return phase, schedule.ranges, schedule.guided, schedule.memories, moved

    def _made(self, phase: Phase, schedule: Schedule, moved: frozenset[History]) -> Runnable:
        step = self.half_step if phase.half else self.step
        shards = self._sharding(phase.half).passes(phase, schedule) if self.mesh else []
        compiles = self.backend is not None
        step = pipeline.specialised(step, phase, schedule, moved, compiles, self.observers, shards)
        code = build(step, self.backend, self.kept, self.ways)
        return Runnable(step, code, self.half if phase.half else None)

    def shards(self, ranges: tuple[tuple[str, int, int], ...]) -> tuple[Shard, ...]:
        """What makes a rank's part of the step, where sites and these ranges are looked at."""
        return self._sharding(False).shared(ranges) if self.mesh else ()

    @property
    def alone(self) -> "Program":
        """The same for one process."""
        return self._alone(mesh=(), _sizes={}) if self.mesh else self

    def _sharding(self, half: bool) -> Sharding:
        """How ranks share the step, or the one of half the batch."""
        if half not in self._shardings:
            captured = self.half.step if half and self.half else self.captured.step
            self._shardings[half] = Sharding(captured, self.half_step if half else self.step, self.mesh)
        return self._shardings[half]

    def gathering(self, schedule: Schedule, index: int, history: History) -> Runnable | None:
        """What puts the ranks' parts of a site's value together, as a phase stores it; None of one rank."""
        if not self.mesh:
            return None
        key = history, schedule.guided is not None and schedule.guided.conditional is not None
        if key not in self._gatherings:
            with COMPILING:
                step = handed_on(self.captured.step, *key)
                for shard in self._sharding(False).passes(schedule.phases[index], schedule):
                    step = shard(step)
                self._gatherings[key] = Runnable(step, build(step, None))
        return self._gatherings[key]

    def moved(self, schedule: Schedule) -> frozenset[History]:
        """Histories that are kept in host memory."""
        return schedule.movable if self.offload else frozenset()

    def ideal_speedup(self, schedule: Schedule) -> float:
        """FLOPs of the plain model over all steps, by those of the plan, its prologue included."""
        plain = self.plain_flops * len(schedule.steps)
        planned = sum(self.flops(schedule, index, hoists=not index) for index in range(len(schedule.steps)))
        return plain / planned if planned else float("inf")

    @cached_property
    def plain_flops(self) -> int:
        """Of one evaluation of the plain model."""
        return graph_flops(self.captured.step)

    def flops(self, schedule: Schedule, index: int, hoists: bool) -> int:
        """Of one step of a schedule; `hoists`: with what is computed once per generation."""
        once = self.prologue.flops if hoists and self.prologue else 0
        return once + self.phase(schedule, schedule.steps[index].phase).flops

    @property
    def graphs(self) -> int:
        """Graphs of phases built so far, which are what a backend compiles."""
        return len(self.phases)

    @property
    def batch(self) -> int:
        """Samples in a call's latents."""
        ports = self.captured.step.ports()
        latents = next(node for port, node in ports if isinstance(port, Input) and port.kind == "latent")
        return int(value_of(latents).shape[0])

    def entries(self, schedule: Schedule) -> Mapping[History, Sequence[torch.Tensor]]:
        """One entry of every history that the schedule stores, as fake tensors."""
        return entries(self.phase(schedule, index).step for index in range(len(schedule.phases)))

    def entry_bytes(self, schedule: Schedule) -> dict[History, int]:
        """Bytes of one entry of every history that the schedule stores."""
        known = self._sizes.get(id(schedule))
        if known is None:
            found = {name: sum(map(storage_bytes, parts)) for name, parts in self.entries(schedule).items()}
            known = self._sizes[id(schedule)] = schedule, found
        return known[1]

    def check(self, plan: Plan, role: Role = "only") -> None:
        """Lower a plan and specialise every phase, so that whatever is wrong is said now.

        Raises:
            PlanError: the plan does not fit the model.
        """
        schedule = self.schedule(plan, role=role)
        if not self.captured.step.branches and plan.rows:
            raise PlanError("the model has no residual branches that a plan could speak of")
        self.entries(schedule)
