"""Models and users that do uncommon things: the answer stays right, or is refused."""

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache.ir.plan import Plan
from tiny import TinyDiT, arguments, tiny
from zoo import CASES

REUSED = Plan.parse("plan steps=3 preset=none\n@mlp #..\n")
TIMES = (1.0, 0.5, 0.2)


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def call(x: Tensor, time: float) -> dict[str, Tensor]:
    return {"x": x * time, "timestep": torch.full((x.shape[0],), time)}


class Colliding(nn.Module):
    """Two weights whose paths differ only in where the dots are."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.attn_to = nn.Module(), nn.Module()
        self.attn.to_q = nn.Linear(4, 4, bias=False)
        self.attn_to.q = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.attn_to.q(self.attn.to_q(x)) * timestep[:, None, None]


def test_weights_keep_apart_whatever_their_paths() -> None:
    model = Colliding().eval()
    cached = graphcache.transform(model, graphcache.presets.compute(2))
    inputs = call(torch.randn(2, 3, 4), 1.0)
    assert torch.equal(cached(**inputs), model(**inputs))


class Features(nn.Module):
    """Returns the branch's own value, a value of the text alone, and its first input beside the result."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        y = self.down(nn.functional.gelu(self.up(x)))
        hoisted = self.up(text)
        return x + y * timestep[:, None, None] + hoisted.mean(), y, hoisted[:, :2], x


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_results_may_be_changed_in_place(backend: str | None) -> None:
    model = Features().eval()
    spoiled, spared = (graphcache.transform(model, REUSED, backend=backend) for _ in range(2))
    x, text = torch.randn(2, 3, 4), torch.randn(2, 4)
    for time in TIMES:
        results = spoiled(**call(x, time), text=text)
        for result, expected in zip(results, spared(**call(x, time), text=text), strict=True):
            assert torch.equal(result, expected)
            result.mul_(3)


class Scaled(TinyDiT):
    scale = 1.0

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, timestep, text) * self.scale


def test_a_changed_number_on_a_module_is_seen_at_the_next_generation() -> None:
    model = tiny(kind=Scaled)
    cached = graphcache.transform(model, graphcache.presets.compute(1))
    inputs = arguments()
    cached(**inputs)
    model.scale = 2.0
    assert torch.equal(cached(**inputs), model(**inputs))


def test_a_copy_has_weights_and_a_plan_of_its_own() -> None:
    model = tiny()
    cached = graphcache.transform(model, REUSED)
    twin = copy.deepcopy(cached)
    inputs = arguments()
    expected = model(**inputs)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(**inputs), expected)
    assert twin.plan == REUSED
    assert not torch.equal(cached(**inputs), expected)


def test_a_pickled_model_comes_back_under_its_plan() -> None:
    cached = graphcache.transform(tiny(), REUSED)
    again = pickle.loads(pickle.dumps(cached))
    assert torch.equal(again(**arguments()), cached(**arguments()))
    assert again.plan == REUSED


class Named(OrderedDict):  # type: ignore[type-arg]
    """A mapping that a caller reads by attribute."""

    @property
    def sample(self) -> Tensor:
        return self["sample"]


