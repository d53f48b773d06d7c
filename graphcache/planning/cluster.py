"""`Cluster`: profiling, candidates and comparisons on more than one machine, over Ray."""

import logging
import pickle
import random
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import torch

from graphcache.ir.errors import GraphCacheError
from graphcache.libraries.extras import require
from graphcache.planning.profiling import versions

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger("graphcache")

LOST = ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "ObjectLostError", "LocalRayletDiedError")
"""Ray's errors of a worker or a machine, not of the function."""


class Cluster:
    """A Ray cluster, connected to within a `with` block; `profile(..., run=cluster.map)`.

    An embedded cluster of this machine ends with the block; any other one keeps running.

    Args:
        address: "host:port", "ray://host:port", "auto" for one that runs on this machine, or "local" for an
            embedded one; None uses the process's connection if it has one, and else is "local".
        cpus_per_task: CPUs set aside for an item; by default torch's number of threads here, which is what an
            item uses, or 1 if it has GPUs.
        gpus_per_task: GPUs set aside for an item; without any Ray may hide them from it.
        retries: how often an item is run again when its worker is lost.
        options: of `ray.init`, such as `runtime_env={"working_dir": "."}` for modules that other machines
            do not have.

    Raises:
        GraphCacheError: on entry, Ray is missing, nothing answers at the address, or no machine that is up
            has the CPUs and GPUs of an item.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        cpus_per_task: float | None = None,
        gpus_per_task: float = 0,
        retries: int = 3,
        **options: Any,
    ) -> None:
        self.address = address
        self.cpus_per_task = cpus_per_task
        self.gpus_per_task = gpus_per_task
        self.retries = retries
        self.options = options
        self._ray: Any = None
        self._owned = False

    def __enter__(self) -> Self:
        ray = require("ray", "ray", "sharding over a cluster")
        if not ray.is_initialized():
            self._connect(ray)
        elif self.address is not None or self.options:
            raise GraphCacheError(
                "this process is connected to a Ray cluster already; leave out address= and ray.init's "
                "options to use that one, or call ray.shutdown() first"
            )
        self._ray = ray
        try:
            self._refuse_too_small()
        except GraphCacheError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._owned:
            self._ray.shutdown()
        self._ray, self._owned = None, False

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """The function of each item, in their order; each runs on the next worker that is free.

        The function is sent once, and every item gets a copy of its own. If the worker of an item is lost,
        that item alone is run again.

        Results are bit for bit those of the built-in `map` if the function's are the same whenever it is
        called, and the machines' processors are alike: torch picks its kernels by what they support. Sums
        are split among threads, so workers take over this process's number of torch threads, its default
        dtype, its float32 matmul precision and whether algorithms must be deterministic; they refuse other
        versions of torch, diffusers and graphcache. Global random states are seeded with the item's number.

        Raises:
            GraphCacheError: function or item cannot be sent, or all retries of an item lost their worker.
            Exception: what the function raised, when it is the item's turn, with a note that tells the item;
                a GraphCacheError in place of one that cannot be sent back.
        """
        if self._ray is None:
            raise GraphCacheError("the cluster is not connected; map within: with Cluster() as cluster: ...")
        return self._results(function, items)

    def _results(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        ray, settings = self._ray, Settings.current()
        pack = ray.cloudpickle.dumps
        task = ray.remote(num_cpus=self._cpus(), num_gpus=self.gpus_per_task, max_retries=0)(_run)
        sent = ray.put(_sendable(pack, function, "the function"))
        packed = [_sendable(pack, item, f"item {number}") for number, item in enumerate(items)]

        def start(number: int) -> Any:
            return task.remote(settings, sent, packed[number], number)

        shards = _Shards(ray, start, len(packed), self.retries)
        try:
            for number, item in enumerate(items):
                yield shards.result(number, item)
        finally:
            shards.cancel()

    def _cpus(self) -> float:
        if self.cpus_per_task is not None:
            return self.cpus_per_task
        return 1 if self.gpus_per_task else torch.get_num_threads()

    def _connect(self, ray: Any) -> None:
        address = self.address or "local"
        defaults = {"include_dashboard": False} if address == "local" else {}
        options = {**defaults, "logging_level": logging.WARNING, **self.options}
        try:
            _reach(address)
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise GraphCacheError(
                f"no Ray cluster answers at {address}: {error}; start one with `ray start --head`, or leave "
                "out the address for an embedded one"
            ) from error
        self._owned = True

    def _refuse_too_small(self) -> None:
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cpus, gpus = self._cpus(), self.gpus_per_task
        if any(one.get("CPU", 0) >= cpus and one.get("GPU", 0) >= gpus for one in machines):
            return
        largest = max((one.get("CPU", 0) for one in machines), default=0)
        raise GraphCacheError(
            f"no machine of the cluster has the {cpus:g} CPUs and {gpus:g} GPUs of an item (the most CPUs of "
            f"one: {largest:g}); give cpus_per_task= and gpus_per_task=, or lower torch.set_num_threads here"
        )


@dataclass(frozen=True)
class Settings:
    """What a process has set that its results depend on."""

    threads: int
    dtype: torch.dtype
    precision: str
    deterministic: bool
    versions: tuple[tuple[str, str], ...]
    path: tuple[str, ...]

    @staticmethod
    def current() -> "Settings":
        """Those of this process."""
        return Settings(
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            tuple(versions().items()),
            tuple(sys.path),
        )

    def take_over(self) -> None:
        """Make them this process's.

        Raises:
            GraphCacheError: it has other versions of the libraries.
        """
        here = tuple(versions().items())
        if here != self.versions:
            raise GraphCacheError(
                f"a machine of the cluster has {_listed(here)}, the one that sends the work "
                f"{_listed(self.versions)}; install the same versions on both"
            )
        sys.path.extend(folder for folder in self.path if folder not in sys.path)
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.precision)
        torch.use_deterministic_algorithms(self.deterministic)


@dataclass(frozen=True)
class _Outcome:
    """What an item gave: a value, or an error with its traceback's text."""

    value: Any = None
    error: Exception | None = None
    told: str = ""


