"""One sequence of generations: who runs it, where it stands, and the caches of its branches."""

import asyncio
import logging
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from graphcache.ir.errors import StateError
from graphcache.ir.state import CacheState
from graphcache.ir.versions import Stamp
from graphcache.runtime.clock import Clock
from graphcache.runtime.runner import BranchState
from graphcache.runtime.schedulers import Driver

CallSlot = tuple[str, int]
"""The name of the cache context, and which of the calls it is that a step makes under that name."""
MOST_LINES = 64
"""Contexts with step fields that may have a generation in progress; the oldest is given up."""

log = logging.getLogger("graphcache")


@dataclass(frozen=True, slots=True)
class Timesteps:
    """What a scheduler was given to run by, and that scheduler, which is not kept alive."""

    tensor: torch.Tensor
    scheduler: Callable[[], Any]

    @property
    def replaced(self) -> bool:
        """Whether the scheduler was given others since, or is gone: what ran by these is over."""
        scheduler = self.scheduler()
        return scheduler is None or scheduler.timesteps is not self.tensor


class Generation(NamedTuple):
    """A run through a schedule of `steps` evaluations, at one of them.

    `called` are the branches that the step has seen, `before` how many the step before it had, `start` is the
    first step. `timesteps` are the scheduler's, whose identity is the generation's. `line` is the cache
    context that alone has this generation, because its fields tell the step; None for one of all calls.
    Of the step's first call `latest` is the timestep with its version, if there is one and a scheduler
    drives: a copy, where it may be written in place. `stamp` and `latents` are marks of that tensor and of
    the latents.
    """

    steps: int
    step: int
    start: int
    latest: tuple[torch.Tensor, int] | None
    stamp: Stamp | None
    latents: tuple[Stamp, ...]
    timesteps: Timesteps | None = None
    clock: Clock | None = None
    line: str | None = None
    called: tuple[CallSlot, ...] = ()
    before: int = 0
    begins: bool = True

    def at(
        self,
        step: int,
        latest: tuple[torch.Tensor, int] | None,
        stamp: Stamp | None,
        latents: tuple[Stamp, ...],
        clock: Clock | None = None,
    ) -> "Generation":
        """The same generation at a later evaluation."""
        called, before = (), len(self.called)
        return Generation(
            self.steps, step, self.start, latest, stamp, latents, self.timesteps, clock, self.line, called,
            before, begins=False,
        )  # fmt: skip

    def by(self, branch: CallSlot) -> "Generation":
        return Generation(
            self.steps, self.step, self.start, self.latest, self.stamp, self.latents, self.timesteps,
            self.clock, self.line, (*self.called, branch), self.before, self.begins,
        )  # fmt: skip

    @property
    def untouched(self) -> bool:
        """Whether no call of it has been made."""
        return self.begins and not self.called

    @property
    def finished(self) -> bool:
        """Whether the last step has seen as many branches as the step before it."""
        return self.step + 1 == self.steps and len(self.called) >= self.before

    def is_over(self, following: "Generation") -> bool:
        """Whether another one may begin in another thread, since nobody goes on with this one."""
        if not following.untouched:
            return False
        return self.step + 1 == self.steps or (self.timesteps is not None and self.timesteps.replaced)

    @property
    def place(self) -> str:
        return f"step {self.step} of {self.steps}"


