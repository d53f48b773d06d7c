"""Ranks of a mesh as threads of one process, which exchange what a process group would."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.program import Program
from graphcache.ir.graph import StepGraph
from graphcache.ir.plan import Plan
from graphcache.ir.ranks import Ranks
from graphcache.ir.schedule import Role
from graphcache.libraries.torch_private import ALL_GATHER, ALL_TO_ALL, WAIT
from graphcache.runtime.runner import BranchState, begun, run_step

Mesh = tuple[Ranks, ...]


def line(count: int, shared: Any = "tokens") -> list[Mesh]:
    """Ranks in a row, each with its view of the mesh."""
    return [(Ranks(count, rank, shared, shared),) for rank in range(count)]


def square() -> list[Mesh]:
    """Two by two ranks: halves of guidance, and of each the tokens."""
    return [
        (Ranks(2, half, f"guidance {part}", "guidance"), Ranks(2, part, f"tokens {half}"))
        for half in range(2)
        for part in range(2)
    ]


@dataclass
class Exchange:
    """Where the members of a group meet."""

    size: int
    barrier: threading.Barrier = field(init=False)
    sent: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)

    def gather(self, rank: int, value: Tensor) -> Tensor:
        self.sent[rank] = value
        self.barrier.wait()
        result = torch.cat([self.sent[other] for other in range(self.size)])
        self.barrier.wait()
        return result


@dataclass
class Rank:
    """What one rank did: results and cache bytes of every step, and the exchanges of every phase."""

    mesh: Mesh
    results: list[Any] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    exchanges: Counter[int] = field(default_factory=Counter)


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, exchanges: Mapping[str, Exchange], mesh: Mesh) -> None:
        super().__init__(module)
        self.exchanges, self.numbers = exchanges, {ranks.group: ranks.rank for ranks in mesh}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is ALL_GATHER:
            value, count, group = args
            assert value.is_contiguous()
            assert count == self.exchanges[group].size
            return self.exchanges[group].gather(self.numbers[group], value)
        if target is ALL_TO_ALL:
            value, theirs, ours, group = args
            count, rank = self.exchanges[group].size, self.numbers[group]
            assert value.is_contiguous()
            assert theirs == ours == [1] * count == [1] * len(value)
            return self.exchanges[group].gather(rank, value)[rank::count]
        return args[0] if target is WAIT else super().call_function(target, args, kwargs)


def exchanges_of(step: StepGraph) -> int:
    """How often a step exchanges something."""
    return sum(node.target in (ALL_GATHER, ALL_TO_ALL) for node in step.graph.nodes)


def run_ranks(
    program: Program,
    meshes: Sequence[Mesh],
    plan: Plan,
    calls: Sequence[Sequence[Tensor]],
    role: Role = "only",
) -> list[Rank]:
    """A generation of every rank, on flat inputs step by step."""
    groups = {ranks.group: ranks.count for mesh in meshes for ranks in mesh}
    exchanges = {group: Exchange(count) for group, count in groups.items()}

    def run(mesh: Mesh) -> Rank:
        own = replace(program, mesh=mesh, phases={}, _schedules={}, _sizes={}, _shardings={}, _gatherings={})
        state, rank = begun((), own, plan, 0, role), Rank(mesh)
        try:
            for step, tensors in enumerate(calls):
                state.step = step
                with torch.no_grad():
                    rank.results.append(run_step(state, tensors, evaluator(state, rank)))
                rank.held.append(state.cache.held_bytes())
        except BaseException:
            for exchange in exchanges.values():
                exchange.barrier.abort()
            raise
        return rank

    def evaluator(state: BranchState, rank: Rank) -> Callable[[Runnable, list[Tensor]], Sequence[Tensor]]:
        def evaluate(runnable: Runnable, fed: list[Tensor]) -> Sequence[Tensor]:
            if runnable is state.ready[state.now.phase]:
                rank.exchanges[state.now.phase] = exchanges_of(runnable.step)
            results: Sequence[Tensor] = _Interpreter(runnable.step.module, exchanges, rank.mesh).run(*fed)
            return results

        return evaluate

    with ThreadPoolExecutor(len(meshes)) as pool:
        return list(pool.map(run, meshes))
