"""What only looks like a residual stream is none; true branches are found, and reused as hooks reuse them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import graphcache
from graphcache import presets
from graphcache.ir.graph import StepGraph
from modulated import DIM, TEXT, TOKENS, Attention, Mlp, Modulated, Recipe, recipes
from reference import capture_call
from strategies import QUICK

STEPS = 5


def made(recipe: Recipe) -> Modulated:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Modulated(recipe).eval()


def calls(batch: int = 2) -> list[dict[str, Any]]:
    """The arguments of one generation's steps; the text stays the same object."""
    numbers = torch.Generator().manual_seed(batch)
    text = torch.randn(batch, TEXT, DIM, generator=numbers)
    return [
        {
            "x": torch.randn(batch, TOKENS, DIM, generator=numbers),
            "timestep": torch.full((batch,), 1 - step / STEPS),
            "text": text,
        }
        for step in range(STEPS)
    ]


def captured(model: nn.Module, batch: int = 2) -> StepGraph:
    return capture_call(model, calls(batch)[0], "timestep").step


class Replaced:
    """A forward hook that returns what the module returned at the last computed step."""

    def __init__(self, computed: Sequence[bool]) -> None:
        self.computed, self.step = computed, 0
        self.kept = torch.empty(0)

    def __call__(self, module: nn.Module, args: Any, result: Tensor) -> Tensor:
        if self.computed[self.step]:
            self.kept = result
        self.step += 1
        return self.kept


@contextmanager
def replaced(modules: Sequence[nn.Module], computed: Sequence[bool]) -> Iterator[None]:
    handles = [module.register_forward_hook(Replaced(computed)) for module in modules]
    yield
    for handle in handles:
        handle.remove()


def branches(model: Modulated) -> list[nn.Module]:
    found = [(block.attention, block.cross, block.mlp) for block in model.blocks]
    return [module for block in found for module in block if isinstance(module, Attention | Mlp)]


def check(recipe: Recipe, batch: int = 2) -> None:
    """The roles are those of the recipe, and `fora` is hooks that replace what the branches return."""
    model = made(recipe)
    step = captured(model, batch)
    assert Counter(branch.role for branch in step.branches) == recipe.roles
    assert step.blocks == recipe.blocks
    plan = presets.fora(STEPS, interval=2)
    computed = [action == "#" for action in plan.rows[0].actions]
    with torch.no_grad():
        with replaced(branches(model), computed):
            expected = [model(**call) for call in calls(batch)]
        cached = graphcache.transform(model, plan)
        actual = [cached(**call) for call in calls(batch)]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@QUICK
@given(recipe=recipes)
def test_all_sites_are_true_branches_and_none_is_missing(recipe: Recipe) -> None:
    check(recipe)


@pytest.mark.few(9)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(modulation="expanded"),
        Recipe(modulation="tokens"),
        Recipe(modulation="addcmul"),
        Recipe(modulation="filled"),
        Recipe(modulation="filled like", shared=False),
        Recipe(modulation="filled like", shared=False, text=True),
        Recipe(modulation="tokens", shared=False),
        Recipe(table=True, form="addcmul"),
        Recipe(positions="each", form="swapped"),
        Recipe(positions="normed"),
        Recipe(positions="inside"),
        Recipe(time="added"),
        Recipe(time="expanded"),
        Recipe(time="full", form="alpha"),
        Recipe(time="normed", form="in place"),
        Recipe(form="subtracted"),
        Recipe(form="blended"),
        Recipe(form="blended by gate"),
        Recipe(bias=True, constant=True),
        Recipe(embedding="each"),
        Recipe(embedding="latent"),
        Recipe(token="time"),
        Recipe(token="register", text=True),
        Recipe(again=True),
        Recipe(first="each"),
        Recipe(first="inside"),
    ],
    ids=str,
)
def test_each_construct_by_itself(recipe: Recipe) -> None:
    """With one sample, where what all samples share is as large as a stream."""
    check(recipe, batch=1)
