"""Layers of which parts are read: what is left of them, and that it gives the same."""

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcache import Plan, presets
from graphcache.analysis.cost import graph_flops
from graphcache.analysis.liveness import lower
from graphcache.ir.graph import StepGraph
from graphcache.ir.text import render
from graphcache.passes import narrow
from graphcache.passes.base import run
from graphcache.passes.narrow import Narrow
from graphcache.passes.specialize import Specialize
from inside import only_program
from reference import assert_same, capture_call, subject
from seeding import own_numbers
from tiny import arguments

Cut = Callable[[Tensor], tuple[Tensor, ...]]


class Modulated(nn.Module):
    """One block whose shifts, scales and gates are parts of one layer's channels."""

    def __init__(self, cut: Cut, bias: bool = True) -> None:
        super().__init__()
        self.modulation = nn.Linear(1, 24, bias=bias)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.cut = cut

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.cut(self.modulation(timestep[:, None, None]))
        q, k, v = self.qkv(F.layer_norm(x, (4,)) * (1 + scale1) + shift1).chunk(3, dim=-1)
        x = x + gate1 * self.out(F.scaled_dot_product_attention(q, k, v))
        return x + gate2 * self.down(F.gelu(self.up(F.layer_norm(x, (4,)) * (1 + scale2) + shift2)))


def chunked(value: Tensor) -> tuple[Tensor, ...]:
    return value.chunk(6, dim=-1)


def across(value: Tensor) -> tuple[Tensor, ...]:
    """Parts that are no channels: six tokens of four."""
    return value.reshape(-1, 6, 4).chunk(6, dim=1)


def with_their_sum(value: Tensor) -> tuple[Tensor, ...]:
    """Parts of a value that is read whole as well."""
    return tuple(part + value.sum(dim=-1, keepdim=True) for part in value.chunk(6, dim=-1))


CUTS: dict[str, Cut] = {
    "chunk": chunked,
    "split": lambda value: value.split(4, dim=2),
    "split with sizes": lambda value: value.split([4, 4, 4, 4, 4, 4], dim=-1),
    "another dimension": across,
    "read whole": with_their_sum,
}


@cache
@own_numbers
def modulated(name: str, bias: bool = True) -> StepGraph:
    return capture_call(Modulated(CUTS[name], bias), arguments(), "timestep").step


def reused(step: StepGraph, rows: str = "*") -> StepGraph:
    """The phase that reuses some of the block's branches."""
    schedule = lower(Plan.parse(f"plan steps=2 preset=none\n{rows} #."), step.branches)
    return Specialize(schedule.phases[1])(step)


def products(step: StepGraph) -> list[int]:
    """Channels of the products with the modulation's weights."""
    layers = step.module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return [int(node.meta["val"].shape[-1]) for node in layers if node.args[0].meta["val"].shape[-1] == 1]


def same(step: StepGraph, after: StepGraph) -> None:
    made = torch.Generator().manual_seed(1)
    given = [torch.randn(node.meta["val"].shape, generator=made) for _, node in step.ports()]
    torch.testing.assert_close(after.module(*given), step.module(*given), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "worth", "left"),
    [
        pytest.param("*", 1, [4, 4], id="the gates"),
        pytest.param("*", 1 << 20, [16], id="the gates and what lies between them"),
        pytest.param("@self", 1, [16], id="all from the first gate on"),
        pytest.param("@mlp", 1, [12, 4], id="all but what moves the MLP's input"),
        pytest.param("@mlp", 1 << 20, [24], id="everything, as one product"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["chunk", "split", "split with sizes"])
def test_only_what_is_read_is_computed(name: str, bias: bool, rows: str, worth: int, left: list[int]) -> None:
    step = reused(modulated(name, bias), rows)
    with mock.patch.dict(narrow._WORTH, cpu=worth):
        after = Narrow()(step)
        again = Narrow()(after)
    assert sorted(products(after)) == sorted(left)
    assert render(again) == render(after)
    assert graph_flops(step) - graph_flops(after) == 2 * 2 * (24 - sum(left))
    same(step, after)


def test_narrowed_to_the_gates(golden: Callable[[str], None]) -> None:
    with mock.patch.dict(narrow._WORTH, cpu=1):
        golden(render(Narrow()(reused(modulated("chunk")))))


@pytest.mark.parametrize("name", ["another dimension", "read whole"])
def test_what_is_read_otherwise_stays(name: str) -> None:
    step = reused(modulated(name))
    with mock.patch.dict(narrow._WORTH, cpu=1):
        assert products(Narrow()(step)) == products(step) == [24]


class HalfRead(nn.Module):
    """A branch's value is one half of a layer's channels, and nobody reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(4, 8)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        half, _ = self.both(x * timestep[:, None, None]).chunk(2, dim=-1)
        return x + half


def test_a_branchs_own_value_keeps_its_name() -> None:
    step = capture_call(HalfRead(), arguments(), "timestep").step
    with mock.patch.dict(narrow._WORTH, cpu=1):
        (after,) = run([Narrow()], step).branches
    assert after == step.branches[0]


@torch.no_grad()
def test_what_is_compiled_is_narrowed_and_eager_phases_keep_their_bits() -> None:
    on, plan = subject("dit"), presets.fora(4, 2)
    results: dict[str | None, list[Any]] = {}
    with mock.patch.dict(narrow._WORTH, cpu=1):
        for backend in (None, "aot_eager"):
            model = on.transform(plan, backend=backend)
            results[backend] = on.sample(model, plan.steps)
            program = only_program(model)
            flops = [graph_flops(runnable.step) for runnable in program.phases.values()]
            results[backend].append(min(flops))
    eager, compiled = results[None], results["aot_eager"]
    assert compiled.pop() < eager.pop()
    torch.testing.assert_close(compiled, eager)
    assert_same(eager, on.sample(on.reference(plan), plan.steps))
