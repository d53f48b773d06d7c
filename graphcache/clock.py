"""Which step a call is, told from nothing but its timestep."""

from dataclasses import dataclass, replace

from graphcache.ir.errors import StateError


@dataclass(frozen=True, slots=True)
class Clock:
    """Where a model stands in its generation; `step` is the step of the latest evaluation.

    An evaluation continues the generation while its timestep goes on in the same direction. A jump back, a
    repeat of the first timestep, or a third evaluation at one timestep begins another generation, and so does
    any after a generation of a single evaluation.
    (A second evaluation at one timestep is that of a second-order solver.)
    """

    steps: int
    step: int
    first: float
    last: float
    direction: int = 0
    repeats: int = 1

    @staticmethod
    def begin(steps: int, timestep: float, start: int = 0) -> "Clock":
        return Clock(steps, start, timestep, timestep)

    def advance(self, timestep: float) -> "Clock | None":
        """The clock after one more evaluation, or None when that begins another generation.

        Raises:
            StateError: the generation goes on beyond the plan's last step.
        """
        if timestep == self.last:
            if timestep == self.first or self.repeats > 1:
                return None
            return replace(self._next(timestep), repeats=self.repeats + 1)
        if not self.direction and self.step + 1 >= self.steps:
            return None
        direction = 1 if timestep > self.last else -1
        if timestep == self.first or self.direction not in (0, direction):
            return None
        return replace(self._next(timestep), direction=direction, repeats=1)

    def _next(self, timestep: float) -> "Clock":
        if self.step + 1 >= self.steps:
            raise StateError(
                f"the plan has {self.steps} steps and this generation goes on to another one, at timestep "
                f"{timestep:g} after {self.last:g}; call model.reset(steps=...) before a generation with "
                "another number of model evaluations, or reset() if this is a new generation"
            )
        return replace(self, step=self.step + 1, last=timestep)
