"""Phases compiled by regions: what repeats is compiled once, whatever the depth, and computes the same."""

import operator
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import graphcache
from graphcache import GraphCacheError, presets
from graphcache.analysis.repeats import LEAST, Repeats, find_repeats
from graphcache.compiler.compilations import EVERYONES
from graphcache.compiler.flat import flattened, weights_of
from graphcache.compiler.regions import regions
from graphcache.libraries import torch_compilers_private
from inside import programs_of
from reference import assert_same, subject
from strategies import QUICK
from tiny import arguments, tiny
from zoo import CASES

STEPS = 4
FORA = presets.fora(STEPS, interval=2)
GUIDED = "plan steps=4 preset=none\n@self ##.#\nrange(0..0) #.##"


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def generation(call: Any, **kwargs: Any) -> list[Tensor]:
    kwargs = {**arguments(**kwargs)}
    return [call(**{**kwargs, "timestep": torch.full((2,), 1 - 0.2 * step)}) for step in range(STEPS)]


def compiled(run: Any) -> tuple[Any, int]:
    before = counters["stats"]["unique_graphs"]
    result = run()
    return result, counters["stats"]["unique_graphs"] - before


def counted() -> Any:
    """Inductor's calls for single regions."""
    return patch.object(
        torch_compilers_private, "standalone_compile", wraps=torch_compilers_private.standalone_compile
    )


PLANS = {
    "fora": FORA,
    "taylorseer": presets.taylorseer(STEPS, interval=2),
    "toca": presets.toca(STEPS),
    "a range": graphcache.Plan.parse(GUIDED),
}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "how"),
    [("dit", "fora"), ("flux", "toca"), ("wan", "taylorseer"), ("pixart", "a range"), ("sd3", "fora")],
)
def test_regions_change_no_bit(name: str, how: str) -> None:
    plan = PLANS[how]
    case, model = CASES[name], subject(name).model
    static, results = case.static(2), []
    for options in ({"backend": "aot_eager", "regions": True}, {}):
        cached, latents, found = graphcache.transform(model, plan, **options), case.latents(2), []
        for step in range(STEPS):
            found.append(case.prediction(cached(**case.call(static, latents, 1 - step / STEPS))))
            latents = latents - found[-1] / STEPS
        results.append(found)
    assert_same(*results)


