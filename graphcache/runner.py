"""Runs one step of one branch: feeds a phase its tensors and keeps what later steps read."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphcache.ir.graph import CacheRead, Hoisted, Input
from graphcache.ir.plan import Plan
from graphcache.ir.schedule import Schedule, Step
from graphcache.ir.state import CacheState, Entry
from graphcache.program import Program, Runnable, distinct

Key = tuple[Hashable, ...]
"""A signature, and what tracing and compiled code depend on besides it; gradient mode comes last."""


@dataclass
class BranchState:
    """One branch's place in its generation, and what it keeps.

    `step` is the plan's step of the latest call; the schedule begins at `start`. `watched` are the prologue's
    inputs with their versions: the hoisted values are right for these. `constants` are the latest call's
    other inputs, by which branches are told apart.
    """

    key: Key
    program: Program
    schedule: Schedule
    start: int
    step: int
    cache: CacheState = field(default_factory=CacheState)
    watched: tuple[tuple[torch.Tensor, int], ...] | None = None
    constants: tuple[torch.Tensor, ...] = ()
    hoisted_bytes: int = 0
    ready: dict[int, Runnable] = field(default_factory=dict)

    @property
    def now(self) -> Step:
        return self.schedule.steps[self.step - self.start]

    @property
    def finished(self) -> bool:
        return self.step + 1 == self.start + len(self.schedule.steps)


def run_step(state: BranchState, tensors: Sequence[torch.Tensor]) -> Any:
    """One evaluation: the phase of the state's current step, on flat inputs in signature order."""
    program, cache, step = state.program, state.cache, state.now
    laid = _laid(program, tensors)
    if state.watched is None:
        _run_prologue(state, tensors, laid)
    runnable = state.ready.get(step.phase)
    if runnable is None:
        runnable = state.ready[step.phase] = program.phase(state.schedule, step.phase)
    results = runnable.call(*_feed(cache, runnable, laid, step))
    count = position = program.captured.output.count
    for site, parts in runnable.stored:
        cache.store(site, tuple(results[position : position + parts]))
        position += parts
    cache.trim(step.keep)
    if state.finished:
        cache.hoisted = {}
        state.watched = None
    return program.captured.output.build(results[:count])


def changed_inputs(state: BranchState, tensors: Sequence[torch.Tensor]) -> set[int]:
    """Leaves that the prologue read and that are another object, or another version, now."""
    if not state.watched:
        return set()
    return {
        index
        for index, (tensor, version) in zip(state.program.prologue_inputs, state.watched, strict=True)
        if tensors[index] is not tensor or _version(tensor) != version
    }


def halved(state: BranchState, key: Key, program: Program, plan: Plan, step: int) -> BranchState:
    """The state for another signature: empty, or the half of every history that the plan says remains."""
    entries = _remaining(state, program, plan) if plan.remaining else None
    if entries is None:
        return BranchState(key, program, program.schedule(plan, step), step, step)
    kept = BranchState(key, program, program.schedule(plan, state.start), state.start, step)
    kept.cache.entries = entries
    return kept


def _remaining(state: BranchState, program: Program, plan: Plan) -> dict[str, list[Entry]] | None:
    """One half of the batch of every entry; None where that would not be what the new signature caches."""
    if state.program.batch != 2 * program.batch:
        return None
    half = slice(program.batch) if plan.remaining == "first" else slice(program.batch, None)
    expected = program.entries(state.schedule)
    halves: dict[str, list[Entry]] = {}
    for site, history in state.cache.entries.items():
        halves[site] = [tuple(part[half].clone() for part in entry) for entry in history]
        shapes = [part.shape for part in expected[site]]
        for entry, half_entry in zip(history, halves[site], strict=True):
            outermost = all(part.shape[0] == state.program.batch for part in entry)
            if not outermost or [part.shape for part in half_entry] != shapes:
                return None
    return halves


def _run_prologue(state: BranchState, tensors: Sequence[torch.Tensor], laid: Sequence[torch.Tensor]) -> None:
    program = state.program
    prologue = program.prologue
    state.watched, state.cache.hoisted = (), {}
    if prologue is not None:
        inputs = [laid[port.index] for port in prologue.step.inputs if isinstance(port, Input)]
        values = prologue.call(*distinct(inputs))
        names = (port.name for port in prologue.step.outputs if isinstance(port, Hoisted))
        state.cache.hoisted = dict(zip(names, values, strict=True))
        state.hoisted_bytes = state.cache.hoisted_bytes()
        state.watched = tuple((tensors[i], _version(tensors[i])) for i in program.prologue_inputs)


def _feed(
    cache: CacheState, runnable: Runnable, laid: Sequence[torch.Tensor], step: Step
) -> list[torch.Tensor]:
    """One tensor per input port; on the path of every step, hence no look-up twice."""
    entries, hoisted = cache.entries, cache.hoisted
    feed: list[torch.Tensor] = []
    for port in runnable.step.inputs:
        if isinstance(port, CacheRead):
            history = entries[port.site]
            # a history that is shorter than the forecast's order is padded with its newest at weight 0
            index = port.entry if port.entry < len(history) else 0
            feed.append(history[index][port.part])
        elif isinstance(port, Hoisted):
            feed.append(hoisted[port.name])
        elif isinstance(port, Input):
            feed.append(laid[port.index])
        else:
            feed.append(runnable.coefficients(port.group, step.coefficients[port.group]))
    return feed if len(set(map(id, feed))) == len(feed) else distinct(feed)


def _laid(program: Program, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The inputs in the layout that was captured; compiled code does not look at strides again."""
    strides = program.captured.strides
    if all(t.stride() == stride for t, stride in zip(tensors, strides, strict=True)):
        return tensors
    return [_lay(tensor, stride) for tensor, stride in zip(tensors, strides, strict=True)]


def _lay(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    if tensor.stride() == stride:
        return tensor
    laid = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return laid.copy_(tensor)


def _version(tensor: torch.Tensor) -> int:
    """Counts in-place changes; inference tensors have no count, only their identity speaks."""
    return -1 if tensor.is_inference() else tensor._version
