"""Where a call stands: its generation, step and branch, by whatever tells them."""

import logging
import operator
from dataclasses import dataclass
from typing import Any

import torch

from graphcache.ir.errors import StateError
from graphcache.ir.versions import Stamp, stamp, version
from graphcache.runtime.clock import Clock, read_progress
from graphcache.runtime.matching import Call, Matching
from graphcache.runtime.schedulers import Position, belongs, read_timestep, weakly
from graphcache.runtime.session import CallSlot, Generation, Session, Timesteps

Turn = tuple[Generation, CallSlot]

log = logging.getLogger("graphcache")


def place(session: Session, call: Call) -> Turn:
    """The generation at this call's evaluation, and the call's branch. Changes nothing.

    Raises:
        StateError: the call fits nowhere; the message says why and what to do.
    """
    return _Placement(session, call).found()


@dataclass(frozen=True, slots=True)
class _Placement(Matching):
    """One call, held against where its session stands."""

    def found(self) -> Turn:
        position = self.session.driver.position()
        if position is not None:
            return self._scheduled(position)
        fields = self.call.fields
        step, steps = fields.get("step_index"), fields.get("num_inference_steps")
        if step is not None and steps is not None:
            return self._announced(_whole_number(steps), _whole_number(step))
        now = self.session.generation()
        return self._timed(now) if self.session.waits else self._counted(now)

    def _scheduled(self, position: Position) -> Turn:
        """Placed by a scheduler's own state."""
        now, step = self.session.generation(), position.step
        if now is None or now.timesteps is None or now.timesteps.tensor is not position.timesteps:
            return self._begin_scheduled(position)
        if now.clock is not None and (step is None or step == now.start):
            return self._timed(now)
        if not position.tells:
            return self._counted(now)
        if step is None or step == now.step:
            return self._beside(now)
        _refuse_past_end(step, now.steps)
        if step < now.step:
            return self._begin_scheduled(position)
        return self._next(now, step)

    def _begin_scheduled(self, position: Position) -> Turn:
        driver, step = self.session.driver, position.step
        if step is None:
            step = driver.first_step(position.timesteps, self.call.timestep)
        _refuse_past_end(step, len(position.timesteps))
        steps = driver.last_step(position.timesteps, step)
        return self._begin(steps, step, Timesteps(position.timesteps, weakly(self.session.driver.scheduler)))

    def _beside(self, now: Generation) -> Turn:
        """A further call while the scheduler stands where it stood."""
        branch = self.sibling(now)
        if self.is_called(now) and branch not in self.session.states:
            moved = self._moved(now)
            if moved is not None:
                # the pipeline steps copies of its scheduler, which itself stands still
                return self._timed(now._replace(clock=Clock.begin(now.steps, moved, now.step)))
        if branch is None:
            raise self.several(now)
        return now, branch

    def _moved(self, now: Generation) -> float | None:
        """The evaluation's timestep, if the call has another one; waits for the device.

        Raises:
            StateError: it has, in the middle of a generation.
        """
        latest = _unwritten(now)
        if latest is None or self.call.timestep is None:
            return None
        before, progress = read_progress(latest), read_progress(self.call.timestep)
        if progress != before and now.step > now.start:
            raise StateError(
                f"step {now.step}: the pipeline's scheduler stands at timestep {before:g}, but the model "
                f"was called for {progress:g}: another loop calls it; give that `with model.session():`"
            )
        return before if progress != before else None

    def _announced(self, steps: int, step: int) -> Turn:
        """Placed by what the pipeline says at each call; every context has a generation of its own."""
        name = self.call.name
        now = self.session.generation(name)
        _refuse_past_end(step, steps)
        if now is None or now.steps != steps or step < now.step:
            return self._begin(steps, step, line=name)
        if step > now.step:
            return self._next(now, step)
        branch = self.sibling(now)
        if branch is None and (now.finished or self.is_same_call(now)):
            return self._begin(steps, step, line=name)
        if branch is None:
            raise self.several(now)
        return now, branch

    def _timed(self, now: Generation | None) -> Turn:
        """Placed by the timestep alone."""
        if self.call.timestep is None:
            raise _untold(self.call)
        timestep = read_progress(self.call.timestep)
        if now is None or now.clock is None:
            return self._begin_untold(now, timestep)
        if timestep == now.clock.last:
            branch = self.sibling(now)
            if branch is not None:
                return now, branch
            if not now.finished:
                self._refuse_repeated(now, now.clock)
        try:
            clock = now.clock.advance(timestep)
        except StateError as error:
            raise error if now.timesteps is None else _more_than_told(now) from error
        if clock is None:
            return self._begin_untold(now, timestep)
        return self._next(now, clock.step, clock)

    def _refuse_repeated(self, now: Generation, clock: Clock) -> None:
        """Raise StateError unless another evaluation at one timestep is what it may be: that of a
        second-order solver, or the very first call made once more.
        """
        is_again = now.step == now.start and self.is_same_call(now)
        if not (is_again or (clock.takes_another and self.repeats(now))):
            raise self.several(now)

    def _counted(self, now: Generation | None) -> Turn:
        """Placed by counting; where a scheduler drives, a timestep is read when the branch is in doubt."""
        if now is None:
            return self._begin_untold(now)
        if not self.is_called(now) or (not now.finished and self._is_another(now)):
            branch = self.sibling(now)
            if branch is not None:
                return now, branch
            if not self.is_same_call(now):
                raise self.several(now)
            return self._begin_untold(now)
        if now.step + 1 == now.steps:
            if now.timesteps is not None:
                _refuse_past_end(now.steps, now.steps)
            return self._begin_untold(now)
        return self._next(now, now.step + 1)

    def _is_another(self, now: Generation) -> bool:
        """Whether the call belongs to the evaluation at hand; waits for a device where that is in doubt."""
        repeats, free = self.repeats(now), self.free(now)
        timestep = self.call.timestep
        if now.timesteps is None:
            before, count = now.stamp or (lambda: None, -1)
            same = timestep is not None and before() is timestep and version(timestep) == count >= 0
            return same and (not repeats or now.step == now.start)
        if not repeats and any(self.likeness(branch)[1] for branch in free):
            return True
        if repeats and now.step > now.start and len(self._called(now)) >= (self.session.branches or 1):
            return False
        latest = _unwritten(now)
        if timestep is None or latest is None:
            return not (repeats or self.equals_another(now))
        return read_timestep(latest) == read_timestep(timestep)

    def _begin(
        self,
        steps: int,
        step: int,
        timesteps: Timesteps | None = None,
        clock: Clock | None = None,
        line: str | None = None,
    ) -> Turn:
        call = self.call
        made = Generation(steps, step, step, *_marks(call, timesteps, None), timesteps, clock, line)
        return made, (call.name, 0)

    def _begin_untold(self, now: Generation | None, timestep: float | None = None) -> Turn:
        """A generation of which nobody says where it begins, unless it is the rest of a scheduler's."""
        if now is not None and not now.finished and now.step > now.start:
            log.warning("a generation begins, and the one before was given up at %s", now.place)
        steps, start = self.session.steps, self.session.start_step
        timesteps = None if now is None else now.timesteps
        if now is not None and timesteps is not None:
            steps, start = now.steps, now.start
        clock = None if timestep is None else Clock.begin(steps, timestep, start)
        return self._begin(steps, start, timesteps, clock)

    def _next(self, now: Generation, step: int, clock: Clock | None = None) -> Turn:
        """A later evaluation of the generation."""
        later = now.at(step, *_marks(self.call, now.timesteps, now.stamp), clock)
        branch = self.following(now)
        schedule = now.timesteps if clock is None and self.free(later) else None
        last, timestep = _unwritten(now), self.call.timestep
        if (schedule is not None and last is not None and timestep is not None) and (
            branch is None or self.is_stranger(branch)
        ):
            _refuse_foreign(schedule.tensor, now.step, step, last, timestep)
        return later, branch or self.another()


