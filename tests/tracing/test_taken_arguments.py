"""Lists that forward takes items out of: what ControlNets and adapters add is passed so."""

from typing import Any

import pytest
import torch
from torch import Tensor

import graphcache
from graphcache import CaptureError, Plan, presets
from reference import assert_same
from tiny import TinyDiT, tiny

STEPS = 4
PLANS = [presets.compute(STEPS), Plan.parse(f"plan steps={STEPS} preset=none\n@mlp #.#.\n@self ##..")]


class Adapted(TinyDiT):
    """Takes a residual for each block off the front of one list, and one off the end of another."""

    def forward(
        self, x: Tensor, timestep: Tensor, text: Tensor, down: list[Tensor], more: dict[str, Any]
    ) -> Tensor:
        gate = (self.time(timestep[:, None]) + self.text(text))[:, None]
        for block in self.blocks:
            x = block(x, gate) + down.pop(0)
        return x + more["up"][0].pop()


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> TinyDiT:
    return tiny(2, Adapted)


@pytest.fixture
def residuals() -> list[Tensor]:
    return [torch.randn(1, 3, 4) for _ in range(6)]


def generated(model: Any, residuals: list[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """What each step gives, and what it leaves of its lists."""
    text, x = torch.ones(1, 4), torch.ones(1, 3, 4)
    results, left = [], []
    for step in range(STEPS):
        down, up = residuals[:3], residuals[3:]
        x = model(x, torch.full((1,), 1 - step / STEPS), text, down=down, more={"up": (up,)})
        results.append(x)
        left += [down, up]
    return results, left


@pytest.mark.parametrize("plan", PLANS, ids=["computed", "reused"])
def test_each_step_leaves_of_them_what_the_model_leaves(
    model: TinyDiT, residuals: list[Tensor], plan: Plan
) -> None:
    expected, _ = generated(model, residuals)
    results, left = generated(graphcache.transform(model, plan), residuals)
    assert_same(results[0], expected[0])
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True)) == (plan is PLANS[0])
    for down, up in zip(left[::2], left[1::2], strict=True):
        assert [id(item) for item in down] == [id(residuals[2])]
        assert [id(item) for item in up] == [id(residuals[3]), id(residuals[4])]


def test_a_list_that_is_used_up_is_the_models_own_error(model: TinyDiT, residuals: list[Tensor]) -> None:
    cached: Any = graphcache.transform(model, PLANS[0])
    call = {"x": torch.ones(1, 3, 4), "text": torch.ones(1, 4), "down": residuals[:3]}
    cached(timestep=torch.ones(1), more={"up": [residuals[3:]]}, **call)
    with pytest.raises(CaptureError, match=r"the model itself fails on this call.*pop from empty list"):
        cached(timestep=torch.zeros(1), more={"up": [residuals[3:]]}, **call)


def test_a_list_that_is_passed_twice_is_refused(model: TinyDiT, residuals: list[Tensor]) -> None:
    """The graph reads the second as it was, where forward would find it shorter."""
    cached: Any = graphcache.transform(model, PLANS[0])
    with pytest.raises(CaptureError, match=r"takes items out of its argument down.*pass a copy"):
        cached(torch.ones(1, 3, 4), torch.ones(1), torch.ones(1, 4), down=residuals, more={"up": [residuals]})
