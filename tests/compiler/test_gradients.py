"""Gradients through generations of compiled phases: those of the phases as they are."""

from typing import Any

import pytest
import torch
from torch import Tensor

import graphcache
from graphcache import presets
from tiny import arguments, tiny

STEPS = 6
PLANS = {
    "reused": presets.fora(STEPS, interval=2),
    "forecast": presets.taylorseer(STEPS, interval=2),
    "corrected": graphcache.Plan.parse(
        f"plan steps={STEPS} preset=none\nc = tuned compute\n"
        + "".join(
            f"@{kind} #cc.c.\n" + "".join(f"  step {step} = 0.9 0.1\n" for step in (1, 2, 4))
            for kind in ("self", "mlp")
        )
    ),
}


def gradients(model: Any, of: str, first: int) -> list[Tensor]:
    """Of the last result, from step `first` on; the steps before run without."""
    given = arguments()
    weights = [*model.parameters()]
    latents, results = given["x"], []
    asked = [] if of == "latents" else weights
    for step in range(STEPS):
        with torch.set_grad_enabled(step >= first):
            if step == first and of == "latents":
                latents = latents.detach().requires_grad_()
                asked = [latents]
            result = model(**{**given, "x": latents, "timestep": torch.full((2,), 1 - 0.1 * step)})
            latents = latents - 0.5 * result
            results.append(result)
    return [results[-1], *torch.autograd.grad(latents.square().sum(), asked)]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("plan", "backend", "regions"),
    [
        ("reused", "aot_eager", False),
        ("forecast", "aot_eager", True),
        ("corrected", "aot_eager", False),
        ("corrected", "aot_eager", True),
        ("corrected", "inductor", False),
    ],
)
@pytest.mark.parametrize("of", ["latents", "weights"])
def test_compiled_phases_have_the_gradients_of_the_others(
    plan: str, of: str, backend: str, regions: bool
) -> None:
    """What a phase reads has none where nothing is cached yet, and has one at later steps."""
    found = []
    for options in ({}, {"backend": backend, "regions": regions}):
        model = graphcache.transform(tiny(1 + regions), PLANS[plan], **options)
        found.append([gradients(model, of, first) for first in (3, 0, 3)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
