"""Where a call stands: its generation, step and branch, by whatever tells them."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphcache.clock import Clock
from graphcache.ir.errors import StateError
from graphcache.runner import Key
from graphcache.schedulers import Position, belongs, read_timestep
from graphcache.session import Branch, Generation, Session

Place = tuple[Generation, Branch]

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


def place(session: Session, call: Call) -> Place:
    """The generation at this call's evaluation, and the call's branch. Changes nothing.

    Raises:
        StateError: the call fits nowhere; the message says why and what to do.
    """
    return _Placement(session, call).found()


@dataclass(frozen=True, slots=True)
class _Placement:
    """One call, held against what its session has seen."""

    session: Session
    call: Call

    def found(self) -> Place:
        position = self.session.driver.position()
        if position is not None:
            return self._scheduled(position)
        fields = self.call.fields
        if "step_index" in fields and "num_inference_steps" in fields:
            return self._announced(fields["num_inference_steps"], fields["step_index"])
        return self._timed() if self.session.waits else self._counted()

    def _scheduled(self, position: Position) -> Place:
        """Placed by a scheduler's own state."""
        now, step = self.session.generation, position.step
        steps = len(position.timesteps)
        if now is None or now.timesteps is not position.timesteps:
            if step is None:
                step = self.session.driver.first_step(position.timesteps, self.call.timestep)
            _refuse_past_end(step, steps)
            return self._begin(steps, step, position.timesteps)
        if not position.tells:
            return self._counted()
        if step is None or step == now.step:
            return now, self._another(now, self.session.branches or UNDECLARED)
        _refuse_past_end(step, steps)
        if step < now.step:
            return self._begin(steps, step, position.timesteps)
        return self._next(now, step)

    def _announced(self, steps: int, step: int) -> Place:
        """Placed by what the pipeline says at each call."""
        now = self.session.generation
        _refuse_past_end(step, steps)
        if now is None or now.steps != steps or step < now.step:
            return self._begin(steps, step)
        if step > now.step:
            return self._next(now, step)
        if self._is_called(now) and len(self._known()) >= (self.session.branches or 1):
            return self._begin(steps, step)
        return now, self._another(now, self.session.branches or 1)

    def _timed(self) -> Place:
        """Placed by the timestep alone."""
        now, timestep = self.session.generation, read_timestep(self.call.timestep)
        if now is None or now.clock is None:
            return self._begin_untold(timestep)
        if timestep == now.clock.last:
            if not self._is_called(now):
                return now, self._another(now, 1)
            if not (now.finished or self._is_repeated(now)):
                known, limit = len(self._known()), self.session.branches or 1
                if self._free(now) or known < limit:
                    return now, self._another(now, limit)
                if self.session.branches is None:
                    raise self._second_branch(now)
        clock = now.clock.advance(timestep)
        if clock is None:
            return self._begin_untold(timestep)
        return self._next(now, clock.step, clock)

    def _counted(self) -> Place:
        """Placed by counting; where a scheduler drives, a timestep is read when the branch is in doubt."""
        now = self.session.generation
        if now is None:
            return self._begin_untold()
        if not self._is_called(now):
            return now, self._another(now, 1)
        if not self._is_repeated(now):
            free = self._free(now)
            if free and self._likeness(free)[1]:
                return now, free
            if now.timesteps is not None and read_timestep(now.latest) == read_timestep(self.call.timestep):
                return now, self._another(now, self.session.branches or UNDECLARED)
        if now.step + 1 == now.steps:
            if now.timesteps is not None:
                _refuse_past_end(now.steps, now.steps)
            return self._begin_untold()
        return self._next(now, now.step + 1)

    def _begin(
        self, steps: int, step: int, timesteps: torch.Tensor | None = None, clock: Clock | None = None
    ) -> Place:
        return Generation(steps, step, self.call.timestep, timesteps, clock), (self.call.name, 0)

    def _begin_untold(self, timestep: float | None = None) -> Place:
        """A generation of which nobody says where it begins."""
        steps, start = self.session.steps, self.session.start_step
        clock = None if timestep is None else Clock.begin(steps, timestep, start)
        return self._begin(steps, start, clock=clock)

    def _next(self, now: Generation, step: int, clock: Clock | None = None) -> Place:
        """A later evaluation of the generation."""
        later = now.at(step, self.call.timestep, clock)
        branch = self._free(later) or (self.call.name, 0)
        if now.timesteps is not None and branch in self.session.states and self._is_stranger(branch):
            _refuse_foreign(now.timesteps, now.step, step, now.latest, self.call.timestep)
        return later, branch

    def _another(self, now: Generation, limit: int) -> Branch:
        """The branch of a further call at the present evaluation."""
        branch = self._free(now)
        if branch is not None:
            return branch
        known = len(self._known())
        if known >= limit:
            raise self._second_branch(now)
        return self.call.name, known

    def _known(self) -> list[Branch]:
        return [branch for branch in self.session.states if branch[0] == self.call.name]

    def _is_called(self, now: Generation) -> bool:
        return any(branch[0] == self.call.name for branch in now.called)

    def _free(self, now: Generation) -> Branch | None:
        """The branch that the evaluation has not seen yet and that is most like the call."""
        free = sorted(branch for branch in self._known() if branch not in now.called)
        return max(free, key=self._likeness, default=None)

    def _likeness(self, branch: Branch) -> tuple[bool, int]:
        """Whether a branch was called with the same signature, and how many inputs are the same objects."""
        state = self.session.states[branch]
        if state.key != self.call.key:
            return False, 0
        return True, sum(map(operator.is_, state.constants, self.call.constants))

    def _is_repeated(self, now: Generation) -> bool:
        """Whether one of the step's calls had just these inputs: then this is another evaluation."""
        every = (True, len(self.call.constants))
        called = (branch for branch in self._known() if branch in now.called)
        return any(self._likeness(branch) == every for branch in called)

    def _is_stranger(self, branch: Branch) -> bool:
        """Whether none of the inputs is what the branch was called with."""
        return bool(self.call.constants) and not self._likeness(branch)[1]

    def _second_branch(self, now: Generation) -> StateError:
        where = f"branch '{self.call.name}'" if self.call.name else "this model"
        calls = sum(branch[0] == self.call.name for branch in now.called) + 1
        return StateError(
            f"step {now.step}: {where} was called {calls} times at one timestep. If these are "
            "guidance branches, wrap each call in model.cache_context('cond') or "
            f"model.cache_context('uncond'), or say transform(..., branches={calls}), so that each keeps its "
            "own cache; if a generation was given up, call model.reset() before the next one; if another "
            "loop than the pipeline's calls the model, give it model.session()"
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
