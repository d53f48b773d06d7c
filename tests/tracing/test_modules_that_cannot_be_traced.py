"""Modules that tracing cannot see through are called as they are, in the middle of the graph."""

import copy
import logging
import pickle
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import graphcache
from graphcache import presets
from graphcache.analysis.fingerprint import fingerprint
from graphcache.ir.opaque import OPAQUE, describe_layouts
from graphcache.ir.text import render
from inside import only_program, programs_of
from reference import assert_same, capture_call
from seeding import numbers_of
from untraced import (
    DIM,
    Asking,
    Experts,
    Largest,
    Transformer,
    arguments,
    by_reference,
    generation,
    holding,
)

FORA = presets.fora(4, interval=2)
TAYLOR = presets.taylorseer(4, interval=2, order=1)


class ThroughNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(self.up(x).detach().numpy())).mul_(2)


class Rounding(torch.autograd.Function):
    """Scales by a number that it reads on the way, and passes gradients on times three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * (2 if x.abs().max().item() > 1 else 3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 3


class OwnGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return Rounding.apply(self.up(x))  # type: ignore[no-any-return, no-untyped-call]


@dataclass
class Given:
    x: Tensor
    word: str


class Pieces(NamedTuple):
    tokens: Tensor
    parts: dict[str, Any]


class Structured(nn.Module):
    """Its inner module takes and returns more than a tensor."""

    class Inner(nn.Module):
        def forward(self, given: Given, *, scales: tuple[float, int], mask: Tensor | None = None) -> Pieces:
            assert mask is None
            count = int((given.x > 100).sum())
            return Pieces(
                given.x * scales[0] + count, {"rest": [given.x.flip(scales[1]), None], "kind": given.word}
            )

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.inner(Given(x, "twice"), scales=(2.0, 1))
        assert pieces.parts["kind"] == "twice"
        return self.out(pieces.tokens + pieces.parts["rest"][0])  # type: ignore[no-any-return]


class Chosen(nn.Module):
    """Its inner module returns as many rows as there are large values, and so cannot be called by itself."""

    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = x[x[:, 0] > 0]
            return rows * 2 if rows.shape[0] > 1 else rows

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.Rows()
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.rows(x.flatten(0, 1)).sum(0))  # type: ignore[no-any-return]


class Aliasing(nn.Module):
    """Returns its input as it is, or a view of what it keeps."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(DIM))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert not x.isnan().any()
            return x, x.transpose(1, 2), self.table[2:]

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        same, turned, rest = self.inner(x)
        return F.pad(rest, (1, 1)) * same.tanh() + turned.transpose(1, 2)