def _marks(
    call: Call, timesteps: Timesteps | None, before: Stamp | None
) -> tuple[tuple[torch.Tensor, int] | None, Stamp | None, tuple[Stamp, ...]]:
    """What a generation notes of the first call of an evaluation.

    A scheduler's position is held against the timestep, which is copied for that where it may be written in
    place: at first, and wherever the tensor of the evaluation before was written since or is used again.
    """
    latents, timestep = tuple(map(stamp, call.latents)), call.timestep
    if timestep is None:
        return None, None, latents
    mark = stamp(timestep)
    if timesteps is None:
        return None, mark, latents
    held = timestep.detach()
    if not _is_left_alone(before, mark):
        held = held.clone()
    return (held, version(held)), mark, latents


def _unwritten(now: Generation) -> torch.Tensor | None:
    """The timestep of an evaluation's first call, if it is still what it was then."""
    if now.latest is None:
        return None
    tensor, count = now.latest
    return tensor if version(tensor) == count else None


def _is_left_alone(before: Stamp | None, mark: Stamp) -> bool:
    """Whether this is another tensor than the one before, and that one was not written since."""
    if before is None or before[1] < 0 or mark[1] < 0:
        return False
    tensor = before[0]()
    return tensor is None or (tensor is not mark[0]() and version(tensor) == before[1])


def _untold(call: Call) -> StateError:
    return StateError(
        "nothing tells the step of this call: no scheduler drives it, and none of its arguments looks like a "
        "timestep. Name that with transform(..., timestep=...), say which scheduler drives these calls with "
        "`with model.session(scheduler=...):`, or let calls be counted with transform(..., wait='never'): "
        f"this call has {', '.join(call.names)}"
    )


def _more_than_told(now: Generation) -> StateError:
    return StateError(
        f"the pipeline's scheduler has {now.steps} steps and stands still, and the model is called for "
        "further ones: the pipeline steps copies of it and does not say how often. Run it with another "
        "number of steps, or without a plan: with model.disabled()"
    )


def _whole_number(field: Any) -> int:
    try:
        return operator.index(field)
    except TypeError as error:
        raise StateError(
            f"cache_context: step_index and num_inference_steps are whole numbers, not {field!r}"
        ) from error


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