class _Shards:
    """The items of one `map`, each a task of its own."""

    def __init__(self, ray: Any, start: Callable[[int], Any], count: int, retries: int) -> None:
        self.ray, self.start, self.count, self.retries = ray, start, count, retries
        self.lost = tuple(getattr(ray.exceptions, name) for name in LOST)
        self.losses: Counter[int] = Counter()
        self.finished: dict[int, _Outcome] = {}
        self.running = {start(number): number for number in range(count)}

    def result(self, number: int, item: Any) -> Any:
        """Wait for an item; whichever worker is lost meanwhile, its item is run again."""
        while number not in self.finished:
            self._wait()
        outcome = self.finished.pop(number)
        if outcome.error is None:
            return outcome.value
        outcome.error.add_note(f"{self._named(number)}: {item!r:.200}{outcome.told}")
        raise outcome.error

    def cancel(self) -> None:
        """End what is still running."""
        for task in self.running:
            self.ray.cancel(task, force=True)

    def _wait(self) -> None:
        (task, *_), _ = self.ray.wait(list(self.running))
        number = self.running.pop(task)
        try:
            self.finished[number] = pickle.loads(self.ray.get(task))
        except self.lost as error:
            self._again(number, error)

    def _again(self, number: int, error: Exception) -> None:
        self.losses[number] += 1
        losses, lost = self.losses[number], f"{self._named(number)} lost its worker ({type(error).__name__})"
        told = f"{lost} on attempt {losses} of {self.retries + 1}"
        if losses > self.retries:
            hint = "often a machine is out of memory: raise cpus_per_task, so that fewer run side by side"
            self.finished[number] = _Outcome(error=GraphCacheError(f"{told}; {hint}"))
            return
        log.warning("%s; it is run again", told)
        self.running[self.start(number)] = number

    def _named(self, number: int) -> str:
        return f"item {number} of {self.count}"


def _reach(address: str) -> None:
    """Raise ConnectionError if nothing listens there; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(error) from error


def _run(settings: Settings, function: bytes, item: bytes, number: int) -> bytes:
    """On a worker: an item's outcome."""
    pack = require("ray", "ray", "a worker").cloudpickle.dumps
    try:
        settings.take_over()
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        value = pickle.loads(function)(pickle.loads(item))
        return pack(_Outcome(value))  # type: ignore[no-any-return]
    except Exception as error:
        told = f"; on its worker:\n{traceback.format_exc()}"
        return pack(_Outcome(error=_returnable(pack, error), told=told))  # type: ignore[no-any-return]


def _returnable(pack: Callable[[Any], bytes], error: Exception) -> Exception:
    try:
        pickle.loads(pack(error))
    except Exception:
        return GraphCacheError(f"{type(error).__name__}: {error}")
    return error


def _sendable(pack: Callable[[Any], bytes], thing: Any, name: str) -> bytes:
    try:
        return pack(thing)
    except Exception as error:
        raise GraphCacheError(
            f"{name} cannot be sent to a cluster: {error}; leave out what cannot be pickled, such as open "
            "files, locks and hooks"
        ) from error


def _listed(found: tuple[tuple[str, str], ...]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found)