class Mapped(TinyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Named:
        return Named(sample=super().forward(x, timestep, text))


def test_a_mapping_keeps_its_class() -> None:
    model = tiny(kind=Mapped)
    result = graphcache.transform(model, graphcache.presets.compute(1))(**arguments())
    assert torch.equal(result.sample, model(**arguments()).sample)


def test_a_missing_argument_is_pythons_own_error() -> None:
    inputs = arguments()
    del inputs["text"]
    with pytest.raises(TypeError, match="missing text"):
        graphcache.transform(tiny(), graphcache.presets.compute(1))(**inputs)


def test_branches_that_do_not_return_hold_nothing() -> None:
    cached = graphcache.transform(tiny(), Plan.parse("plan steps=4 preset=none\n@mlp #...\n"))
    for number in range(40):
        with cached.cache_context(f"request {number}"):
            cached(**arguments())
    (one,) = {branch.held_bytes for branch in cached.summary().branches}
    assert len(cached.summary().branches) == 40
    assert one > 0
    for time in (0.9, 0.8):
        with cached.cache_context("request 7"):
            cached(**arguments(time))
    assert [b.branch for b in cached.summary().branches if b.held_bytes] == ["request 7"]


class Fused(nn.Module):
    """Residual adds written with addcmul and with alpha."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.second = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = torch.addcmul(x, timestep[:, None, None].expand_as(x), self.first(x))
        return torch.add(x, self.second(x), alpha=0.5)


def test_fused_residual_adds_are_sites() -> None:
    model = Fused().eval()
    inputs = call(torch.randn(2, 3, 4), 1.0)
    found = graphcache.inspect(model, inputs)
    assert found.roles == {"mlp": 2}
    cached = graphcache.transform(model, REUSED)
    assert torch.equal(cached(**inputs), model(**inputs))
    reused = cached(**call(inputs["x"], 0.5))
    first, second = model.first(inputs["x"]), None
    middle = torch.addcmul(inputs["x"], torch.ones(2, 3, 4), first)
    second = model.second(middle)
    x = inputs["x"] * 0.5
    expected = torch.add(torch.addcmul(x, torch.full((2, 3, 4), 0.5), first), second, alpha=0.5)
    assert torch.equal(reused, expected)


def test_objects_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(graphcache.CaptureError, match="argument text is a object"):
        graphcache.transform(tiny(), graphcache.presets.compute(1))(**{**arguments(), "text": object()})


@pytest.mark.parametrize(("site", "inside"), [("range(0..1)", 4), ("output", 4), ("range(0..0)", 2)])
def test_a_summary_counts_what_lies_inside_a_skipped_site_as_skipped(site: str, inside: int) -> None:
    case = CASES["chunked_dit"]
    plan = Plan.parse(f"plan steps=2 preset=none\n{site} #.\n")
    cached = graphcache.transform(case.make(), plan, timestep=case.timestep)
    for time in (1.0, 0.5):
        cached(**case.kwargs(t=time))
    first, second = cached.summary().branches[0].steps
    assert (first.computed, first.reused, first.skipped) == (5, 0, 0)
    assert (second.computed, second.reused, second.skipped) == (4 - inside, 1, inside)


class TwoStreams(nn.Module):
    """One value added to two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.work = nn.Linear(4, 8), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        left, right = self.enter(x).chunk(2, dim=-1)
        shared = self.work(left + right * timestep[:, None, None])
        return (left + shared) * (right + shared)


def test_one_value_on_two_streams_is_cached_as_one() -> None:
    model, inputs = TwoStreams().eval(), call(torch.randn(2, 3, 4), 1.0)
    assert graphcache.inspect(model, inputs).roles == {"mlp": 2}
    cached = graphcache.transform(model, REUSED)
    cached(**inputs)
    left, right = model.enter(inputs["x"] * 0.5).chunk(2, dim=-1)
    old_left, old_right = model.enter(inputs["x"]).chunk(2, dim=-1)
    shared = model.work(old_left + old_right)
    assert torch.equal(cached(**call(inputs["x"], 0.5)), (left + shared) * (right + shared))
    one = Plan.parse("plan steps=3 preset=none\nblock0.mlp #..\n")
    with pytest.raises(graphcache.PlanError, match="one value added to two streams"):
        graphcache.transform(model, one, example_inputs=inputs)


class Conditional(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.cond(timestep.sum() > 1, lambda y: y + 1, lambda y: y - 1, (x,))


def test_operations_with_graphs_inside_are_refused() -> None:
    with pytest.raises(graphcache.CaptureError, match="inner graph cannot be rewritten"):
        graphcache.transform(Conditional().eval(), graphcache.presets.compute(1))(
            **call(torch.ones(1, 2, 4), 1.0)
        )
