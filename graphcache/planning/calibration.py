"""How long a compiled step takes when sites are taken from the cache: what plans are priced by."""

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphcache.analysis.branches import branch_members
from graphcache.compiler.backends import Backend, compile_plainly, replays_cuda_graphs
from graphcache.compiler.captured import laid
from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.program import Program
from graphcache.ir.graph import StepGraph
from graphcache.ir.letter import Letter
from graphcache.ir.plan import Plan, Row
from graphcache.ir.roles import Names
from graphcache.ir.selector import Selector
from graphcache.planning.bench import TimedGeneration
from graphcache.planning.plan_memory import lowered
from graphcache.runtime.runner import begun, feed, run_prologue
from graphcache.runtime.transform import transform

ACTIONS = "##fff#f#fff#f"
"""Of the plans that are timed; the first two steps are warm-up. The computed ones after them follow
skipped ones, as in most plans: they can take a few per cent longer than one after another."""


def step_seconds(
    model: nn.Module,
    inputs: Mapping[str, Any],
    families: Mapping[str, Sequence[str]],
    *,
    backend: Backend,
    names: Names,
    rounds: int = 5,
    mesh: Any = None,
) -> dict[str, float]:
    """Median seconds of a step: `plain`, `compute`, and every family's from the cache.

    Whole steps differ between families in what they hand out, which takes no time to speak of: they are
    compiled and timed for the last family alone, unless CUDA graphs would read what others left elsewhere.

    Args:
        inputs: keyword arguments of one call.
        families: sites that are forecast together, by name.
        backend: that compiles the phases.
        names: of the arguments that are latents and timestep.
        rounds: interleaved generations of each; one before them warms up.
        mesh: the ranks that share every step, the plain model's too; each times it for itself.
    """
    plans = {name: _plan(sites) for name, sites in families.items()}
    generation = TimedGeneration(inputs, names.timestep, len(ACTIONS))
    planned = dict(plans) if mesh is None else {"plain": Plan(len(ACTIONS)), **plans}
    calls: dict[str, Any] = {} if mesh is not None else {"plain": compile_plainly(model, backend)}
    given: dict[str, Any] = {"timestep": names.timestep, "latents": names.latents, "wait": "never"}
    calls |= {
        name: transform(model, plan, backend=backend, mesh=mesh, **given) for name, plan in planned.items()
    }
    *others, timed = plans
    for name in [] if replays_cuda_graphs(backend) else others:
        _leave_whole_steps(calls[name], inputs, plans[name])
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name in random.Random(turn).sample(list(calls), len(calls)):
                times[name].append(generation.run(calls[name]))
    found = {"plain": _median(times["plain"], range(len(ACTIONS)))}
    whole = [step for step, action in enumerate(ACTIONS) if action == "#" and step > 1]
    skipped = [step for step, action in enumerate(ACTIONS) if action == "f"]
    found["compute"] = _median(times[timed], whole)
    return found | {name: _median(times[name], skipped) for name in plans}


class _Timed(fx.Interpreter):
    """Adds up how long each operation takes."""

    def __init__(self, step: StepGraph) -> None:
        super().__init__(step.module)
        self.seconds: dict[str, float] = defaultdict(float)

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.is_cuda:
            torch.cuda.synchronize(result.device)
        self.seconds[n.name] += time.perf_counter() - start
        return result


def site_seconds(program: Program, tensors: Sequence[torch.Tensor], rounds: int = 3) -> dict[str, float]:
    """Seconds of each branch, and of the whole step as `output`, run operation by operation."""
    state = begun((), program, Plan(1), 0, "only")
    inputs = laid(program.captured.strides, tensors)
    with torch.no_grad():
        run_prologue(state, tensors, inputs)
        fed = feed(state.cache, Runnable(program.step, list), inputs, state.now)
        timed = _Timed(program.step)
        timed.run(*fed)
        timed.seconds.clear()
        for _ in range(rounds):
            timed.run(*fed)
    members = branch_members(program.step)
    found = {name: sum(timed.seconds[node] for node in nodes) / rounds for name, nodes in members.items()}
    return found | {"output": sum(timed.seconds.values()) / rounds}


def _leave_whole_steps(model: Any, inputs: Mapping[str, Any], plan: Plan) -> None:
    """Let the computed steps of a transformed model run eagerly."""
    with torch.no_grad():
        (call,) = lowered(model._graphcache, inputs, plan, 1)
    for index in {
        step.phase for step, action in zip(call.schedule.steps, ACTIONS, strict=True) if action == "#"
    }:
        call.program.leave_eager(call.schedule, index)


def _plan(sites: Sequence[str]) -> Plan:
    if list(sites) == ["guidance"]:
        return Plan(len(ACTIONS), rows=(Row(Selector.parse("guidance"), ACTIONS.replace("f", ".")),))
    letter = Letter("f", "newton", (("order", 1),))
    return Plan(len(ACTIONS), (letter,), tuple(Row(Selector.parse(site), ACTIONS) for site in sites))


def _median(rounds: Sequence[Sequence[float]], steps: Sequence[int]) -> float:
    """Over all steps and all rounds but the first."""
    return statistics.median(times[step] for times in rounds[1:] for step in steps)
