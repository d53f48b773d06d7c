"""Pipelines that run fewer or more steps than their scheduler has: the plan has as many as calls come."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SCMScheduler,
)
from torch import Tensor

import graphcache
from graphcache import Plan, StateError
from reference import assert_same
from tiny import tiny
from tiny_pipeline import Pipeline


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


WRITTEN = Plan.parse("plan steps=6\n* ####..")


@dataclass(frozen=True)
class Leaving:
    """A schedule of which the last timesteps are not run, or all are."""

    scheduler: Any
    asked: int
    left_out: int
    options: dict[str, Any] = field(default_factory=dict)


SCHEDULES = {
    "its last timestep is where the last step arrives": Leaving(
        SCMScheduler, 6, 1, {"intermediate_timesteps": None}
    ),
    "another pipeline goes on": Leaving(FlowMatchEulerDiscreteScheduler, 8, 2),
    "one more than asked for": Leaving(lambda: PNDMScheduler(skip_prk_steps=True), 5, 0),
    "the same of a scheduler without an index": Leaving(DDIMScheduler, 8, 2),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_plan_has_as_many_steps_as_calls_come(schedule: str, caplog: pytest.LogCaptureFixture) -> None:
    case = SCHEDULES[schedule]
    pipe = Pipeline(case.left_out, transformer=tiny())
    pipe.scheduler, pipe.options = case.scheduler(), case.options
    graphcache.transform(pipe, WRITTEN)
    for _ in range(2):
        pipe(case.asked)
        (branch,) = pipe.transformer.summary().branches
        assert "".join("#" if step.computed else "." for step in branch.steps) == "####.."
        assert branch.plan_steps == 6
    assert "resampled" not in caplog.text


class Staggered(Pipeline):
    """Each sample runs its own copy of the scheduler, and begins some steps after the one before."""

    late = 2

    def __call__(self, steps: int) -> Tensor:
        x, text = torch.linspace(-1, 1, 24).reshape(2, 3, 4), torch.ones(2, 4)
        self.scheduler.set_timesteps(steps)
        copies = [copy.deepcopy(self.scheduler) for _ in range(2)]
        times = [*self.scheduler.timesteps, torch.tensor(0.0)]
        self._num_timesteps = steps + self.late
        for i in range(self._num_timesteps):
            now = [min(max(i - self.late * row, 0), steps) for row in range(2)]
            result = self.denoise(x, torch.stack([times[n] for n in now]), text)
            for row, own in enumerate(copies):
                if 0 <= i - self.late * row < steps:
                    moved = own.step(result[row : row + 1], times[now[row]], x[row : row + 1])
                    x = torch.cat([x[:row], moved.prev_sample, x[row + 1 :]])
        return x


def test_copies_of_a_scheduler_may_be_stepped_one_after_another() -> None:
    pipe = graphcache.transform(Staggered(transformer=tiny()), graphcache.presets.compute(4))
    for _ in range(2):
        assert_same(pipe(4), Staggered(transformer=tiny())(4))
    pipe = graphcache.transform(Staggered(transformer=tiny()), WRITTEN)
    result = pipe(4)
    (branch,) = pipe.transformer.summary().branches
    assert "".join("#" if step.computed else "." for step in branch.steps) == "####.."
    assert not torch.equal(result, Staggered(transformer=tiny())(4))


def test_more_calls_than_anyone_told_of_are_refused_with_what_works() -> None:
    """Twice as many could be two generations."""
    pipe = graphcache.transform(Staggered(transformer=tiny()), graphcache.presets.fora(4))
    pipe.late = 4
    with pytest.raises(StateError, match=r"steps copies of it.*another number of steps.*disabled\(\)"):
        pipe(4)
    pipe.late = 2
    pipe(4)
    pipe.late = 4
    with pipe.transformer.disabled():
        plain = Staggered(transformer=tiny())
        plain.late = 4
        assert_same(pipe(4), plain(4))
