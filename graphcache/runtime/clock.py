"""Which step a call is, told from nothing but its timestep."""

from typing import NamedTuple

import torch

from graphcache.ir.errors import StateError


class Clock(NamedTuple):
    """Where a model stands in its generation; `step` is the step of the latest evaluation.

    An evaluation continues the generation while its timestep goes on in the same direction. A jump back, or
    the first timestep again, begins another generation, and so does any after a generation of a single
    evaluation.
    (A second evaluation at one timestep is that of a second-order solver, whose timesteps have two each but
    for the first; `singles` are timesteps behind the first that had one.)
    """

    steps: int
    step: int
    first: float
    last: float
    direction: int = 0
    repeats: int = 1
    singles: int = 0

    @staticmethod
    def begin(steps: int, timestep: float, start: int = 0) -> "Clock":
        return Clock(steps, start, timestep, timestep)

    @property
    def takes_another(self) -> bool:
        """Whether one more evaluation at the latest timestep can be that of a second-order solver."""
        return self.last != self.first and self.repeats == 1 and not self.singles

    def advance(self, timestep: float) -> "Clock | None":
        """The clock after one more evaluation, or None when that begins another generation.

        Raises:
            StateError: the generation goes on beyond the plan's last step.
        """
        if timestep == self.last:
            return self._next(timestep, self.direction, self.repeats + 1) if self.takes_another else None
        if not self.direction and self.step + 1 >= self.steps:
            return None
        direction = 1 if timestep > self.last else -1
        if timestep == self.first or self.direction not in (0, direction):
            return None
        return self._next(timestep, direction, 1)

    def _next(self, timestep: float, direction: int, repeats: int) -> "Clock":
        if self.step + 1 >= self.steps:
            raise StateError(
                f"the plan has {self.steps} steps and this generation goes on to another one, at timestep "
                f"{timestep:g} after {self.last:g}; call model.reset(steps=...) before a generation with "
                "another number of model evaluations, or reset() if this is a new generation"
            )
        alone = repeats == 1 and self.last != self.first and self.repeats == 1
        singles = self.singles + alone
        return Clock(self.steps, self.step + 1, self.first, timestep, direction, repeats, singles)


def read_progress(timestep: torch.Tensor) -> float:
    """How far along a call is: its timestep, or the mean where samples, frames or tokens have their own.

    Waits for the device.
    """
    if timestep.numel() == 1:
        return float(timestep.item())
    values = timestep.detach().double()
    low, high, mean = torch.stack((*torch.aminmax(values), values.mean())).tolist()
    return float(high if low == high else mean)
