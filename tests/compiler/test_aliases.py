"""Compiled graphs run without guards; inputs that were one object once must not stay one."""

import pytest
import torch
from torch import Tensor

import graphcache
from graphcache.ir.plan import Plan
from tiny import arguments, tiny

SHORT_HISTORY = Plan.parse("plan steps=7 preset=none\nt = newton order=2\n* #t#t#tt\n")


def generate(model: torch.nn.Module) -> list[Tensor]:
    results, given = [], arguments()
    with torch.no_grad():
        for step in range(7):
            results.append(model(**given))
            given["x"] = given["x"] - results[-1] / 7
            given["timestep"] = torch.full((2,), 1 - (step + 1) / 7)
    return results


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_history_that_grows_is_read_entry_by_entry(backend: str) -> None:
    expected = generate(graphcache.transform(tiny(), SHORT_HISTORY))
    compiled = graphcache.transform(tiny(), SHORT_HISTORY, backend=backend)
    for ours, reference in zip(generate(compiled), expected, strict=True):
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
