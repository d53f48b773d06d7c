"""Everything that a plan needs at given calls, captured and compiled before the first request."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from graphcache.compiler.backends import begin_generation
from graphcache.compiler.captured import laid
from graphcache.compiler.guidance_half import is_doubled
from graphcache.compiler.phase_code import Runnable
from graphcache.ir.graph import CacheRead, Chosen
from graphcache.ir.history import History
from graphcache.ir.plan import Plan
from graphcache.ir.state import CacheState, Choice
from graphcache.runtime.engine import Engine
from graphcache.runtime.runner import BranchState, feed, run_prologue

Call = Mapping[str, Any] | tuple[Any, ...]


def warm_up(engine: Engine, calls: Sequence[Call], plan: Plan, progress: bool) -> None:
    """Capture calls, and run every phase of the plan once for each, on zeros where it reads a cache.

    Args:
        engine: of the transformed model.
        calls: one for each size that is to come.
        plan: for the number of evaluations of the generations to come.
        progress: whether a bar is drawn.
    """
    with torch.no_grad(), Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("capturing", total=len(calls))
        wanted: list[tuple[BranchState, Sequence[torch.Tensor]]] = []
        for call in calls:
            wanted += branches_of(engine, call, plan)
            bar.advance(task)
        for state, _ in wanted:
            for index in range(len(state.schedule.phases)):
                state.program.phase(state.schedule, index).announce()
        task = bar.add_task("compiling", total=sum(len(state.schedule.phases) for state, _ in wanted))
        for state, tensors in wanted:
            for _ in _run(state, tensors):
                bar.advance(task)


def branches_of(engine: Engine, call: Call, plan: Plan) -> list[tuple[BranchState, list[torch.Tensor]]]:
    """The states of a call's branches, and its tensors: of both contexts where guidance makes two calls a
    step and neither is entered.
    """
    names = [engine.surroundings.name]
    if plan.is_guided and not names[0]:
        program, _, tensors = engine.prepared(call, plan, "cond")
        doubled = is_doubled(program.captured.call.given_latents(tensors))
        names = names if doubled else ["cond", "uncond"]
    states: list[BranchState] = []
    for name in names:
        program, schedule, tensors = engine.prepared(call, plan, name)
        state = BranchState((), program, schedule, 0, 0)
        engine.keep_within(states, state, plan)
        states.append(state)
    return [(state, tensors) for state in states]


def _run(state: BranchState, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Each phase, once."""
    program, schedule = state.program, state.schedule
    inputs = laid(program.captured.strides, tensors)
    begin_generation(program.backend)
    run_prologue(state, tensors, inputs)
    for index in range(len(schedule.phases)):
        runnable = program.phase(schedule, index)
        step = next(step for step in schedule.steps if step.phase == index)
        blank = _blank(runnable)
        blank.hoisted = state.cache.hoisted
        runnable.call(*feed(blank, runnable, inputs, step))
        yield


def _blank(runnable: Runnable) -> CacheState:
    """Caches of zeros, as a phase reads them."""
    cache = CacheState()
    parts: dict[History, dict[int, torch.Tensor]] = {}
    chosen: dict[History, dict[bool, torch.Tensor]] = {}
    for port in runnable.step.inputs:
        if isinstance(port, CacheRead):
            parts.setdefault(port.history, {})[port.part] = runnable.blank(port)
        elif isinstance(port, Chosen):
            chosen.setdefault(port.history, {})[port.clusters] = runnable.blank(port)
    none = torch.empty(0)
    for history, found in parts.items():
        cache.entries[history] = [tuple(found.get(part, none) for part in range(max(found) + 1))]
    cache.chosen = {
        history: Choice(found.get(False, none), found.get(True, none)) for history, found in chosen.items()
    }
    return cache
