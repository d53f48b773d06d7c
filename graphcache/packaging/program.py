"""A program whose graphs were compiled before: plans are lowered as ever, and what is missing is refused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx, nn

from graphcache.compiler.backends import Compiled
from graphcache.compiler.captured import Captured
from graphcache.compiler.guidance_half import Half, Rows
from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.program import PhaseKey, Program
from graphcache.ir.call import CallSpec, OutputSpec
from graphcache.ir.data import tree
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.graph import Branch, StepGraph
from graphcache.ir.history import History
from graphcache.ir.plan import Plan, Row
from graphcache.ir.schedule import Memory, Phase, Schedule
from graphcache.ir.tree import fill
from graphcache.packaging.manifest import GraphLine, HalfLine, SizeLine


@dataclass(frozen=True, eq=False)
class PackagedRunnable(Runnable):
    """Native code and its ports; the graph between them is not known any more, but its FLOPs are."""

    counted: int = 0

    @cached_property
    def flops(self) -> int:
        return self.counted


@dataclass(eq=False)
class PackagedProgram(Program):
    """The phases of one call.

    Attributes:
        line: what the package says of the call.
        once: computes the hoisted values.
    """

    line: SizeLine = field(kw_only=True)
    once: Runnable | None = field(kw_only=True)

    @cached_property
    def prologue(self) -> Runnable | None:
        return self.once

    @cached_property
    def fingerprint(self) -> str:
        return self.line.fingerprint

    @cached_property
    def plain_flops(self) -> int:
        return self.line.flops

    @property
    def batch(self) -> int:
        return self.line.leaves[self.captured.call.latents[0]].shape[0]

    @cached_property
    def offloaded(self) -> "Program":
        raise GraphCacheError("a package keeps its caches on the device that it was compiled for")

    def halve(
        self, model: nn.Module, tensors: Sequence[torch.Tensor], conditional: str, *_: object, **__: object
    ) -> None:
        raise PlanError(
            "the package was made for a call in which guidance's branches are not one doubled batch; package "
            "the model with such a call among sizes="
        )

    def _cut(
        self, plan: Plan, rows: Mapping[str, Row]
    ) -> tuple[tuple[Memory, ...], Mapping[str, tuple[int, int]]]:
        return tuple(self.line.memories), self.line.tokens

    def _refuse_mixed(self, schedule: Schedule) -> None:
        """That was done when the package was made."""

    def _made(self, phase: Phase, schedule: Schedule, moved: frozenset[History]) -> Runnable:
        raise PlanError(
            "the package holds no code for what this generation does at one of its steps, since it has "
            "another number of steps than what was packaged, or begins within the plan; package the model "
            f"with this number among steps=:\n{Schedule((phase,), (), schedule.ranges)}"
        )


def program_of(line: SizeLine, call: CallSpec, code: Callable[[GraphLine], Compiled]) -> PackagedProgram:
    """The program of one call of a package; `code` loads a graph's."""
    result = tree(line.result)
    output = OutputSpec(line.count, lambda tensors: fill(result, tensors), tree(line.taken))
    step = StepGraph(nn.Module(), fx.Graph(), (), (), tuple(line.branches))
    captured = Captured(step, call, output, _tuples(line.strides))
    half = None if line.half is None else _half(line.half, step)
    once = None if line.prologue is None else _runnable(line.prologue, None, code, ())
    made = PackagedProgram(captured, None, half=half, tokens=dict(line.tokens), line=line, once=once)
    for item in line.phases:
        ranges = tuple(tuple(entry) for entry in item.ranges)
        key: PhaseKey = item.phase, ranges, item.guided, tuple(item.memories), frozenset()  # type: ignore[assignment]
        made.phases[key] = _runnable(item.graph, half if item.phase.half else None, code, step.branches)
    return made


def _tuples(strides: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, strides))


def _half(line: HalfLine, step: StepGraph) -> Half:
    rows = Rows(frozenset(line.carriers), line.first)
    return Half(
        step, _tuples(line.strides), rows, frozenset(line.hoisted), frozenset(line.shared), frozenset()
    )


def _runnable(
    line: GraphLine, half: Half | None, code: Callable[[GraphLine], Compiled], branches: tuple[Branch, ...]
) -> PackagedRunnable:
    return PackagedRunnable(_outline(line, branches), code(line), half, counted=line.flops)


def _outline(line: GraphLine, branches: tuple[Branch, ...]) -> StepGraph:
    """The ports of a graph without what lies between them."""
    graph = fx.Graph()
    for place, port in enumerate(line.inputs):
        graph.placeholder(f"input_{place}").meta["val"] = port.tensor.weightless()
    results = []
    for place, port in enumerate(line.outputs):
        results.append(graph.get_attr(f"result_{place}"))
        results[-1].meta["val"] = port.tensor.weightless()
    graph.output(tuple(results))
    inputs, outputs = (tuple(port.port() for port in ports) for ports in (line.inputs, line.outputs))
    return StepGraph(nn.Module(), graph, inputs, outputs, branches)
