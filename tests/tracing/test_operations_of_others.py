"""Operations of other libraries: looked into where they are made of PyTorch's, else told by what they do."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcache
from graphcache import Plan, presets
from graphcache.ir.graph import LINEAR
from reference import assert_same, capture_call
from untraced import DIM, arguments, by_reference, generation, holding

TOKENS = Plan.parse("plan steps=4 preset=none\na = tokens 0.4 by random multiple=1\n@mlp #a#a\n")


@pytest.fixture(scope="module", autouse=True)
def others() -> Iterator[None]:
    """A library with a product behind an operation of its own, and others."""
    library = torch.library.Library("others", "DEF")
    library.define("packed_mm(Tensor x, Tensor weight, Tensor scale) -> Tensor")
    library.impl("packed_mm", lambda x, weight, scale: x @ (weight * scale).t(), "CPU")
    library.impl("packed_mm", lambda x, weight, scale: x.new_empty(*x.shape[:-1], len(weight)), "Meta")
    library.define("rounded_mm(Tensor x, Tensor weight, Tensor scale) -> Tensor")
    library.impl("rounded_mm", lambda x, weight, scale: x.round() @ (weight * scale).t(), "CPU")
    library.impl("rounded_mm", lambda x, weight, scale: x.new_empty(*x.shape[:-1], len(weight)), "Meta")
    library.define("scaled(Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)")
    library.impl("scaled", _scaled, "CompositeImplicitAutograd")
    yield
    library._destroy()


def _scaled(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, weight * scale), x.amax(-1, keepdim=True)


class Packed(nn.Module):
    """An MLP whose second product is another library's."""

    def __init__(self, name: str = "packed_mm") -> None:
        super().__init__()
        self.name = name
        self.up = nn.Linear(DIM, 2 * DIM)
        self.register_buffer("weight", torch.randint(-127, 128, (DIM, 2 * DIM), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(DIM, 1) / 127)

    def forward(self, x: Tensor) -> Tensor:
        run: Any = getattr(torch.ops.others, self.name)
        made = run(F.gelu(self.up(x)), self.weight, self.scale)
        return made if isinstance(made, Tensor) else made[0] * made[1].tanh()


class Plain(Packed):
    """The same by PyTorch's own operations."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.up(x)) @ (self.weight * self.scale).t()


def marks(name: str) -> dict[str, bool]:
    """The operations of the library that stand in a capture, and whether they are linear layers."""
    model = holding(lambda: Packed(name), 1)
    calls = capture_call(model, arguments(), "timestep").step.calls()
    return {str(n.target): bool(n.meta.get(LINEAR)) for n in calls if str(n.target).startswith("others")}


def test_one_that_multiplies_by_a_matrix_is_a_linear_layer() -> None:
    model, plain = (holding(make, 2) for make in (Packed, Plain))
    given = arguments()
    ours, theirs = graphcache.inspect(model, given), graphcache.inspect(plain, given)
    assert [(s.name, s.role, s.flops) for s in ours.sites] == [
        (s.name, s.role, s.flops) for s in theirs.sites
    ]
    assert ours.flops == theirs.flops
    assert marks("packed_mm") == {"others.packed_mm.default": True}


@pytest.mark.parametrize("name", ["packed_mm", "scaled", "rounded_mm"])
def test_results_are_the_models(name: str) -> None:
    model = holding(lambda: Packed(name), 2)
    with torch.no_grad():
        assert_same(generation(graphcache.transform(model, presets.compute(4))), generation(model))
        cached = graphcache.transform(model, presets.fora(4, interval=2))
        results = generation(cached)
        assert_same(results, by_reference(cached, presets.fora(4, interval=2)))


@pytest.mark.parametrize("name", ["packed_mm", "scaled"])
def test_its_rows_are_known(name: str) -> None:
    cached = graphcache.transform(holding(lambda: Packed(name), 2), TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(generation(cached), [*by_reference(cached, TOKENS)], atol=1e-4, rtol=1e-4)


def test_one_made_of_pytorchs_gives_way_to_these() -> None:
    assert marks("scaled") == {}


def test_of_any_other_nothing_is_assumed() -> None:
    assert marks("rounded_mm") == {"others.rounded_mm.default": False}
