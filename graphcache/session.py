"""One sequence of generations: who runs it, where it stands, and the caches of its branches."""

import asyncio
import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphcache.clock import Clock
from graphcache.ir.errors import StateError
from graphcache.runner import BranchState
from graphcache.schedulers import Driver

Branch = tuple[str, int]
"""The name of the cache context, and which of the calls it is that a step makes under that name."""

MOST_BRANCHES = 16
"""Branches whose state a session keeps; beyond, the one called longest ago is dropped."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A run through a schedule of `steps` evaluations, at one of them.

    `called` are the branches that the step has seen, `before` how many the step before it had. `timesteps` is
    the scheduler's tensor, whose identity is the generation's.
    """

    steps: int
    step: int
    latest: torch.Tensor
    timesteps: torch.Tensor | None = None
    clock: Clock | None = None
    called: tuple[Branch, ...] = ()
    before: int = 0
    begins: bool = True

    def at(self, step: int, timestep: torch.Tensor, clock: Clock | None = None) -> "Generation":
        """The same generation at a later evaluation."""
        return replace(
            self,
            step=step,
            latest=timestep,
            clock=clock,
            called=(),
            before=len(self.called),
            begins=False,
        )

    def by(self, branch: Branch) -> "Generation":
        return replace(self, called=(*self.called, branch))

    @property
    def untouched(self) -> bool:
        """Whether no call of it has been made."""
        return self.begins and not self.called

    @property
    def finished(self) -> bool:
        """Whether the last step has seen as many branches as the step before it."""
        return self.step + 1 == self.steps and len(self.called) >= self.before


class Session:
    """One sequence of generations. It belongs to one thread or asyncio task at a time.

    Attributes:
        branches: how many calls without a context of their own a step makes; None if nobody said.
        waits: whether a timestep may be read at every call, which waits for the device.
        steps: of a generation that no scheduler drives.
        start_step: where the next such generation begins.
    """

    def __init__(self, steps: int, branches: int | None, waits: bool, driver: Driver) -> None:
        self.steps = steps
        self.branches = branches
        self.waits = waits
        self.driver = driver
        self.start_step = 0
        self.generation: Generation | None = None
        self.states: dict[Branch, BranchState] = {}
        self._lock = threading.Lock()
        self._owner: weakref.ref[Any] | None = None

    def claim(self) -> None:
        """Enter a call.

        Raises:
            StateError: another thread or task is in a call, or in the middle of a generation.
        """
        runner = _runner()
        if not self._lock.acquire(blocking=False):
            raise _occupied("is in a call of this model")
        owner = self._owner and self._owner()
        if (
            owner is not None
            and owner is not runner
            and _is_alive(owner)
            and self.generation is not None
            and not self.generation.finished
        ):
            self._lock.release()
            now = self.generation
            raise _occupied(f"is at step {now.step} of {now.steps} of a generation with this model")
        if owner is not runner:
            self._owner = weakref.ref(runner)
            self._drop()

    def release(self) -> None:
        """Leave a call."""
        self._lock.release()

    def leave(self) -> None:
        """The model is called outside of its plan: a generation of this thread or task ends there."""
        if self._owner is not None and self._owner() is _runner():
            self.forget()

    def forget(self) -> None:
        """Drop all caches; whatever comes next begins a generation."""
        self._drop()
        self.start_step = 0

    def _drop(self) -> None:
        self.generation = None
        self.states.clear()

    def enter(self, generation: Generation, branch: Branch, state: BranchState) -> None:
        """Take up what `place` found, once the call has everything that it needs."""
        if generation.untouched:
            self.states.clear()
            self.start_step = 0
        self.generation = generation.by(branch)
        self.states.pop(branch, None)
        self.states[branch] = state
        while len(self.states) > MOST_BRANCHES:
            del self.states[next(iter(self.states))]


def _runner() -> Any:
    """The asyncio task or the thread that this runs in."""
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no event loop
        return threading.current_thread()


def _is_alive(runner: Any) -> bool:
    return runner.is_alive() if isinstance(runner, threading.Thread) else not runner.done()


def _occupied(what: str) -> StateError:
    return StateError(
        f"another thread or task {what}; give each its own cache with `with model.session():`, or call "
        "model.reset() if that generation was given up"
    )