class Kernel(nn.Module):
    """Runs an operator of another library, of which nobody said what its result looks like."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.test_untraced.doubled(x)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", autouse=True)
def operator() -> Iterator[None]:
    with torch.library._scoped_library("test_untraced", "FRAGMENT") as library:
        library.define("doubled(Tensor x) -> Tensor")
        library.impl("doubled", lambda x: x * 2, "CPU")
        yield


KINDS: dict[str, Callable[[], nn.Module]] = {
    "experts": Experts,
    "numpy": ThroughNumpy,
    "kernel": Kernel,
    "own gradient": OwnGradient,
    "structured": Structured,
    "chosen rows": Chosen,
    "aliasing": Aliasing,
}
CALLED = {
    "experts": "inner",
    "numpy": "inner",
    "kernel": "inner",
    "own gradient": "inner",
    "structured": "inner.inner",
    "chosen rows": "inner",
    "aliasing": "inner.inner",
}


def called(model: nn.Module) -> list[str]:
    """The modules that a graph of the model calls."""
    return [call.place for call in capture_call(model, arguments(), "timestep").step.opaque]


@pytest.mark.parametrize("kind", KINDS)
def test_such_a_model_runs_bit_for_bit(kind: str) -> None:
    model = holding(KINDS[kind], 1)
    cached = graphcache.transform(model, FORA)
    with torch.no_grad():
        results = generation(cached)
        assert_same(results, by_reference(cached, FORA))
        assert_same(results[::2], generation(model)[::2])
    step = programs_of(cached)[0].step
    assert [call.place for call in step.opaque] == [f"blocks.0.{CALLED[kind]}"]
    assert [branch.name for branch in step.branches] == ["blocks.0.self", "blocks.0.mlp"]


@pytest.mark.parametrize("kind", ["experts", "own gradient", "structured"])
def test_gradients_are_those_of_the_module(kind: str) -> None:
    model = holding(KINDS[kind], 1)
    exact = graphcache.transform(model, presets.compute(4))

    def gradients(call: Any) -> list[Tensor | None]:
        given = arguments()
        x = given["x"].requires_grad_()
        result = call(x, given["timestep"]).square().sum()
        return [*torch.autograd.grad(result, [x, *model.parameters()], allow_unused=True)]

    for ours, theirs in zip(gradients(exact), gradients(model), strict=True):
        assert_same(torch.zeros(()) if ours is None else ours, torch.zeros(()) if theirs is None else theirs)


def test_one_graph_under_inductor() -> None:
    counter = CompileCounterWithBackend("inductor")
    model = holding(depth=1)
    cached = graphcache.transform(model, presets.compute(2), backend=counter)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        torch.testing.assert_close(generation(cached, 2), generation(model, 2))
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_graphs_have_gradients_and_call_nothing_that_is_reused() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = holding(depth=1)
    cached = graphcache.transform(model, FORA, backend=counter)
    given, results = arguments(), []
    given["x"].requires_grad_()
    for call in (cached, model):
        results.append(torch.autograd.grad(call(**given).square().sum(), [given["x"], *model.parameters()]))
    torch.testing.assert_close(*results)
    later = arguments(1)
    cached(later["x"].requires_grad_(), later["timestep"])
    assert [sum(n.target is OPAQUE for n in graph.graph.nodes) for graph in counter.graphs] == [1, 0]


class Total(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows.sum(0)


class Beginning(Transformer):
    """Begins with a sequence that cannot be traced; its blocks hold one that can."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(DIM, DIM), nn.SiLU()), 1)
        self.before = nn.Sequential(Chosen.Rows(), Total())

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x + self.before(x.flatten(0, 1)), timestep)


def test_modules_of_a_class_that_hold_other_parts_are_traced() -> None:
    assert called(Beginning().eval()) == ["before"]


def test_the_log_and_inspect_name_the_modules_and_the_line(caplog: pytest.LogCaptureFixture) -> None:
    model = holding()
    cached = graphcache.transform(model, presets.compute(4))
    with torch.no_grad():
        for tokens in (5, 7):
            generation(cached, tokens=tokens)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert re.search(
        r"2 modules 'blocks\.\*\.inner' \(Experts\) cannot be traced because of .*untraced\.py:\d+ in "
        r"forward: `if row\.numel\(\):`.* is called as it is",
        said,
    )
    seen = graphcache.inspect(model, arguments())
    assert said in str(seen)
    assert seen.opaque == (said,)


def test_its_work_is_priced_as_it_was_counted() -> None:
    plain, asking = holding(lambda: Asking(asks=False), 1), holding(Asking, 1)
    ours, theirs = (graphcache.inspect(model, arguments()) for model in (asking, plain))
    assert ours.opaque
    assert not theirs.opaque
    assert ours.sites == theirs.sites
    assert ours.flops == theirs.flops
    names = {fingerprint(capture_call(model, arguments(), "timestep").step) for model in (plain, asking)}
    asking.requires_grad_(False)
    names.add(fingerprint(capture_call(asking, arguments(), "timestep").step))
    assert len(names) == 1


def test_several_sizes_take_turns_and_are_compiled_once() -> None:
    counter = CompileCounterWithBackend("eager")
    model = holding(depth=1)
    cached = graphcache.transform(model, FORA, backend=counter, signatures=1)
    with torch.no_grad():
        for tokens in (5, 7, 5):
            assert_same(generation(cached, tokens=tokens), by_reference(cached, FORA, tokens))
    assert counter.frame_count == 4


