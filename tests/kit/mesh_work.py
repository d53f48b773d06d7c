"""What ranks do in tests of meshes: each function runs in every process of a group."""

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import tree_leaves

import graphcache
from graphcache import Plan
from graphcache.compiler.captured import Captured
from graphcache.ir.state import Choice
from graphcache.runtime import engine, runner, selection
from graphcache.tracing.symbolic import Symbolic
from sharing import Sharing
from tiny import arguments, tiny
from zoo import CASES

TOKENS = 8


def mesh_of(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def generations(
    sizes: Mapping[str, int], plans: Mapping[str, list[tuple[str, Plan]]]
) -> dict[str, tuple[float, float]]:
    """Of each model under each of its plans the largest difference to one process, and the share of bytes."""
    mesh, found = mesh_of(**sizes), {}
    Captured.of = Sharing(Captured.of, Symbolic.of)  # type: ignore[method-assign]
    for name, named in plans.items():
        case = CASES[name]
        for text, plan in named:
            static = case.static(2)
            latents = torch.cat([case.latents(1)] * 2) if plan.is_guided else case.latents(2)
            steps = plan.steps
            calls = [case.call(static, latents + 0.1 * i, 1 - i / steps) for i in range(steps)]
            alone = graphcache.transform(case.make(), plan)
            ranks = graphcache.transform(case.make(), plan, mesh=mesh)
            error = 0.0
            for call in calls:
                with torch.no_grad():
                    pairs = zip(tree_leaves(ranks(**call)), tree_leaves(alone(**call)), strict=True)
                    error = max(error, *(float((ours - theirs).abs().max()) for ours, theirs in pairs))
            held = [max(step.held_bytes for step in m.summary().branches[0].steps) for m in (ranks, alone)]
            found[f"{name} {text}"] = error, held[0] / held[1]
    return found


def by_meshes(
    meshes: Mapping[str, Mapping[str, int]], plans: Mapping[str, list[tuple[str, Plan]]]
) -> dict[str, tuple[float, float]]:
    """The same of several meshes of the same processes, one after the other."""
    found = {name: generations(sizes, plans) for name, sizes in meshes.items()}
    return {f"{name} {case}": result for name, each in found.items() for case, result in each.items()}


def step(model: Any, t: float, **changes: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**{**arguments(t, tokens=TOKENS), **changes})
    return result


CASES_OF_TWO = ("noise", "later latents", "weights", "plan", "step", "tokens", "gradients")


def disagreeing() -> dict[str, str]:
    """What is said where the second rank has something else in one of two steps."""
    mesh = mesh_of(tokens=2)
    return {what: _said(what, mesh, dist.get_rank() == 1) for what in CASES_OF_TWO}


def _said(what: str, mesh: DeviceMesh, other: bool) -> str:
    model, plan = tiny(2), graphcache.presets.fora(3, 2)
    if other and what == "weights":
        with torch.no_grad():
            model.blocks[0].qkv.weight[0, 0] += 1
    if other and what == "plan":
        plan = graphcache.presets.compute(3)
    if what == "tokens":
        plan = Plan.parse("plan steps=3 preset=none\na = tokens 3 by random multiple=1\n@mlp #aa")
        runner.choose = _others if other else selection.choose
    made = graphcache.transform(model, plan, mesh=mesh)
    noise = torch.randn(2, TOKENS, 4, generator=torch.Generator().manual_seed(int(other and what == "noise")))
    try:
        if what == "gradients":
            made(**arguments(tokens=TOKENS))
        step(made, 1.0, x=noise)
        if other and what == "step":
            made.reset()
        step(made, 0.7, x=noise + 1e-6 if other and what == "later latents" else noise)
    except graphcache.StateError as error:
        return str(error)
    return "nothing"


def _others(*arguments: Any) -> list[dict[int, Choice]]:
    """Other tokens than those that should be chosen."""
    found = selection.choose(*arguments)
    return [
        {step: replace(choice, places=(choice.places + 1) % TOKENS) for step, choice in each.items()}
        for each in found
    ]


def dying(within: bool) -> Tensor:
    """Two steps; the last rank is killed before the second one, or after all have agreed on it."""
    count = dist.get_world_size()
    model = graphcache.transform(tiny(2), graphcache.presets.compute(3), mesh=mesh_of(tokens=count))
    step(model, 1.0)
    if dist.get_rank() == count - 1:
        if not within:
            kill()
        engine.run_step = kill
    return step(model, 0.7)


def kill(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def compiled(plan: Plan, backend: str, blocks: int) -> tuple[float, list[int]]:
    """The largest difference to one process, and the graphs that each of them compiled, in five steps."""
    meshes = None, mesh_of(tokens=2)
    counters = [CompileCounterWithBackend(backend) for _ in meshes]
    alone, made = (
        graphcache.transform(tiny(blocks), plan, mesh=mesh, backend=counter)
        for mesh, counter in zip(meshes, counters, strict=True)
    )
    pairs = [(step(made, 1 - i / 5), step(alone, 1 - i / 5)) for i in range(5)]
    largest = max(float((one - two).abs().max()) for one, two in pairs)
    return largest, [counter.frame_count for counter in counters]


def with_other_options() -> dict[str, tuple[float, int]]:
    """The largest difference to one process, and the bytes that a rank keeps in host memory."""
    plan, found = graphcache.presets.taylorseer(4, 2, 1), dict[str, tuple[float, int]]()
    for options in ({"backend": "aot_eager", "regions": True}, {"offload": True}, {"max_cache_bytes": 10**6}):
        alone = graphcache.transform(tiny(3), plan)
        made: Any = graphcache.transform(tiny(3), plan, mesh=mesh_of(tokens=2), **options)
        pairs = [(step(made, 1 - i / 4), step(alone, 1 - i / 4)) for i in range(4)]
        largest = max(float((one - two).abs().max()) for one, two in pairs)
        found[next(reversed(options))] = largest, made.summary().branches[0].host_bytes
    return found
