"""Timings of plans on one rank and on several, interleaved in one run of several processes."""

import pickle
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphcache.compiler.backends import Backend
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.planning.bench import TimedGeneration
from graphcache.runtime.transform import transform

Load = Callable[[], tuple[nn.Module, Mapping[str, Any]]]


@dataclass(frozen=True)
class SharedTiming:
    """A plan on one rank alone and on all: median milliseconds a step, the quartiles over rounds, and the
    most bytes that a rank's caches take.
    """

    name: str
    ranks: int
    alone_ms: float
    alone_low: float
    alone_high: float
    ms: float
    low: float
    high: float
    alone_bytes: int
    rank_bytes: int

    @property
    def speedup(self) -> float:
        """One rank's time by that of all together."""
        return self.alone_ms / self.ms


@dataclass(frozen=True)
class SharedBench:
    """What every rank runs; `load` gives it the model and keyword arguments of one call."""

    load: Load
    plans: Mapping[str, Plan]
    ranks: int
    backend: Backend = "inductor"
    timestep: str | None = None
    latents: str | Sequence[str] = ()
    rounds: int = 7
    threads: int | None = None

    def run(self) -> list[SharedTiming] | None:
        """Time the plans: in the processes that torchrun has started, or in as many of its own.

        Returns:
            What the first rank measured; None in the others.
        """
        from torch import distributed

        if self.ranks < 2:
            raise GraphCacheError(f"--ranks {self.ranks}: give at least 2, which are compared with one")
        if not distributed.is_torchelastic_launched():
            return self._spawned()
        distributed.init_process_group()
        try:
            if distributed.get_world_size() != self.ranks:
                raise GraphCacheError(
                    f"--ranks {self.ranks}: torchrun has started {distributed.get_world_size()} processes; "
                    "give both the same number"
                )
            found = self.measured()
            return None if distributed.get_rank() else found
        finally:
            distributed.destroy_process_group()

    def _spawned(self) -> list[SharedTiming]:
        from torch.multiprocessing.spawn import spawn

        with tempfile.TemporaryDirectory() as folder:
            spawn(_rank, (self, folder), self.ranks)  # type: ignore[no-untyped-call]
            found: list[SharedTiming] = pickle.loads(Path(folder, "found").read_bytes())
        return found

    def measured(self) -> list[SharedTiming]:
        """The timings, as one rank of a group that is there."""
        from torch import distributed
        from torch.distributed.device_mesh import init_device_mesh

        if self.threads:
            torch.set_num_threads(self.threads)
        model, inputs = self.load()
        device = next((weight.device.type for weight in model.parameters()), "cpu")
        mesh = init_device_mesh(device, (self.ranks,), mesh_dim_names=("tokens",))
        found = []
        for name, plan in self.plans.items():
            generation = TimedGeneration(inputs, self.timestep, plan.steps)
            options: dict[str, Any] = {
                "backend": self.backend, "timestep": self.timestep, "latents": self.latents, "wait": "never"
            }  # fmt: skip
            alone: Any = transform(model, plan, **options)
            together: Any = transform(model, plan, mesh=mesh, **options)
            times: dict[int, list[float]] = {1: [], self.ranks: []}
            for turn in range(self.rounds + 1):
                for count, made in ((1, alone), (self.ranks, together)):
                    distributed.barrier()
                    if distributed.get_rank() < count:
                        with torch.no_grad():
                            mean = 1e3 * statistics.fmean(generation.run(made))
                        times[count] += [mean] if turn else []
            if not distributed.get_rank():
                one, all_ranks = (made.summary().branches[0].peak_bytes for made in (alone, together))
                figures = *_quartiles(times[1]), *_quartiles(times[self.ranks])
                found.append(SharedTiming(name, self.ranks, *figures, one, all_ranks))
        return found


def _quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the first and third quartile."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return statistics.median(ordered), ordered[quarter], ordered[-1 - quarter]


def _rank(rank: int, bench: SharedBench, folder: str) -> None:
    """One of the processes that were started for a bench."""
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available() and torch.cuda.device_count() >= bench.ranks:
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    store = f"file://{folder}/store"
    distributed.init_process_group(backend, init_method=store, rank=rank, world_size=bench.ranks)
    found = bench.measured()
    if not rank:
        Path(folder, "found").write_bytes(pickle.dumps(found))
    distributed.destroy_process_group()
