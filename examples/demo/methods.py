"""Ways to sample: the plain model, the same model under a plan, and fewer steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from examples.demo.progress import Progress
from graphcache import Plan, transform


@dataclass(frozen=True)
class Method:
    """A way to sample: a model, a scheduler and a number of steps.

    Attributes:
        model: plain, compiled or transformed.
        sample: as `examples.digits.sample.sample`.
        ideal: FLOPs of the uncached generation divided by this one's.
        plan: what the model runs under, None for the plain one.
    """

    name: str
    model: Any
    sample: Callable[..., Tensor]
    scheduler: Callable[[], Any]
    steps: int
    ideal: float = 1.0
    plan: Plan | None = None

    def generate(self, labels: Tensor, seed: int, progress: Progress) -> Tensor:
        """One sample per label (N,), in [-1, 1]."""
        return self.sample(
            self.model,
            self.scheduler(),
            labels,
            steps=self.steps,
            seed=seed,
            progress=lambda done, total: progress(),
        )

    def compiled(self, labels: Tensor, warm_up_steps: int) -> Method:
        """The plain method, compiled and warm."""
        model = torch.compile(self.model, dynamic=False)
        self.sample(model, self.scheduler(), labels, steps=warm_up_steps)
        return replace(self, model=model)

    def cached(self, name: str, plan: Plan, labels: Tensor, warm_up_steps: int) -> Method:
        """The plain method under a plan, compiled and warm."""
        model = transform(self.model, plan, backend="inductor")
        self.sample(model, self.scheduler(), labels, steps=warm_up_steps)
        ideal = model.summary().branches[0].ideal_speedup
        model.reset()
        return replace(self, name=name, model=model, ideal=ideal, plan=plan)

    def shortened(self, name: str, scheduler: Callable[[], Any], ideal: float) -> Method:
        """The same model with as few steps as cost no less than those of a method with this `ideal`."""
        steps = math.ceil(self.steps / ideal)
        return replace(self, name=name, scheduler=scheduler, steps=steps, ideal=self.steps / steps)

    @property
    def peak_cache_bytes(self) -> int | None:
        """The most bytes that the plan's caches held in the latest generation."""
        if self.plan is None:
            return None
        peaks: list[int] = [branch.peak_bytes for branch in self.model.summary().branches]
        return sum(peaks)
