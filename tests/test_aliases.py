"""Compiled graphs run without guards; inputs that were one object once must not stay one."""

import pytest
import torch
from torch import Tensor

import graphcache
from graphcache.ir.plan import Plan
from zoo import CASES, Case

SHORT_HISTORY = Plan.parse("plan steps=7 preset=none\nt = newton order=2\n* #t#t#tt\n")


def generate(case: Case, model: torch.nn.Module, static: dict[str, object]) -> list[Tensor]:
    results, latents = [], case.latents()
    with torch.no_grad():
        for step in range(7):
            prediction = case.prediction(model(**case.call(static, latents, 1 - step / 7)))
            latents = latents - prediction / 7
            results.append(prediction)
    return results


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_history_that_grows_is_read_entry_by_entry(backend: str) -> None:
    case = CASES["chunked_dit"]
    model, static = case.make(), case.static(2)
    expected = generate(case, graphcache.transform(model, SHORT_HISTORY, timestep=case.timestep), static)
    compiled = graphcache.transform(model, SHORT_HISTORY, timestep=case.timestep, backend=backend)
    for ours, reference in zip(generate(case, compiled, static), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


class TwoTexts(torch.nn.Module):
    """Adds two conditions, which a caller may pass as one object."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return x + self.project(x + self.project(first) - 2 * second) * timestep[:, None]


def test_one_tensor_for_two_arguments_is_not_remembered() -> None:
    model = TwoTexts().eval()
    cached = graphcache.transform(model, graphcache.presets.compute(2), backend="aot_eager")
    x, one, two = torch.randn(3, 2, 4)
    with torch.no_grad():
        for second in (one, two):
            for time in (1.0, 0.5):
                call = {"x": x, "timestep": torch.full((2,), time), "first": one, "second": second}
                torch.testing.assert_close(cached(**call), model(**call))
