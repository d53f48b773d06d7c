"""Where a diffusers scheduler stands, read from its own state."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcache.ir.errors import PlanError, StateError
from graphcache.ir.plan import Plan
from graphcache.libraries.diffusers_private import announced_steps
from graphcache.runtime.caller import Caller

_Scales = tuple[Callable[[float], float], ...]
_SCALED: _Scales = (lambda t: t, lambda t: t / 1000)
_REVERSED: _Scales = (lambda t: 1 - t / 1000, lambda t: 1000 - t)
"""What pipelines make of a scheduler's timestep before the model sees it."""

_PRECISION = 2**-7
"""Relative; timesteps may have passed through bfloat16."""


@dataclass(frozen=True, slots=True)
class Position:
    """A schedule, by the identity of its timesteps, and the index of the evaluation to come.

    A scheduler that keeps no step index has `tells` False; `step` is None as long as nobody said where it
    begins.
    """

    timesteps: torch.Tensor
    step: int | None
    tells: bool


class Driver:
    """The scheduler that drives a model, looked up at each call because users replace it.

    One that was named drives whatever calls. Else it is that of the pipeline that calls. A loop outside of
    any pipeline follows the one that was given, or another that it was handed in its place.
    """

    def __init__(self, scheduler: Any = None, pipe: Any = None, caller: Caller | None = None) -> None:
        self._scheduler = scheduler
        self._given = weakly(pipe)
        self._caller = caller
        self.below: int | None = None

    @property
    def given(self) -> Any:
        """The pipeline that loops outside of any pipeline follow, if it still exists."""
        return self._given()

    @property
    def pipe(self) -> Any:
        """The pipeline whose scheduler is followed in the present call, None without one."""
        given = self.given
        calling = None if self._caller is None else self._caller.find(given is not None, self.below)
        if self._scheduler is None:
            return given if calling is None else calling
        return calling if getattr(calling, "scheduler", None) is self._scheduler else None

    @property
    def scheduler(self) -> Any:
        """The scheduler as it is now, None without one."""
        return getattr(self.pipe, "scheduler", None) if self._scheduler is None else self._scheduler

    def refuse_other(self, plan: Plan) -> None:
        """Raise PlanError if a plan was made for another kind of scheduler."""
        scheduler = None if plan.scheduler is None else self.scheduler
        found = type(scheduler).__name__
        if scheduler is not None and found != plan.scheduler:
            raise PlanError(
                f"the plan was made for a {plan.scheduler}, and this generation runs a {found}; "
                "search a plan for it, or take scheduler= out of the plan's header to use it anyway"
            )

    def position(self) -> Position | None:
        """Where the scheduler stands; None without one, or when it was never given timesteps.

        One that nobody named or gave drives nothing any more once it is behind its last step: then the calls
        are another loop's.
        """
        scheduler = self.scheduler
        if scheduler is None or getattr(scheduler, "num_inference_steps", None) is None:
            return None
        step = getattr(scheduler, "step_index", None)
        if step is None:
            step = getattr(scheduler, "begin_index", None)
        if self._is_found and step is not None and step >= len(scheduler.timesteps):
            return None
        return Position(scheduler.timesteps, step, hasattr(scheduler, "step_index"))

    @property
    def _is_found(self) -> bool:
        """Whether only the pipeline that calls can be the driver."""
        return self._scheduler is None and self.given is None

    def last_step(self, timesteps: torch.Tensor, first: int) -> int:
        """One more than the index at which a generation ends, by how many steps the pipeline says it runs.

        It may leave out the last timesteps: one that is where the last step arrives, or those that another
        pipeline goes on with. It may also run more steps than its scheduler has, whose copies it steps one
        frame after another; whole rounds more are generations that follow each other.
        """
        length = len(timesteps)
        calling = None if self._caller is None else self._caller.find(below=self.below)
        count = announced_steps(calling)
        if count is None or getattr(calling, "scheduler", None) is not self.scheduler:
            return length
        if count > length:
            return count if count % length else length
        return min(length, first + count) if count > 0 else length

    def first_step(self, timesteps: torch.Tensor, timestep: torch.Tensor | None) -> int:
        """The index at which a generation begins when its scheduler does not tell.

        Reads the timestep, which waits for the device. What the pipeline announces and the beginning are
        asked first, since a scaled timestep may equal another one of the schedule. A model that is given no
        timestep is told by the pipeline alone.

        Raises:
            StateError: the timestep is one of the schedule, or the first one counted the other way.
        """
        pipe = self.pipe
        count = announced_steps(pipe)
        if count is None or count == getattr(self.scheduler, "num_inference_steps", None):
            count = len(timesteps)  # as many as were asked for: those that are left out are the last ones
        announced = max(0, len(timesteps) - count)
        if timestep is None:
            return announced
        values: list[float] = timesteps.tolist()
        now = read_timestep(timestep)
        found = values.index(now) if now in values else None
        for scales in (_SCALED, _REVERSED):
            for index in (announced, 0):
                if not belongs(values, index, now, scales):
                    continue
                if found not in (None, index) and scales is _REVERSED and pipe is None:
                    raise StateError(
                        f"timestep {now:g} may be step {found} of the scheduler's schedule or, counted the "
                        f"other way, step {index}; transform the pipeline rather than its model, or use a "
                        "scheduler with a begin index"
                    )
                return index
        nearest = min(range(len(values)), key=lambda index: abs(values[index] / 1000 - now))
        if found is None and belongs(values, nearest, now, _SCALED[1:]):
            return nearest
        return announced if found is None else found


def weakly(thing: Any) -> Callable[[], Any]:
    """Returns a thing for as long as someone else holds it, or for good if its class allows nothing else."""
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


def read_timestep(timestep: torch.Tensor) -> float:
    """The timestep as a number: the largest where there is one per sample or token.

    Waits for the device.
    """
    return float(timestep.item() if timestep.numel() == 1 else timestep.max().item())


def belongs(
    timesteps: Sequence[float], step: int, timestep: float, scales: _Scales = _SCALED + _REVERSED
) -> bool:
    """Whether a model's timestep can be the one at this index of the schedule."""
    return any(
        abs(scale(timesteps[step]) - timestep) <= _PRECISION * abs(timestep) + 1e-6 for scale in scales
    )
