"""Interleaved timings: a plan against the same model under plain torch.compile, in one run."""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from graphcache.analysis.cost import graph_flops
from graphcache.compiler.backends import Backend, compile_blocks_plainly, compile_plainly
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.plan import Plan
from graphcache.ir.roles import Names, find_times
from graphcache.planning.floors import Floor, Rates
from graphcache.runtime.engine import Engine
from graphcache.runtime.runner import BranchState
from graphcache.runtime.transform import transform

Call = Callable[..., Any]


EAGER, WHOLE, BY_BLOCKS = "eager", "torch.compile", "compiled block by block"
"""Names of the plain model's contenders."""


@dataclass(frozen=True)
class PhaseTiming:
    """Steps of one phase: their median milliseconds, those that their FLOPs promise beside the plain model,
    and the least that the device needs.
    """

    name: str
    ms: float
    promised: float
    floor: Floor | None = None

    def __str__(self) -> str:
        text = f"phase {self.name}: {self.ms:.3f} ms, FLOPs promise {self.promised:.3f}"
        return text if self.floor is None else f"{text}, floor {self.floor.ms:.3f}"


@dataclass(frozen=True)
class Timing:
    """One contender: median milliseconds a step, and the quartiles over rounds.

    `ideal` is the FLOPs-ideal speed-up of its plan, None for what has no plan; `peak_bytes` are those of its
    caches, and `device_bytes` the most that PyTorch held on a GPU while it ran, None on a CPU.
    """

    name: str
    ms: float
    low: float
    high: float
    speedup: float
    ideal: float | None
    phases: tuple[PhaseTiming, ...] = ()
    graphs: int = 0
    runner_us: float | None = None
    peak_bytes: int | None = None
    device_bytes: int | None = None

    @property
    def realised(self) -> float | None:
        """Measured by FLOPs-ideal speed-up."""
        return None if self.ideal is None else self.speedup / self.ideal


class TimedGeneration:
    """One generation's calls: the example inputs with a falling timestep, so that every step is its own."""

    def __init__(self, inputs: Mapping[str, Any], timestep: str | None, steps: int) -> None:
        name = _time_argument(inputs, timestep)
        first = torch.as_tensor(inputs[name])
        self.steps = steps
        whole = not first.is_floating_point()
        ends = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
        scaled = (ends * 999).round() if whole else ends * max(float(first.max()), 1e-3)
        times = [torch.full_like(first, float(value)) for value in scaled]
        is_tensor = isinstance(inputs[name], torch.Tensor)
        self.calls = [{**inputs, name: time if is_tensor else time.item()} for time in times]

    def run(self, model: Call) -> list[float]:
        """Seconds of each step, in order.

        On a CUDA device those between the steps' ends there: as a sampling loop does, nothing waits for the
        device before the last step.
        """
        if not _is_on_cuda(self.calls[0]):
            return self.launch(model)
        event_type: Any = torch.cuda.Event
        events = [event_type(enable_timing=True) for _ in range(self.steps + 1)]
        events[0].record()
        for kwargs, event in zip(self.calls, events[1:], strict=True):
            model(**kwargs)
            event.record()
        torch.cuda.synchronize()
        return [1e-3 * begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]

    def device_bytes(self, model: Call) -> int | None:
        """The most bytes of a CUDA device that PyTorch holds while a generation runs; None on a CPU."""
        if not _is_on_cuda(self.calls[0]):
            return None
        torch.cuda.reset_peak_memory_stats()
        self.run(model)
        return int(torch.cuda.max_memory_allocated())

    def launch(self, model: Call) -> list[float]:
        """Seconds after which each call returns."""
        times = []
        for kwargs in self.calls:
            start = time.perf_counter()
            model(**kwargs)
            times.append(time.perf_counter() - start)
        return times


def _time_argument(inputs: Mapping[str, Any], timestep: str | None) -> str:
    times = find_times(inputs, Names(timestep))
    if not times or times[0].path not in inputs:
        raise GraphCacheError(
            "calls can be timed whose timestep is an argument of its own, a tensor or a number; name it with "
            f"timestep=...: this call has {', '.join(inputs)}"
        )
    return times[0].path


