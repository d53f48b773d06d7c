"""One plan for any number of steps."""

import logging
from collections.abc import Callable

from graphcache import presets
from graphcache.ir.errors import PlanError
from graphcache.ir.plan import Plan

log = logging.getLogger("graphcache")

Resample = Callable[[Plan, int], Plan]
"""The given plan for another number of steps."""


class Plans(dict[int, Plan]):
    """By numbers of evaluations; made when first asked for: by `resample`, or a preset is evaluated anew, any
    other grid resampled.
    """

    def __init__(self, given: Plan, resample: Resample | None = None) -> None:
        super().__init__({given.steps: given})
        self._given, self._resample = given, resample

    def __missing__(self, steps: int) -> Plan:
        given = self._given
        if self._resample is not None:
            plan = self[steps] = _asked(self._resample, given, steps)
            log.warning("the plan has %d steps, this generation %d: resample= made one", given.steps, steps)
            return plan
        plan = self[steps] = presets.resample(given, steps)
        how = "resampled" if given.preset is None else "evaluated anew"
        if given.lists_coefficients:
            how += "; its coefficients hold for its own steps, so values are extrapolated linearly"
        log.warning("the plan has %d steps, this generation %d: it was %s", given.steps, steps, how)
        return plan


def _asked(resample: Resample, given: Plan, steps: int) -> Plan:
    plan = resample(given, steps)
    if not isinstance(plan, Plan) or plan.steps != steps:
        what = f"a plan of {plan.steps} steps" if isinstance(plan, Plan) else type(plan).__name__
        raise PlanError(f"resample= was asked for a plan of {steps} steps, and returned {what}")
    return plan
