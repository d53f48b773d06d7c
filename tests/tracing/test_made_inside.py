"""Tensors that forward makes and fills itself, however it does so: against the model itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, presets

Make = Callable[[Tensor], Tensor]


class Making(nn.Module):
    """Adds something made inside to a projection of its input."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.inner(x) * timestep + self.make(x)


def through_data(x: Tensor) -> Tensor:
    table = torch.empty(4, 4)
    table.data[1:3].copy_(torch.full((2, 4), 3.0))
    table.data[0].fill_(1)
    table.data[3].zero_()
    return x @ table


def through_data_of_a_list(x: Tensor) -> Tensor:
    table = torch.tensor([1.0, 2.0, 3.0, 4.0])
    table.data.mul_(2)
    table.detach()[0] = 9
    return x * table


def indexed(x: Tensor) -> Tensor:
    table = torch.tensor([1.0, 2.0, 3.0, 4.0])
    table[1] = 7
    table[2:] *= x[0, 2:]
    return x * table


def triangular(x: Tensor) -> Tensor:
    table = torch.zeros(4, 4)
    for row in range(4):
        table[row, : row + 1] = 1 / (row + 1)
    return x @ table


def placed(x: Tensor) -> Tensor:
    table = torch.zeros(4, 4)
    table[torch.arange(4), torch.arange(4)] = 2
    table[torch.eye(4) > 0] = 3
    table[[0, 2], 1:] = x[:2, 1:]
    return table


def masked(x: Tensor) -> Tensor:
    table = x * 2
    table[x > 0] = 2
    return table


def from_numpy(x: Tensor) -> Tensor:
    numpy = pytest.importorskip("numpy")
    table = torch.from_numpy(numpy.arange(4, dtype="float32"))
    return x * table + torch.tensor(numpy.ones(4))[:, None].float()


MADE: list[Make] = [
    through_data,
    through_data_of_a_list,
    indexed,
    triangular,
    placed,
    masked,
    from_numpy,
]


def check(make: Make) -> None:
    model = Making(make).eval()
    exact = graphcache.transform(model, presets.compute(2))
    with torch.no_grad():
        for time in (1.0, 0.5):
            x = torch.randn(4, 4)
            assert torch.equal(exact(x.clone(), torch.tensor(time)), model(x.clone(), torch.tensor(time)))


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_what_is_made_inside_has_the_models_bits(make: Make) -> None:
    check(make)


PLACES = torch.tensor([0, 2])
CHANGES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "fill_diagonal": lambda y, x: y.fill_diagonal_(3),
    "masked_fill": lambda y, x: y.masked_fill_(x > 0, -1.0),
    "masked_scatter": lambda y, x: y.masked_scatter_(x > 0, x),
    "index_fill": lambda y, x: y.index_fill_(0, PLACES, 5.0),
    "index_copy": lambda y, x: y.index_copy_(0, PLACES, x[:2]),
    "index_add": lambda y, x: y.index_add_(0, PLACES, x[:2]),
    "scatter": lambda y, x: y.scatter_(0, torch.zeros(1, 4, dtype=torch.long), 1.0),
    "put": lambda y, x: y.put_(PLACES, x[0, :2]),
    "clamp": lambda y, x: y.clamp_(0, 1),
    "addcmul": lambda y, x: y.addcmul_(x, x, value=0.5),
    "addmm": lambda y, x: y.addmm_(x, x),
    "lerp": lambda y, x: y.lerp_(x, 0.3),
    "tril": lambda y, x: y.tril_(),
    "power": lambda y, x: y.pow_(2),
    "floor": lambda y, x: y.div_(2, rounding_mode="floor"),
    "activation": lambda y, x: F.silu(y, inplace=True),
    "cumsum": lambda y, x: y.cumsum_(0),
    "compared": lambda y, x: y.gt_(0),
    "diagonal": lambda y, x: y.diagonal().copy_(x[0]),
    "flat": lambda y, x: y.view(-1)[3:7].add_(1),
    "complex": lambda y, x: torch.view_as_complex(y.view(4, 2, 2)).mul_(2),
    "out": lambda y, x: torch.mul(x, 3, out=y),
    "several": lambda y, x: torch._foreach_mul_([y], 2.0),
    "data": lambda y, x: y.data[1].mul_(x[1]),
    "transposed": lambda y, x: y.t_()[0].add_(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place_have_the_models_bits(name: str) -> None:
    change = CHANGES[name]

    def computed(x: Tensor) -> Tensor:
        y = x * 2
        change(y, x)
        return y

    def constant(x: Tensor) -> Tensor:
        y = torch.ones(4, 4)
        view = y[1:]
        change(y, x)
        return torch.cat([y[:1], view])

    check(computed)
    check(constant)


def test_other_data_behind_a_tensor_is_refused() -> None:
    def replaced(x: Tensor) -> Tensor:
        y = x * 2
        y.data = x * 3
        return y

    with pytest.raises(CaptureError, match=r"assigning to its `\.data`.*`\.copy_\(\)`"):
        check(replaced)