def benchmark(
    model: nn.Module,
    inputs: Mapping[str, Any],
    plans: Mapping[str, Plan],
    *,
    backend: Backend = "inductor",
    timestep: str | None = None,
    latents: str | Sequence[str] = (),
    rounds: int = 7,
    regions: Literal["auto"] | bool = "auto",
    plain: Sequence[str] = (),
    rates: Rates | None = None,
    beside: Mapping[str, Call] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Timing, ...]:
    """Time whole generations, shuffled in each round, and compare medians with the plain model's.

    Args:
        model: in eval mode.
        inputs: keyword arguments of one call.
        plans: contenders by name; all of one number of steps.
        backend: of the plans' phases; the plain model is compiled by the same.
        timestep: the name of the timestep argument, if it is not found.
        latents: those of the latents, as for `transform`.
        rounds: generations of each contender that count; one before them warms up.
        regions: how phases are compiled, as for `transform`.
        plain: `EAGER` and `BY_BLOCKS`, where the plain model is to run like that as well.
        rates: the device's, by which the phases' floors are told.
        beside: further callables to time in the same run.
        progress: told what is done now.
    """
    steps = {plan.steps for plan in plans.values()} or {20}
    if len(steps) > 1:
        raise PlanError(f"plans of one number of steps can be compared, these have {sorted(steps)}")
    generation = TimedGeneration(inputs, timestep, steps.pop())
    made = {
        name: transform(
            model, plan, backend=backend, timestep=timestep, latents=latents, wait="never", regions=regions
        )
        for name, plan in plans.items()
    }
    contenders: dict[str, Call] = {**_plain(model, backend, plain), **(beside or {}), **made}
    measured: dict[str, list[list[float]]] = {name: [] for name in contenders}
    with torch.no_grad():
        for name, call in contenders.items():
            progress(f"compiling {name}")
            generation.run(call)
        for turn in range(rounds):
            progress(f"round {turn + 1} of {rounds}")
            for name in random.Random(turn).sample(list(contenders), len(contenders)):
                measured[name].append(generation.run(contenders[name]))
        held = {name: generation.device_bytes(call) for name, call in contenders.items()}
        timings = _timings(measured, made, generation, rates)
    return tuple([replace(timing, device_bytes=held[timing.name]) for timing in timings])


def _plain(model: nn.Module, backend: Backend, names: Sequence[str]) -> dict[str, Call]:
    """The plain model as it is and as people compile it."""
    ways: dict[str, Callable[[], Call]] = {
        EAGER: lambda: model,
        WHOLE: lambda: compile_plainly(model, backend),
        BY_BLOCKS: lambda: compile_blocks_plainly(model, backend),
    }
    return {name: made() for name, made in ways.items() if name == WHOLE or name in names}


def _timings(
    measured: Mapping[str, Sequence[Sequence[float]]],
    made: Mapping[str, nn.Module],
    generation: TimedGeneration,
    rates: Rates | None,
) -> tuple[Timing, ...]:
    base = statistics.median(map(statistics.fmean, measured[WHOLE]))
    result = []
    for name, rounds in measured.items():
        per_step = sorted(1e3 * statistics.fmean(times) for times in rounds)
        ms = statistics.median(per_step)
        quarter = len(per_step) // 4
        timing = Timing(name, ms, per_step[quarter], per_step[-1 - quarter], 1e3 * base / ms, None)
        if name in made:
            timing = _with_plan(timing, made[name], rounds, generation, rates)
        result.append(timing)
    return tuple(result)


def _with_plan(
    timing: Timing,
    model: Any,
    rounds: Sequence[Sequence[float]],
    generation: TimedGeneration,
    rates: Rates | None,
) -> Timing:
    state = _state(model)
    schedule, program = state.schedule, state.program
    plain_ms, phases = timing.ms * timing.speedup, []
    whole = graph_flops(program.captured.step)
    for index in range(len(schedule.phases)):
        steps = [i for i, step in enumerate(schedule.steps) if step.phase == index and i > 0]
        times = [times[i] for times in rounds for i in steps]
        if times:
            graph = program.phase(schedule, index).step
            floor = None if rates is None else Floor.of(graph, rates)
            promised = plain_ms * graph_flops(graph) / whole if whole else plain_ms
            name = f"{index} ({len(steps)} steps)"
            phases.append(PhaseTiming(name, 1e3 * statistics.median(times), promised, floor))
    (summary,) = model.summary().branches
    return replace(
        timing,
        ideal=summary.ideal_speedup,
        peak_bytes=summary.peak_bytes,
        phases=tuple(phases),
        graphs=program.graphs,
        runner_us=runner_overhead(model, generation),
    )


def _state(model: Any) -> BranchState:
    engine: Engine = model._graphcache
    (state,) = engine.surroundings.session.states.values()
    return state


def runner_overhead(model: Any, generation: TimedGeneration, rounds: int = 5) -> float:
    """Microseconds a step outside the graphs: every graph is replaced by one that returns old results."""
    program = _state(model).program
    kept = dict(program.phases)
    try:
        for key, runnable in kept.items():
            program.phases[key] = replace(runnable, call=_replay(runnable.call))
        medians = []
        for turn in range(rounds + 1):
            model.reset()
            times = generation.launch(model)
            if turn:
                medians.append(statistics.median(times[1:]))
        return 1e6 * statistics.median(medians)
    finally:
        program.phases.update(kept)
        model.reset()


def _replay(call: Call) -> Call:
    kept: list[torch.Tensor] = []

    def replay(*tensors: torch.Tensor) -> list[torch.Tensor]:
        if not kept:
            kept.extend(call(*tensors))
        return [tensor.view_as(tensor) for tensor in kept]

    return replay


def _is_on_cuda(kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in kwargs.values())
