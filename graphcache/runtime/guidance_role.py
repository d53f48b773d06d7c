"""Which calls of guidance a call is: of one branch, of both in a doubled batch, or of no guidance."""

from collections.abc import Sequence

import torch

from graphcache.compiler.guidance_half import is_doubled, is_listed_twice
from graphcache.ir.errors import PlanError
from graphcache.ir.plan import Plan
from graphcache.ir.schedule import Role
from graphcache.runtime.spoken import Spoken

_ROLES: dict[str, Role] = {"cond": "cond", "uncond": "uncond"}
"""Of calls in cache contexts with these names."""


def role_of(plan: Plan, name: str, latents: Sequence[torch.Tensor], spoken: Spoken) -> Role:
    """Told by the cache context's name and by the latents; waits for the device where a plan has guidance.

    Raises:
        PlanError: the plan does not say which half is the conditional one, or the halves lie in a list.
    """
    if not plan.is_guided:
        return "only"
    if name in _ROLES:
        return _ROLES[name]
    if not is_doubled(latents):
        if is_listed_twice(latents):
            raise PlanError(
                "row guidance: the latents are a list that holds each sample twice, whose halves cannot "
                "be told apart within the graph; make two calls a step, in model.cache_context('cond') "
                "and ('uncond')"
            )
        spoken.once("the halves of the batch are not the same latents: row guidance has no effect here")
        return "only"
    if plan.conditional is None:
        raise PlanError(
            "row guidance: say which half of the doubled batch is the conditional branch's, with "
            "conditional=last (or first) in the plan's header, or make two calls a step, in "
            "model.cache_context('cond') and ('uncond')"
        )
    return "doubled"