def test_sessions_in_turn() -> None:
    model = holding(depth=1)
    cached = graphcache.transform(model, TAYLOR)
    with torch.no_grad():
        expected = generation(cached)
        assert_same(expected, by_reference(cached, TAYLOR))
        sessions = [cached.session() for _ in range(2)]
        for step in range(4):
            for session in sessions:
                with session:
                    assert_same(cached(**arguments(step)), expected[step])


def test_experts_of_a_published_model() -> None:
    """HiDream counts its experts' tokens in NumPy; it has experts for the image, and for image and text."""
    from diffusers import HiDreamImageTransformer2DModel

    with numbers_of("hidream"):
        model = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[8, 8],
            text_emb_dim=8,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(8, 8),
            llama_layers=(0, 1),
        ).eval()
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.2)
        shapes = {"t5": (2, 3, 8), "llama3": (2, 2, 3, 8)}
        given = {f"encoder_hidden_states_{name}": torch.randn(shape) for name, shape in shapes.items()}
        given |= {"pooled_embeds": torch.randn(2, 8), "return_dict": False}
    cached = graphcache.transform(model, presets.fora(2, interval=2), timestep="timesteps")
    with torch.no_grad():
        for step in range(2):
            latents = torch.randn(2, 4, 8, 8), torch.full((2,), 900.0 - 100 * step)
            results = [call(*latents, **given)[0] for call in (cached, model)]
            assert torch.equal(*results) == (step == 0)
    program = only_program(cached)
    assert [call.place for call in program.step.opaque] == [
        "double_stream_blocks.0.block.ff_i",
        "single_stream_blocks.0.block.ff_i",
    ]
    roles = [branch.role + ".context" * branch.context for branch in program.step.branches]
    assert roles == ["joint", "joint.context", "mlp", "mlp.context", "self", "mlp"]


def test_a_profile_is_that_of_a_module_that_can_be_traced() -> None:
    def sampler(model: Any, sample: int, steps: int) -> Tensor:
        x = arguments(sample)["x"]
        for step in range(steps):
            x = x - 0.2 * model(x=x, timestep=torch.full((2,), 1 - step / 4))
        return x

    ours, theirs = (
        graphcache.profile(holding(make, 1), [0, 1], steps=3, sampler=sampler, probes=1)
        for make in (Asking, lambda: Asking(asks=False))
    )
    assert ours.numbers == theirs.numbers
    np.testing.assert_allclose(ours.gram, theirs.gram, rtol=1e-6)
    np.testing.assert_allclose(ours.effects, theirs.effects, rtol=1e-6)
    assert np.abs(ours.effects).max() > 0


class Writing(nn.Module):
    """Its inner module writes into what it is given, which the outer one made."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool(x.isnan().any()) else x.mul_(2)

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        made = self.out(x)
        self.inner(made)
        return made  # type: ignore[no-any-return]


def test_a_module_that_changes_its_input_is_called_with_the_one_around_it() -> None:
    model = holding(Writing, 1)
    exact = graphcache.transform(model, presets.compute(2))
    with torch.no_grad():
        assert_same(generation(exact, 2), generation(model, 2))
    assert called(model) == ["blocks.0.inner"]


class Measuring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Largest()

    def forward(self, x: Tensor) -> Tensor:
        return x / self.inner(x)  # type: ignore[no-any-return]


def test_a_number_made_of_values_stays_within_a_call() -> None:
    model = holding(Measuring, 1)
    exact = graphcache.transform(model, presets.compute(2))
    with torch.no_grad():
        assert_same(generation(exact, 2), generation(model, 2))
    assert called(model) == ["blocks.0.inner"]


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_call_their_own_modules(travel: Callable[[Any], Any]) -> None:
    model = holding()
    cached = graphcache.transform(model, presets.compute(4))
    with torch.no_grad():
        generation(cached)
        other = travel(cached)
        other.blocks[0].inner.gate.weight.mul_(-1)
        assert_same(generation(other), generation(graphcache.restore(travel(other))))
        assert_same(generation(cached), generation(model))
        assert not torch.equal(generation(other)[0], generation(model)[0])


def test_weights_and_parts_of_a_called_module_may_change() -> None:
    model = holding()
    cached = graphcache.transform(model, presets.compute(4))
    with torch.no_grad():
        generation(cached)
        model.blocks[1].inner.experts[0].weight.mul_(3)
        assert_same(generation(cached), generation(model))
        model.blocks[0].inner.experts[1] = nn.Sequential(nn.Linear(DIM, DIM), nn.SiLU()).eval()
        assert_same(generation(cached), generation(model))


def test_two_captures_print_alike() -> None:
    one, other = (render(capture_call(holding(depth=1), arguments(), "timestep").step) for _ in range(2))
    assert one == other


class Uncast(Transformer):
    """Its first block's inner module runs without the autocast that is around the model."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = x + self.blocks[0].inner(x)
        return super().forward(x, timestep)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_autocast_around_a_module_is_that_of_the_model(backend: str | None) -> None:
    """Compiled code is run without autocast, the casts that it makes are in it."""
    for model in (holding(Asking, 1), Uncast(Asking, 1).eval()):
        exact = graphcache.transform(model, presets.compute(4), backend=backend)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert_same(exact(**arguments()), model(**arguments()))


