"""Tuning within a limit of memory: it is kept, and changes no bit."""

import pytest

from graphcache import GraphCacheError, Plan, tune
from linear import Sampler, linear

PLAN = Plan.parse("""
    plan steps=6 preset=none
    f = fitted order=1
    @mlp  ##f#ff
      step 2 = 1.5 -0.5
      step 4 = 1.25 -0.25
      step 5 = 1.75 -0.5
""")


def test_less_than_one_evaluation_needs_is_refused_with_what_would_do() -> None:
    with pytest.raises(GraphCacheError, match=r"memory=0 is less than tuning needs here: \d+ bytes") as told:
        tune(linear(), PLAN, [1], [7], sampler=Sampler(), iterations=1, memory=0)
    least = int(str(told.value).split(": ")[1].split()[0])
    with pytest.raises(GraphCacheError, match=f"needs here: {least} bytes"):
        tune(linear(), PLAN, [1], [7], sampler=Sampler(), iterations=1, memory=least - 1)
    found, whole = (
        tune(linear(), PLAN, [1], [7], sampler=Sampler(), iterations=2, every=1, memory=memory)
        for memory in (least, 1 << 30)
    )
    assert found.curve == whole.curve
