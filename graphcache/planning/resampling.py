"""Plans for other numbers of steps, found by the profile that a plan was found by."""

import logging
from dataclasses import dataclass, replace

from graphcache import presets
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.planning.prediction import speedup
from graphcache.planning.profile import Profile
from graphcache.planning.search import search
from graphcache.planning.timeline import meet

log = logging.getLogger("graphcache")


@dataclass(frozen=True, eq=False)
class Resampler:
    """For `transform(..., resample=)`: what a found plan becomes in generations of another length.

    A plan as fast as the given one is searched by the profile as it is at so many steps (`search(steps=)`),
    which takes seconds, once for each length. Where there is none, as with few steps, or the plan is for
    another number of steps than the profile, it is resampled as without a profile, and the log says why.
    """

    profile: Profile

    def __call__(self, plan: Plan, steps: int) -> Plan:
        """The plan for so many steps.

        Raises:
            GraphCacheError: the profile is of another model than the plan.
        """
        graph = self.profile.provenance.graph
        if plan.graph not in (None, graph):
            raise GraphCacheError(
                f"resample=: the plan is for model {plan.graph}, and the profile of model {graph}; give the "
                "profile that the plan was found by"
            )
        if plan.steps != self.profile.steps:
            return _without(plan, steps, f"the profile is of {self.profile.steps} steps")
        try:
            wanted = speedup(meet("given", plan, self.profile))
            found = search(self.profile, steps=steps, speedup=wanted).plan
        except GraphCacheError as error:
            return _without(plan, steps, str(error))
        return replace(found, graph=plan.graph, scheduler=plan.scheduler, conditional=plan.conditional)


def _without(plan: Plan, steps: int, reason: str) -> Plan:
    """What a plan becomes without its profile."""
    log.warning(
        "no plan of %d steps was found by the profile, and the given one is resampled, lines in the place of "
        "its coefficients: %s",
        steps,
        reason,
    )
    return presets.resample(plan, steps)
