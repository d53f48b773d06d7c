"""Where a call stands: its generation, step and branch, and the caches of the branches."""

import asyncio
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphcache.clock import Clock
from graphcache.ir.errors import StateError
from graphcache.runner import BranchState, Key
from graphcache.schedulers import Driver, Position, belongs, read_timestep

Branch = tuple[str, int]
"""The name of the cache context, and which of the calls it is that a step makes under that name."""

MOST_BRANCHES = 16
"""Branches whose state a session keeps; beyond, the one called longest ago is dropped."""

UNDECLARED = 4
"""Calls at one step that are taken for branches where the scheduler tells the step."""


@dataclass(frozen=True, slots=True)
class Call:
    """What is known of a call before it is placed; `fields` are those of the cache context."""

    name: str
    fields: Mapping[str, Any]
    key: Key
    constants: tuple[torch.Tensor, ...]
    timestep: torch.Tensor


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

    def at(self, step: int, call: Call, clock: Clock | None = None) -> "Generation":
        """The same generation at a later evaluation."""
        return replace(
            self,
            step=step,
            latest=call.timestep,
            clock=clock,
            called=(),
            before=len(self.called),
            begins=False,
        )

    def by(self, branch: Branch) -> "Generation":
        return replace(self, called=(*self.called, branch))

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
        if generation.begins and not generation.called:
            self.states.clear()
            self.start_step = 0
        self.generation = generation.by(branch)
        self.states.pop(branch, None)
        self.states[branch] = state
        while len(self.states) > MOST_BRANCHES:
            del self.states[next(iter(self.states))]

    def place(self, call: Call) -> tuple[Generation, Branch]:
        """The generation at this call's evaluation, and the call's branch. Changes nothing.

        Raises:
            StateError: the call fits nowhere; the message says why and what to do.
        """
        position = self.driver.position()
        if position is not None:
            return self._scheduled(call, position)
        if "step_index" in call.fields and "num_inference_steps" in call.fields:
            return self._announced(call, call.fields["num_inference_steps"], call.fields["step_index"])
        return self._timed(call) if self.waits else self._counted(call)

    def _scheduled(self, call: Call, position: Position) -> tuple[Generation, Branch]:
        """Placed by a scheduler's own state."""
        now, step = self.generation, position.step
        steps = len(position.timesteps)
        if now is None or now.timesteps is not position.timesteps:
            if step is None:
                step = self.driver.first_step(position.timesteps, call.timestep)
            _refuse_past_end(step, steps)
            return self._begin(call, steps, step, position.timesteps)
        if not position.tells:
            return self._counted(call)
        if step is None or step == now.step:
            return now, self._another(call, now, self.branches or UNDECLARED)
        _refuse_past_end(step, steps)
        if step < now.step:
            return self._begin(call, steps, step, position.timesteps)
        return self._next(call, now, step)

    def _announced(self, call: Call, steps: int, step: int) -> tuple[Generation, Branch]:
        """Placed by what the pipeline says at each call."""
        now = self.generation
        _refuse_past_end(step, steps)
        if now is None or now.steps != steps or step < now.step:
            return self._begin(call, steps, step)
        if step > now.step:
            return self._next(call, now, step)
        if self._is_called(call, now) and len(self._known(call)) >= (self.branches or 1):
            return self._begin(call, steps, step)
        return now, self._another(call, now, self.branches or 1)

    def _timed(self, call: Call) -> tuple[Generation, Branch]:
        """Placed by the timestep alone."""
        now, timestep = self.generation, read_timestep(call.timestep)
        if now is None or now.clock is None:
            return self._begin_timed(call, timestep)
        if timestep == now.clock.last:
            if not self._is_called(call, now):
                return now, self._another(call, now, 1)
            if not (now.finished or self._is_repeated(call, now)):
                known, limit = len(self._known(call)), self.branches or 1
                if self._free(call, now) or known < limit:
                    return now, self._another(call, now, limit)
                if self.branches is None:
                    raise self._second_branch(call, now)
        clock = now.clock.advance(timestep)
        if clock is None:
            return self._begin_timed(call, timestep)
        return self._next(call, now, clock.step, clock)

    def _counted(self, call: Call) -> tuple[Generation, Branch]:
        """Placed by counting; where a scheduler drives, a timestep is read when the branch is in doubt."""
        now = self.generation
        if now is None:
            return self._begin(call, self.steps, self.start_step)
        if not self._is_called(call, now):
            return now, self._another(call, now, 1)
        if not self._is_repeated(call, now):
            free = self._free(call, now)
            if free and self._likeness(free, call)[1]:
                return now, free
            if now.timesteps is not None and read_timestep(now.latest) == read_timestep(call.timestep):
                return now, self._another(call, now, self.branches or UNDECLARED)
        if now.step + 1 == now.steps:
            if now.timesteps is not None:
                _refuse_past_end(now.steps, now.steps)
            return self._begin(call, self.steps, self.start_step)
        return self._next(call, now, now.step + 1)

    def _begin(
        self, call: Call, steps: int, step: int, timesteps: torch.Tensor | None = None
    ) -> tuple[Generation, Branch]:
        return Generation(steps, step, call.timestep, timesteps), (call.name, 0)

    def _begin_timed(self, call: Call, timestep: float) -> tuple[Generation, Branch]:
        clock = Clock.begin(self.steps, timestep, self.start_step)
        return Generation(self.steps, self.start_step, call.timestep, clock=clock), (call.name, 0)

    def _next(
        self, call: Call, now: Generation, step: int, clock: Clock | None = None
    ) -> tuple[Generation, Branch]:
        """A later evaluation of the generation."""
        later = now.at(step, call, clock)
        branch = self._free(call, later) or (call.name, 0)
        if now.timesteps is not None and branch in self.states and self._is_stranger(call, branch):
            _refuse_foreign(now.timesteps, now.step, step, now.latest, call.timestep)
        return later, branch

    def _another(self, call: Call, now: Generation, limit: int) -> Branch:
        """The branch of a further call at the present evaluation."""
        branch = self._free(call, now)
        if branch is not None:
            return branch
        known = len(self._known(call))
        if known >= limit:
            raise self._second_branch(call, now)
        return call.name, known

    def _known(self, call: Call) -> list[Branch]:
        return [branch for branch in self.states if branch[0] == call.name]

    def _is_called(self, call: Call, now: Generation) -> bool:
        return any(branch[0] == call.name for branch in now.called)

    def _free(self, call: Call, now: Generation) -> Branch | None:
        """The branch that the evaluation has not seen yet and that is most like the call."""
        free = sorted(branch for branch in self._known(call) if branch not in now.called)
        return max(free, key=lambda branch: self._likeness(branch, call), default=None)

    def _likeness(self, branch: Branch, call: Call) -> tuple[bool, int]:
        """Whether a branch was called with the same signature, and how many inputs are the same objects."""
        state = self.states[branch]
        if state.key != call.key:
            return False, 0
        return True, sum(map(_is, state.constants, call.constants))

    def _is_repeated(self, call: Call, now: Generation) -> bool:
        """Whether one of the step's calls had just these inputs: then this is another evaluation."""
        every = (True, len(call.constants))
        called = (branch for branch in now.called if branch in self.states and branch[0] == call.name)
        return any(self._likeness(branch, call) == every for branch in called)

    def _is_stranger(self, call: Call, branch: Branch) -> bool:
        """Whether none of the inputs is what the branch was called with."""
        return bool(call.constants) and not self._likeness(branch, call)[1]

    def _second_branch(self, call: Call, now: Generation) -> StateError:
        where = f"branch '{call.name}'" if call.name else "this model"
        calls = sum(branch[0] == call.name for branch in now.called) + 1
        return StateError(
            f"step {now.step}: {where} was called {calls} times at one timestep. If these are "
            "guidance branches, wrap each call in model.cache_context('cond') or "
            f"model.cache_context('uncond'), or say transform(..., branches={calls}), so that each keeps its "
            "own cache; if a generation was given up, call model.reset() before the next one; if another "
            "loop than the pipeline's calls the model, give it model.session()"
        )


def _is(one: object, other: object) -> bool:
    return one is other


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


def _refuse_past_end(step: int, steps: int) -> None:
    if not 0 <= step < steps:
        raise StateError(
            f"the scheduler has {steps} steps and stands at step {step}, behind its last: another loop than "
            "the pipeline's calls the model; give it `with model.session():`, or "
            "`with model.session(scheduler=...):` for the scheduler that drives it"
        )


def _refuse_foreign(
    timesteps: torch.Tensor, before: int, step: int, last: torch.Tensor, timestep: torch.Tensor
) -> None:
    """All inputs changed: make sure that it is the scheduler that drives this call."""
    values: list[float] = timesteps.tolist()
    if belongs(values, before, read_timestep(last)) and not belongs(values, step, read_timestep(timestep)):
        raise StateError(
            f"step {step}: the pipeline's scheduler stands at timestep {values[step]:g}, but the model was "
            f"called for {read_timestep(timestep):g}, with other inputs than before: another loop calls it; "
            "give that `with model.session(scheduler=...):`"
        )
