"""What the demo compares: the plain model, plans, and fewer steps at a plan's cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples.digits.model import ddim_scheduler, dpm_solver_scheduler
from examples.digits.sample import sample
from graphcache import Plan, presets, transform

STEPS = 50
INTERVAL = 3
WARM_UP_STEPS = 5
"""Enough for every phase of the plans below to be compiled."""

Progress = Callable[[], None]


@dataclass(frozen=True)
class Method:
    """A way to sample: a model, a scheduler and a number of steps.

    Attributes:
        ideal: FLOPs of the uncached generation divided by this one's.
        model: a transformed or compiled model.
        plan: what the model runs under, None for the plain one.
    """

    name: str
    model: Any
    scheduler: Callable[[], Any]
    steps: int
    ideal: float
    plan: Plan | None = None

    def generate(self, labels: Tensor, seed: int, progress: Progress) -> Tensor:
        """Images (N, 1, 16, 16) in [-1, 1] for labels (N,)."""
        return sample(
            self.model,
            self.scheduler(),
            labels,
            steps=self.steps,
            seed=seed,
            progress=lambda done, total: progress(),
        )

    @property
    def peak_cache_bytes(self) -> int | None:
        """The most bytes that the plan's caches held in the latest generation."""
        if self.plan is None:
            return None
        peaks: list[int] = [branch.peak_bytes for branch in self.model.summary().branches]
        return sum(peaks)


def plans() -> dict[str, Plan]:
    """The plans shown, by the name they have in the table."""
    return {
        "FORA": presets.fora(STEPS, interval=INTERVAL),
        "TaylorSeer": presets.taylorseer(STEPS, interval=INTERVAL, order=2),
        "TaylorSeer lite": presets.taylorseer(STEPS, interval=INTERVAL, order=2, lite=True),
    }


def compiled_methods(model: nn.Module, labels: Tensor, progress: Progress) -> list[Method]:
    """Every method, compiled and warm; the plain model first. Progress counts models (`model_count`)."""
    plain = torch.compile(model, dynamic=False)
    _warm_up(plain, labels)
    progress()
    methods = [Method("uncached", plain, ddim_scheduler, STEPS, 1.0)]
    for name, plan in plans().items():
        cached: Any = transform(model, plan, backend="inductor")
        _warm_up(cached, labels)
        ideal = cached.summary().branches[0].ideal_speedup
        methods.append(Method(name, cached, ddim_scheduler, STEPS, ideal, plan))
        cached.reset()
        progress()
    fewer = math.ceil(STEPS / methods[1].ideal)
    return [
        *methods,
        Method("fewer DDIM steps", plain, ddim_scheduler, fewer, STEPS / fewer),
        Method("DPM-Solver++", plain, dpm_solver_scheduler, fewer, STEPS / fewer),
    ]


def model_count() -> int:
    """Models to compile."""
    return 1 + len(plans())


def _warm_up(model: Any, labels: Tensor) -> None:
    sample(model, ddim_scheduler(), labels, steps=WARM_UP_STEPS)
