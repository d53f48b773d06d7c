"""Two ways to compute something are the same operations, or not, whatever bits come of these numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache.tracing.computation import Computation

Way = Callable[[Tensor], Tensor]
TABLE = torch.arange(3.0)
WAVES = TABLE.sin()
STEP = torch.tensor([1.0, 2.0, 3.0])


def operations(way: Way, tensor: Tensor, model: nn.Module | None = None) -> Any:
    computation = Computation(model or nn.Module(), [tensor])
    with torch.no_grad(), computation:
        result = way(tensor)
    return computation.of([result])


def in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] += 2
    x *= 3
    return x


def apart(x: Tensor) -> Tensor:
    return torch.select_scatter(x, x[:, 0] + 2, 1, 0) * 3


def with_more(x: Tensor) -> Tensor:
    (x * 7).sum()
    return nn.functional.dropout(x, 0.1, training=False) + 1


def new_memory(x: Tensor) -> Tensor:
    for _ in range(20):  # memory that is free again is taken for tables of numbers
        x = x + torch.tensor([1.0, 2.0, 3.0])
    return x


def kept(x: Tensor) -> Tensor:
    for _ in range(20):
        x = x + STEP
    return x


SAME: dict[str, tuple[Way, Way]] = {
    "in place": (in_place, apart),
    "what nobody reads": (with_more, lambda x: x + 1),
    "made anew, or kept": (lambda x: x * torch.arange(3.0).sin(), lambda x: x * WAVES),
    "memory used again": (new_memory, kept),
    "views and copies": (lambda x: x.t().contiguous().t() * 2, lambda x: x * 2),
    "by one": (lambda x: x * 1 + 2, lambda x: x + 2),
    "a shape alone": (lambda x: x + torch.zeros_like(x), lambda x: x + torch.zeros(2, 3)),
}
OTHER: dict[str, tuple[Way, Way]] = {
    "a clamp": (lambda x: x.clamp(max=100.0), lambda x: x.clamp(max=10.0)),
    "a factor": (lambda x: x * 2, lambda x: x * 3),
    "a further step": (lambda x: x * 2, lambda x: x.clamp(max=9.0) * 2),
    "twice": (lambda x: x.abs(), lambda x: x.abs().abs()),
    "a table": (lambda x: x * TABLE, lambda x: x * (TABLE + 1)),
    "a size": (lambda x: x.sum(0, keepdim=True), lambda x: x[:1].sum(0, keepdim=True)),
}


@pytest.mark.parametrize("case", SAME)
def test_ways_to_say_one_thing_are_the_same(case: str) -> None:
    tensor = torch.randn(2, 3)
    first, second = (operations(way, tensor) for way in SAME[case])
    assert first == second
    assert first


@pytest.mark.parametrize("case", OTHER)
def test_what_zeros_hide_is_seen(case: str) -> None:
    first, second = OTHER[case]
    assert torch.equal(first(torch.zeros(2, 3)), second(torch.zeros(2, 3)))
    assert operations(first, torch.zeros(2, 3)) != operations(second, torch.zeros(2, 3))


def test_weights_are_known_apart_whatever_they_hold() -> None:
    model = nn.ParameterList([torch.zeros(3), torch.zeros(3)])
    first, second = (operations(lambda x, w=w: x + w, torch.ones(2, 3), model) for w in model)
    assert first != second
