"""One plan for any number of steps."""

import logging

from graphcache import presets
from graphcache.ir.plan import Plan

log = logging.getLogger("graphcache")


class Plans(dict[int, Plan]):
    """By numbers of evaluations; made when first asked for: a preset is evaluated anew, any other grid
    resampled.
    """

    def __init__(self, given: Plan) -> None:
        super().__init__({given.steps: given})
        self._given = given

    def __missing__(self, steps: int) -> Plan:
        given = self._given
        plan = self[steps] = presets.resample(given, steps)
        how = "resampled" if given.preset is None else "evaluated anew"
        if given.lists_coefficients:
            how += "; its coefficients hold for its own steps, so values are extrapolated linearly"
        log.warning("the plan has %d steps, this generation %d: it was %s", given.steps, steps, how)
        return plan