def test_calls_go_on_while_another_thread_captures_the_model() -> None:
    model = holding(depth=1)
    cached = graphcache.transform(model, presets.compute(1))
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        expected = model(**arguments())
        captures = pool.submit(graphcache.inspect, model, arguments(tokens=7))
        calls = 0
        while not captures.done() or not calls:
            with cached.session():
                assert_same(cached(**arguments()), expected)
            calls += 1
        assert captures.result().opaque


def test_inference_mode() -> None:
    model = holding(depth=1)
    cached = graphcache.transform(model, FORA)
    with torch.no_grad():
        expected = generation(cached)
    with torch.inference_mode():
        assert_same(generation(cached), expected)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        assert not x.isnan().any()
        k, v = self.kv(x if text is None else text).chunk(2, dim=-1)
        return self.out(F.scaled_dot_product_attention(self.q(x), k, v))  # type: ignore[no-any-return]


class Reader(nn.Module):
    """Two blocks of attention to itself, to a text, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other, self.mlp = (
            nn.ModuleList(make() for _ in range(2)) for make in (Attention, Attention, Asking)
        )

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        for own, other, mlp in zip(self.own, self.other, self.mlp, strict=True):
            x = x * torch.cos(timestep)[:, None, None]
            x = x + own(x)
            x = x + other(x, text)
            x = x + mlp(x)
        return x


def test_called_attention_has_its_role() -> None:
    found = capture_call(Reader().eval(), {**arguments(), "text": torch.randn(2, 3, DIM)}, "timestep").step
    assert [branch.role for branch in found.branches] == ["self", "cross", "mlp"] * 2


def test_what_does_not_depend_on_the_step_is_called_once() -> None:
    calls = []

    class Text(nn.Module):
        def forward(self, text: Tensor) -> Tensor:
            calls.append(0)
            return text if text.isnan().any() else text * 2

    class Prompted(Transformer):
        def __init__(self) -> None:
            super().__init__(Asking, 1)
            self.prompt = Text()

        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return super().forward(x + self.prompt(text)[:, None], timestep)

    model = Prompted().eval()
    cached = graphcache.transform(model, presets.compute(4))
    text = torch.randn(2, DIM)
    with torch.no_grad():
        expected = [model(**arguments(step), text=text) for step in range(4)]
        cached(**arguments(), text=text)
        cached.reset()
        calls.clear()
        assert_same([cached(**arguments(step), text=text) for step in range(4)], expected)
    assert len(calls) == 1


def test_layouts_are_told_in_full() -> None:
    made = [torch.zeros(2, 3).t(), torch.zeros((), dtype=torch.bool)]
    assert describe_layouts(made) == "float32 cpu (3,2) (1,3); bool cpu () ()"
