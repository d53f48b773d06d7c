"""Where a diffusers scheduler stands, read from its own state."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcache.ir.errors import PlanError, StateError
from graphcache.ir.plan import Plan

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
    """The scheduler that drives a model, looked up at each call because users replace it."""

    def __init__(self, scheduler: Any = None, pipe: Any = None) -> None:
        self._scheduler = scheduler
        self._pipe = None if pipe is None else weakref.ref(pipe)

    @property
    def pipe(self) -> Any:
        """The pipeline whose scheduler is followed, if it still exists."""
        return None if self._pipe is None else self._pipe()

    @property
    def scheduler(self) -> Any:
        """The scheduler as it is now, None without one."""
        return self._scheduler if self._pipe is None else getattr(self._pipe(), "scheduler", None)

    def refuse_other(self, plan: Plan) -> None:
        """Raise PlanError if a plan was made for another kind of scheduler."""
        found = type(self.scheduler).__name__
        if plan.scheduler is not None and self.scheduler is not None and found != plan.scheduler:
            raise PlanError(
                f"the plan was made for a {plan.scheduler}, and this generation runs a {found}; "
                "search a plan for it, or take scheduler= out of the plan's header to use it anyway"
            )

    def position(self) -> Position | None:
        """Where the scheduler stands; None without one, or when it was never given timesteps."""
        scheduler = self.scheduler
        if scheduler is None or getattr(scheduler, "num_inference_steps", None) is None:
            return None
        step = getattr(scheduler, "step_index", None)
        if step is None:
            step = getattr(scheduler, "begin_index", None)
        return Position(scheduler.timesteps, step, hasattr(scheduler, "step_index"))

    def first_step(self, timesteps: torch.Tensor, timestep: torch.Tensor) -> int:
        """The index at which a generation begins when its scheduler does not tell.

        Reads the timestep, which waits for the device. What the pipeline announces and the beginning are
        asked first, since a scaled timestep may equal another one of the schedule.

        Raises:
            StateError: the timestep is one of the schedule, or the first one counted the other way.
        """
        values: list[float] = timesteps.tolist()
        now = read_timestep(timestep)
        announced = max(0, len(values) - getattr(self.pipe, "_num_timesteps", len(values)))
        found = values.index(now) if now in values else None
        for scales in (_SCALED, _REVERSED):
            for index in (announced, 0):
                if not belongs(values, index, now, scales):
                    continue
                if found not in (None, index) and scales is _REVERSED and self.pipe is None:
                    raise StateError(
                        f"timestep {now:g} may be step {found} of the scheduler's schedule or, counted the "
                        f"other way, step {index}; transform the pipeline rather than its model, or use a "
                        "scheduler with a begin index"
                    )
                return index
        return announced if found is None else found


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