class Session:
    """One sequence of generations with caches of its own.

    The model's own session belongs to one thread or asyncio task while that is in a call or within a
    generation that goes on. One that was opened belongs to whoever has entered it, and keeps what it holds
    from one `with` to the next until it is closed.

    Attributes:
        branches: how many calls under one name a step makes; None if nobody said.
        waits: whether a timestep may be read at every call, which waits for the device.
        steps: of a generation that no scheduler drives.
        start_step: where the next such generation begins.
        states: what each branch keeps.
    """

    def __init__(
        self, steps: int, branches: int | None, waits: bool, driver: Driver, opened: bool = False
    ) -> None:
        self.steps = steps
        self.branches = branches
        self.waits = waits
        self.driver = driver
        self.opened = opened
        self.closed = False
        self.start_step = 0
        self.states: dict[CallSlot, BranchState] = {}
        self._lines: dict[str | None, Generation] = {}
        self._given_up: deque[tuple[weakref.ref[torch.Tensor], int]] = deque(maxlen=8)
        self._cut_short = 0
        self._lock = threading.Lock()
        self._owner: weakref.ref[Any] | None = None
        self._runner: Any = None

    def generation(self, line: str | None = None) -> Generation | None:
        """The generation in progress, or the one that the context's own fields tell of."""
        return self._lines.get(line)

    @property
    def unfinished(self) -> Generation | None:
        """A generation that has not come to its end."""
        return next((now for now in self._lines.values() if not now.finished), None)

    def claim(self) -> None:
        """Enter a call.

        Raises:
            StateError: another thread or task is in a call, or the session was closed.
        """
        self._refuse_closed()
        if not self._lock.acquire(blocking=False):
            raise _occupied("is in a call of this model")
        self._runner = runner_now()
        owner = self._owner and self._owner()
        if self._owner is not None and owner is not self._runner and not self.opened:
            self._take_over(owner is None or not _is_alive(owner))

    def _refuse_closed(self) -> None:
        if self.closed:
            raise StateError("this session was closed; open another one with model.session()")

    def _take_over(self, is_gone: bool) -> None:
        """Drop what another thread or task has done with, or can no longer go on with.

        A generation that a scheduler drives is known when it goes on, in whatever thread.
        """
        now = self.unfinished
        if now is None or (is_gone and now.timesteps is None):
            if now is not None:
                log.warning("the thread or task of a generation ended at %s: its caches are gone", now.place)
            self.forget()

    def release(self) -> None:
        """Leave a call."""
        self._runner = None
        self._lock.release()

    def refuse_others(self, following: Generation | None) -> None:
        """Raise StateError if another thread or task is in the middle of a generation.

        Args:
            following: the generation that the call belongs to, None if it fits nowhere.
        """
        owner, runner = self._owner and self._owner(), self._runner
        if owner is None or owner is runner or not _is_alive(owner) or not self._competes(owner, runner):
            return
        now = self._lines.get(following.line) if following else self.unfinished
        if now is not None and not now.finished and not (following and now.is_over(following)):
            raise _occupied(f"is at {now.place} of a generation with this model")

    def _competes(self, owner: Any, runner: Any) -> bool:
        """Whether two may not take turns: an opened session's calls may run in any thread, in one task."""
        tasks = isinstance(owner, asyncio.Task) and isinstance(runner, asyncio.Task)
        return tasks or not self.opened

    def leave(self) -> None:
        """The model is called outside of its plan: the generation of whoever calls ends there."""
        if self.opened or (self._owner is not None and self._owner() is runner_now()):
            if now := self.unfinished:
                log.warning("a call outside of the plan ends the generation in progress at %s", now.place)
            self.forget()

    def forget(self) -> None:
        """Drop all caches; whatever comes next begins a generation."""
        self._lines.clear()
        self.states.clear()
        self._given_up.clear()
        self.start_step = 0

    def close(self) -> None:
        """Drop all caches for good."""
        self.forget()
        self.closed = True

    def enter(self, generation: Generation, branch: CallSlot, state: BranchState) -> None:
        """Take up what `place` found, once the call has everything that it needs.

        Raises:
            StateError: the session was closed in another thread meanwhile.
        """
        self._refuse_closed()
        if generation.untouched:
            self._begin(generation)
        elif not generation.called:
            self._release_missing(generation)
        self._owner = weakref.ref(self._runner)
        self._lines[generation.line] = generation.by(branch)
        before = self.states.pop(branch, None)
        if before is not None and before is not state:
            state.ran = before.ran
        self.states[branch] = state

    def _release_missing(self, generation: Generation) -> None:
        """Free what branches had cached that missed a step: they begin anew when they return."""
        for branch, state in self.states.items():
            if generation.line in (None, branch[0]) and state.step + 1 < generation.step:
                state.cache = CacheState()

    def _begin(self, generation: Generation) -> None:
        """Drop what the generation replaces: all, or its own context's and what is over."""
        self._refuse_resumed(generation)
        for line, old in list(self._lines.items()):
            is_past = old.finished and old.step != generation.step
            if generation.line is None or line in (None, generation.line) or is_past:
                self._end(line, old, generation)
        if len(self._lines) >= MOST_LINES:
            line, old = next(iter(self._lines.items()))
            log.warning("context '%s' is given up at %s: too many others go on", line, old.place)
            self._end(line, old, generation)
        self.start_step = 0

    def _end(self, line: str | None, old: Generation, following: Generation) -> None:
        del self._lines[line]
        for branch in [branch for branch in self.states if line in (None, branch[0])]:
            del self.states[branch]
        if old.timesteps is None or old.finished:
            return
        if following.timesteps is not None and following.timesteps.tensor is old.timesteps.tensor:
            log.warning("the scheduler went back from %s: the caches begin anew", old.place)
        else:
            self._say_if_cut_short(old)
            self._given_up.append((weakref.ref(old.timesteps.tensor), old.step))

    def _say_if_cut_short(self, old: Generation) -> None:
        """Generations that all end at once are no requests that were cancelled."""
        self._cut_short = self._cut_short + 1 if old.begins else 0
        if self._cut_short == 3:
            log.warning(
                "three generations in a row were given up after their first step, so that nothing is reused: "
                "does scheduler.timesteps give another tensor at each look, or does something set them anew?"
            )
        elif not old.begins:
            log.info("a generation was given up at %s", old.place)

    def _refuse_resumed(self, generation: Generation) -> None:
        """Two generations that take turns would each find the other's caches gone at every call."""
        if generation.timesteps is None:
            return
        for tensor, step in self._given_up:
            if tensor() is generation.timesteps.tensor and generation.step > step:
                raise StateError(
                    f"a generation goes on at step {generation.step} of its scheduler, and another one has "
                    "taken its place since; give each that runs in turn a session of its own: "
                    "`session = model.session()`, and `with session:` around each of its steps"
                )

    def __del__(self) -> None:
        if not self.opened or self.closed or sys.is_finalizing():
            return
        if now := self.unfinished:
            log.warning("a session was given up at %s; what it had cached is gone", now.place)


def runner_now() -> Any:
    """The asyncio task or the thread that this runs in."""
    loop = asyncio._get_running_loop()
    return (loop and asyncio.current_task(loop)) or threading.current_thread()


def _is_alive(runner: Any) -> bool:
    return runner.is_alive() if isinstance(runner, threading.Thread) else not runner.done()


def _occupied(what: str) -> StateError:
    return StateError(
        f"another thread or task {what}; give each its own cache with `with model.session():`, or call "
        "model.reset() if that generation was given up"
    )
