"""In-place operations turned into values: against eager execution, on random programs."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphcache
from graphcache.tracing.functional import Unknown, detached, functional, inlined, is_functional
from strategies import QUICK

aten = torch.ops.aten
MANY = settings(QUICK, max_examples=15)

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[..., 1:3],
    "stride": lambda x: x[..., 0::2],
    "select": lambda x: x[0],
    "itself": lambda x: x.to(x.dtype).contiguous(),
    "transposed": lambda x: x.transpose(0, -1),
    "unbound": lambda x: x.unbind(-1)[1],
}
WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy": lambda x, y: x.copy_(y.sum()),
    "add": lambda x, y: x.add_(y.mean()),
    "scale": lambda x, y: x.mul_(1.5),
    "fill": lambda x, y: x.fill_(2),
    "diagonal": lambda x, y: x.fill_diagonal_(3) if x.dim() > 1 else None,
    "assign": lambda x, y: x.__setitem__((..., 1), y.sum()),
}
INTO_PARTS = [name for name in VIEWS if name not in ("transposed", "unbound")]
Step = tuple[str, int, int]


class Random(nn.Module):
    """Each step views or changes one of the tensors so far, all of which are read in the end."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        tensors = [x * 2, torch.zeros(4, 4)]
        for name, first, second in self.steps:
            one, other = (tensors[index % len(tensors)] for index in (first, second))
            if name in WRITES:
                WRITES[name](one, other)
                tensors.append(one + 1)
            elif one.dim() > 1 and one.shape[-1] > 2:
                tensors.append(VIEWS[name](one))
        return tuple(tensor.clone() for tensor in tensors)


def steps(views: list[str]) -> st.SearchStrategy[list[Step]]:
    place = st.integers(0, 9)
    return st.lists(st.tuples(st.sampled_from([*views, *WRITES]), place, place), min_size=1, max_size=8)


def exported(module: nn.Module, *inputs: Tensor) -> fx.Graph:
    with torch.no_grad():
        return torch.export.export(module, inputs, strict=False).graph


@MANY
@given(steps(INTO_PARTS))
def test_changes_of_parts_are_values(steps: list[Step]) -> None:
    check(steps)


@MANY
@given(steps(list(VIEWS)))
def test_other_views_are_read_or_refused(steps: list[Step]) -> None:
    with contextlib.suppress(Unknown):
        check(steps)


def check(steps: list[Step]) -> None:
    module, x = Random(steps), torch.randn(4, 4)
    graph = functional(exported(module, x))
    graph.lint()
    assert is_functional(graph)
    expected = module(x)
    for ours, theirs in zip(fx.Interpreter(fx.GraphModule({}, graph)).run(x), expected, strict=True):
        assert torch.equal(ours, theirs)
    values = [node.meta["val"] for node in graph.output_node().all_input_nodes]
    assert {value.shape for value in values} == {value.shape for value in expected}


def test_views_made_before_a_change_are_read_as_they_are_after_it() -> None:
    check([("transposed", 0, 0), ("unbound", 0, 0), ("scale", 0, 0), ("transposed", 0, 0), ("add", 1, 2)])


class Rotary(nn.Module):
    """As models write it: two interleaved halves into an empty tensor."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 1::2] * 3
        out[..., 1::2] = x[..., 0::2]
        return out


def test_two_halves_take_two_scatters() -> None:
    graph = functional(exported(Rotary(), torch.randn(2, 8)))
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    put = [aten.copy.default, aten.slice_scatter.default]
    first = [aten.slice.Tensor, aten.mul.Tensor, aten.slice.Tensor, *put]
    assert targets == [aten.empty_like.default, *first, aten.slice.Tensor, aten.slice.Tensor, *put]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: (x * 2).t().copy_(x),
        lambda x: (x * 2).unsqueeze_(0),
        lambda x: torch.stack([x, x]).unbind(0)[0].mul_(2),
    ],
    ids=["an input", "a transposed view", "a changed shape", "one of several results"],
)
def test_what_is_not_known_is_left_to_pytorch(change: Callable[[Tensor], Tensor]) -> None:
    class Changing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return change(x) + 0

    with pytest.raises(Unknown):
        functional(exported(Changing(), torch.randn(4, 4)))


class Transposed(nn.Module):
    """Writes through a view that no scatter undoes."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        whole = x * 2
        whole.transpose(0, 1)[0].copy_(x[1])
        return whole * timestep


def test_what_is_left_to_pytorch_is_captured_all_the_same() -> None:
    x, step = torch.randn(4, 4), torch.ones(4)
    with pytest.raises(Unknown):
        functional(exported(Transposed(), x, step))
    model = graphcache.transform(Transposed().eval(), graphcache.presets.compute(2))
    with torch.no_grad():
        assert torch.equal(model(x, step), Transposed()(x, step))


class Regions(nn.Module):
    """Two results and a changed tensor leave a region under autocast."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            whole = x @ x
            whole[:, :2].mul_(2)
            half = x / 2
        return half - whole.float()


def test_a_region_without_autocast_becomes_part_of_the_graph() -> None:
    module, x = Regions(enabled=False), torch.randn(4, 4)
    graph = functional(inlined(exported(module, x)))
    assert is_functional(graph)
    assert torch.equal(fx.Interpreter(fx.GraphModule({}, graph)).run(x)[0], module(x))


def test_a_region_under_autocast_stays() -> None:
    graph = exported(Regions(enabled=True), torch.randn(4, 4))
    assert inlined(graph) is graph
    with pytest.raises(Unknown):
        functional(graph)


def test_a_region_that_switches_autocast_off_stays() -> None:
    graph = exported(Regions(enabled=False), torch.randn(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert inlined(graph) is graph


class Detaching(nn.Module):
    """What it detaches, a constant of its own and something that has a gradient, is read before and after."""

    def forward(self, x: Tensor) -> Tensor:
        constant = torch.arange(3.0).detach_()
        y = x * constant
        before = y + 1
        y.detach_()
        return before * 2 + y.cos() * constant


def test_what_is_detached_in_place_is_read_detached_from_there_on() -> None:
    x = torch.randn(2, 3)
    graph = exported(Detaching(), x)
    assert not is_functional(graph)
    detached(graph)
    assert is_functional(graph)
    made = fx.GraphModule(nn.Module(), graph)
    results = []
    for run in (Detaching(), lambda x: made(x)[0]):
        leaf = x.clone().requires_grad_()
        result = run(leaf)
        result.sum().backward()
        results.append((result.detach(), leaf.grad))
    assert all(map(torch.equal, *results))