@pytest.mark.few(1)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_depth_compiles_nothing(backend: str) -> None:
    made, kept = list[int](), list[Any]()
    with counted() as alone:
        for depth in (4, 9, 12):
            if depth < 12:
                EVERYONES.clear()
            kept.append(graphcache.transform(tiny(depth), FORA, backend=backend, regions=True))
            results, graphs = compiled(lambda: generation(kept[-1]))
            expected = generation(graphcache.transform(graphcache.restore(kept[-1]), FORA))
            for ours, theirs in zip(results, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            made.append(graphs + alone.call_count)
            alone.reset_mock()
    assert made[0] == made[1] > 2
    assert made[2] == 0, "what was compiled for another depth serves this one"
    whole = graphcache.transform(tiny(4), FORA, backend="aot_eager", regions=False)
    assert compiled(lambda: generation(whole))[1] == 2


class Turning(nn.Module):
    """Hands its stream on in other strides than it came in, from the first block on."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))
        self.mixes = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block, mix in zip(self.blocks, self.mixes, strict=True):
            turned = (block(x.transpose(1, 2)).transpose(1, 2) * timestep).sin()
            x = x + mix(turned.tanh() * 2).exp().log1p() + turned.sigmoid()
        return x


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_strides_that_differ_are_compiled_for(backend: str) -> None:
    torch.manual_seed(0)
    model = Turning(5).eval()
    cached: Any = graphcache.transform(model, presets.compute(2), backend=backend, regions=True)
    for step in range(2):
        call = {"x": torch.randn(2, 3, 4), "timestep": torch.tensor(1.0 - step / 2)}
        torch.testing.assert_close(cached(**call), model(**call), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of", ["latents", "weights"])
def test_gradients_are_those_of_the_model(of: str) -> None:
    """The first block may get no gradient where those behind it do."""
    model, gradients = tiny(4), []
    for run in (graphcache.transform(model, presets.compute(1), backend="aot_eager", regions=True), model):
        call = arguments()
        asked = [call["x"].requires_grad_()] if of == "latents" else [*model.parameters()]
        with torch.enable_grad():
            gradients.append(torch.autograd.grad(run(**call).square().sum(), asked))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_autocast_is_that_of_whole_phases(backend: str) -> None:
    model, results = tiny(5), []
    for by_region in (True, False):
        cached = graphcache.transform(model, FORA, backend=backend, regions=by_region)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(generation(cached))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


class Passing(nn.Module):
    """Blocks that hand on what they were given beside what they made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        kept = x
        for block in self.blocks:
            made = nn.functional.dropout(kept, 0.5, training=False)
            x = x + (block(x).sin() * timestep).tanh().exp().log1p() * kept + made.cos().sigmoid()
            kept = nn.functional.dropout(x, 0.5, training=False)
        return x


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_inputs_that_are_one_tensor_in_one_region_need_not_be_in_another(backend: str) -> None:
    model = Passing().eval()
    cached: Any = graphcache.transform(model, presets.compute(2), backend=backend, regions=True)
    for step in range(2):
        call = {"x": torch.randn(2, 3, 4), "timestep": torch.tensor(1.0 - step / 2)}
        torch.testing.assert_close(cached(**call), model(**call), rtol=1e-4, atol=1e-5)


def modules(name: str, plan: graphcache.Plan = FORA) -> Iterator[fx.GraphModule]:
    """The phases of a model, their weights inputs."""
    cached: Any = graphcache.transform(subject(name).model, plan)
    case = CASES[name]
    cached(**case.call(case.static(2), case.latents(2), 1.0))
    (program,) = programs_of(cached)
    schedule = program.schedule(plan)
    for index in range(len(schedule.phases)):
        step = program.phase(schedule, index).step
        yield flattened(step, weights_of(step))


@pytest.mark.parametrize("name", ["dit", "flux", "wan", "cogvideox"])
def test_no_region_hands_a_view_on(name: str) -> None:
    """PyTorch 2.13 reads a view with an offset that a region of one graph hands on wrongly, in silence."""
    for module in modules(name):
        parts = regions(module.graph)
        assert parts, "the phase repeats"
        last = set(module.graph.output_node().all_input_nodes)
        handed = [node for part in parts for node in part.results if node not in last]
        assert handed
        assert not [node for node in handed if is_view(node) or node.op == "placeholder"]


def is_view(node: fx.Node) -> bool:
    made = node.args[0] if node.target is operator.getitem else node
    return isinstance(made, fx.Node) and made.target in VIEWS


VIEWS = {
    getattr(torch.ops.aten, name).default
    for name in ("view", "reshape", "permute", "squeeze", "unsqueeze", "expand", "alias", "detach", "t")
} | {
    torch.ops.aten.transpose.int,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.select.int,
    torch.ops.aten.chunk.default,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.unbind.int,
}


def line(kinds: list[int]) -> list[fx.Node]:
    """A graph of unary operations, each on the one before."""
    operations = (torch.ops.aten.sin.default, torch.ops.aten.cos.default, torch.ops.aten.exp.default)
    graph, calls = fx.Graph(), []
    node = graph.placeholder("x")
    for kind in kinds:
        node = graph.call_function(operations[kind], (node,))
        node.meta["val"] = torch.zeros(2)
        calls.append(node)
    graph.output(node)
    return calls


@settings(QUICK, max_examples=40)
@given(st.lists(st.integers(0, 2), min_size=LEAST, max_size=2 * LEAST), st.integers(2, 5), st.data())
def test_what_is_repeated_is_found(stretch: list[int], count: int, data: Any) -> None:
    around = st.lists(st.integers(0, 2), max_size=6)
    kinds = [*data.draw(around), *stretch * count, *data.draw(around)]
    found = find_repeats(line(kinds))
    assert sum(item.period * (item.count - 1) for item in found) >= len(stretch) * (count - 1)
    for item in found:
        first = kinds[item.first : item.first + item.period]
        assert kinds[item.first : item.stop] == first * item.count
        assert item.period >= LEAST
        assert item.count > 1
    assert all(one.stop <= other.first for one, other in pairwise(found))


def test_two_kinds_of_blocks_are_told_apart() -> None:
    one, other = [0, 1, 2, 0, 0, 1, 1, 2], [2, 2, 1, 0, 2, 1, 0, 0, 1]
    assert find_repeats(line([1, *one * 3, *other * 4])) == [Repeats(1, 8, 3), Repeats(25, 9, 4)]
    assert find_repeats(line([0, 1, 2])) == []


def test_regions_are_asked_for() -> None:
    asked: tuple[Any, ...] = (False, "auto", True)
    models = [graphcache.transform(tiny(6), FORA, backend="aot_eager", regions=how) for how in asked]
    made = [compiled(lambda model=model: generation(model))[1] for model in models]
    assert made[:2] == [2, 0], "two whole phases, which serve the second model too"
    assert made[2] > 2
    with pytest.raises(GraphCacheError, match="regions='all': must be True, False or 'auto'"):
        graphcache.transform(tiny(6), FORA, regions="all")  # type: ignore[arg-type]


def test_blocks_that_were_compiled_one_by_one_are_regions() -> None:
    model = tiny(6)
    for block in model.blocks:  # as compile_repeated_blocks does
        block.compile(backend="inductor")
    expected = generation(graphcache.transform(tiny(6), FORA))
    with counted() as alone:
        results = generation(graphcache.transform(model, FORA))
    assert alone.call_count
    assert len(results) == len(expected)
