"""Residual adds outside of the repeated blocks: stems, which presets leave alone."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcache
from graphcache import Plan, PlanError, presets
from graphcache.ir.selector import STEM
from modulated import DIM, Attention, Mlp
from tests.analysis.test_streams import STEPS, calls, captured, replaced


class Convolved(nn.Module):
    """A convolution over the tokens, added by the caller or by itself."""

    def __init__(self, adds: bool = False) -> None:
        super().__init__()
        self.conv, self.adds = nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM), adds

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return x + made if self.adds else made


class Skipped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(F.layer_norm(x, x.shape[-1:]))


class Attended(nn.Module):
    """Self-attention with the signature of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.attention(x, x)
        return made


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:])
        x = x + self.attention(h, h)
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


class Stack(nn.Module):
    """What comes before the blocks, the blocks, and what comes behind."""

    def __init__(self, before: list[nn.Module], blocks: list[nn.Module], behind: list[nn.Module]) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.time = nn.Linear(1, DIM)
        self.before, self.behind = nn.Sequential(*before), nn.Sequential(*behind)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.before(self.embed(x) + self.time(timestep[:, None])[:, None])
        for block in self.blocks:
            x = block(x)
        made: Tensor = self.unembed(self.behind(x))
        return made


class Inlined(Stack):
    """The same with every residual add in the model's own forward; attention and MLP come by turns."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.embed(x) + self.time(timestep[:, None])[:, None]
        for module in (*self.before, *self.blocks, *self.behind):
            x = x + module(F.layer_norm(x, x.shape[-1:]))
        made: Tensor = self.unembed(x)
        return made


def blocks(count: int) -> list[nn.Module]:
    return [Block() for _ in range(count)]


def inlined(count: int) -> list[nn.Module]:
    return [module for _ in range(count) for module in (Attended(), Mlp())]


def wrapped(count: int) -> list[nn.Module]:
    return [Skipped(module) for module in inlined(count)]


Made = Callable[[], nn.Module]
MODELS: dict[str, tuple[Made, int, int]] = {
    "position by convolution": (lambda: Stack([Convolved(adds=True)], blocks(3), []), 3, 1),
    "pre- and post-convolutions": (
        lambda: Stack([Convolved(adds=True)], blocks(2), [Convolved(adds=True), Convolved(adds=True)]),
        2,
        3,
    ),
    "embedder with a skip": (lambda: Stack([Skipped(Mlp())], blocks(2), []), 2, 1),
    "one product": (lambda: Stack([Skipped(nn.Linear(DIM, DIM))], blocks(1), []), 1, 1),
    "final refiner": (lambda: Stack([], blocks(2), [Skipped(Mlp(24))]), 2, 1),
    "one block": (lambda: Stack([], blocks(1), []), 1, 0),
    "wrapped": (lambda: Stack([], wrapped(2), []), 2, 0),
    "wrapped, one block": (lambda: Stack([], wrapped(1), []), 1, 0),
    "wrapped, stems": (lambda: Stack([Convolved(adds=True)], wrapped(2), [Skipped(Mlp())]), 2, 2),
    "inlined": (lambda: Inlined([Convolved()], inlined(3), []), 3, 1),
    "inlined, stems on both sides": (lambda: Inlined([Convolved()], inlined(2), [Mlp(24)]), 2, 2),
    "inlined, one block": (lambda: Inlined([Convolved()], inlined(1), []), 1, 1),
}


def made(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name][0]().eval()


@pytest.mark.parametrize("name", MODELS)
def test_stems_are_told_from_blocks(name: str) -> None:
    _, count, stems = MODELS[name]
    found = captured(made(name)).branches
    expected = {"self": count, "mlp": count, STEM: stems} if stems else {"self": count, "mlp": count}
    assert Counter(branch.role for branch in found) == expected
    assert len({branch.name for branch in found}) == len(found)


@pytest.mark.parametrize("name", MODELS)
def test_stems_count_for_no_depth(name: str) -> None:
    step = captured(made(name))
    stands = [branch for branch in step.branches if branch.role != STEM]
    assert step.block_branches == tuple(stands)
    assert step.blocks == len({branch.block for branch in stands})
    assert {branch.depth for branch in stands} >= {0.0}
    if step.blocks > 1:
        assert {b.block: b.depth for b in stands} == {n: n / (step.blocks - 1) for n in range(step.blocks)}
    first = next(i for i, branch in enumerate(step.branches) if branch.role != STEM)
    for i, branch in enumerate(step.branches):
        assert branch.role != STEM or (branch.block, branch.depth) == (-1, float(i > first))


@pytest.mark.parametrize("name", MODELS)
def test_presets_leave_stems_alone(name: str) -> None:
    """`fora` is hooks on the attention and the MLPs of the blocks, and on nothing else."""
    model = made(name)
    assert isinstance(model, Stack)
    branches = [m for m in model.blocks.modules() if isinstance(m, Attention | Mlp)]
    plan = presets.fora(STEPS, interval=2)
    with torch.no_grad():
        with replaced(branches, [action == "#" for action in plan.rows[0].actions]):
            expected = [model(**call) for call in calls()]
        cached = graphcache.transform(model, plan)
        actual = [cached(**call) for call in calls()]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selector", ["before.0.stem", "@stem", "@stem[0..0]"])
def test_a_stem_is_cached_by_name_or_role(selector: str) -> None:
    model = made("pre- and post-convolutions")
    assert isinstance(model, Stack)
    modules = [model.before[0].conv]
    if selector == "@stem":
        modules += [module.conv for module in model.behind]
    plan = Plan.parse(f"plan steps=5 preset=none\n{selector}  #.#.#")
    with torch.no_grad():
        with replaced(modules, [True, False, True, False, True]):
            expected = [model(**call) for call in calls()]
        cached = graphcache.transform(model, plan)
        actual = [cached(**call) for call in calls()]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selector", ["*.stem", "before.*"])
def test_globs_match_no_stem(selector: str) -> None:
    cached = graphcache.transform(made("position by convolution"), Plan(1))
    plan = Plan.parse(f"plan steps=5 preset=none\n{selector}  #.#.#")
    with pytest.raises(PlanError, match="matches no site"):
        graphcache.transform(cached, plan, example_inputs=calls()[0])


def test_token_budgets_are_not_refused_for_a_convolution_before_the_blocks() -> None:
    cached = graphcache.transform(made("position by convolution"), presets.toca(STEPS, multiple=1))
    with torch.no_grad():
        results = [cached(**call) for call in calls()]
    assert all(result.isfinite().all() for result in results)


def test_inspect_lists_stems() -> None:
    seen = graphcache.inspect(made("pre- and post-convolutions"), calls()[0])
    assert seen.blocks == 2
    assert seen.roles == {STEM: 3, "self": 2, "mlp": 2}
    assert "before.0.stem" in str(seen)


def test_a_range_over_all_blocks_computes_the_stems() -> None:
    model = made("position by convolution")
    assert isinstance(model, Stack)
    plan = Plan.parse("plan steps=5 preset=none\nrange(0.0..1.0)  #.#.#")
    expected, change = [], torch.empty(0)
    with torch.no_grad():
        for step, call in enumerate(calls()):
            x = model.before(model.embed(call["x"]) + model.time(call["timestep"][:, None])[:, None])
            if step % 2 == 0:
                change = nn.Sequential(*model.blocks)(x) - x
            expected.append(model.unembed(x + change))
        cached = graphcache.transform(model, plan)
        actual = [cached(**call) for call in calls()]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
