"""Plans for other numbers of steps, found by the profile that a plan was found by."""

from dataclasses import dataclass, replace

from graphcache import presets
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.planning.prediction import speedup
from graphcache.planning.profile import Profile
from graphcache.planning.search import search
from graphcache.planning.timeline import meet


@dataclass(frozen=True, eq=False)
class Resampler:
    """For `transform(..., resample=)`: what a found plan becomes in generations of another length.

    A plan as fast as the given one is searched by the profile as it is at so many steps (`search(steps=)`),
    which takes seconds, once for each length. Where there is none, as with few steps, or the plan is for
    another number of steps than the profile, it is resampled as without a profile.
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
            return presets.resample(plan, steps)
        try:
            wanted = speedup(meet("given", plan, self.profile))
            found = search(self.profile, steps=steps, speedup=wanted).plan
        except GraphCacheError:
            return presets.resample(plan, steps)
        return replace(found, graph=plan.graph, scheduler=plan.scheduler, conditional=plan.conditional)
