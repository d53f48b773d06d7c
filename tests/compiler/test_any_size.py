"""One size is compiled as a fixed one; from the second on code serves all others, or is refused for one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphcache
from counted import PLAN, PLANS, compilations, generation
from graphcache import GraphCacheError, presets
from graphcache.analysis.size_expressions import expressions
from graphcache.compiler import any_size, code
from graphcache.compiler.compilations import EVERYONES, EVERYONES_FAMILIES
from graphcache.compiler.symbolic_captures import SymbolicCaptures
from graphcache.ir.sizes import skeleton
from graphcache.libraries import torch_compilers_private
from reference import assert_same
from sized import Sizes, subject
from strategies import QUICK
from tiny import TinyDiT, arguments, tiny


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """Each size is traced by itself."""
    with torch.no_grad(), patch.object(SymbolicCaptures, "find", return_value=None):
        yield


def test_one_fixed_size_and_one_code_for_the_others() -> None:
    model = tiny(1)
    plain = graphcache.transform(model, PLAN)
    with compilations(eagerly=False) as made:
        cached = graphcache.transform(model, PLAN, backend="inductor")
        for tokens, expected in zip((3, 5, 4, 9, 2, 3, 17), ((2, 0), (0, 2), *[(0, 0)] * 5), strict=True):
            ours: list[Tensor] = []
            assert made.since(lambda at=tokens: ours.extend(generation(cached, tokens=at))) == expected  # noqa: B023
            torch.testing.assert_close(ours, generation(plain, tokens=tokens), rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_and_one_of_several_are_classes_of_their_own() -> None:
    plain = graphcache.transform(tiny(2), PLAN)
    with compilations() as made:
        cached = graphcache.transform(tiny(2), PLAN, backend="inductor")
        assert made.since(lambda: [generation(cached, tokens=at) for at in (3, 5)]) == (2, 2)
        assert made.since(lambda: generation(cached, tokens=4, batch=1)) == (2, 0)
        assert made.since(lambda: generation(cached, tokens=6, batch=1)) == (0, 2)
        assert made.since(lambda: generation(cached, tokens=6, batch=3)) == (0, 2)
        for batch, tokens in ((1, 9), (4, 3), (5, 8)):
            assert made.since(lambda b=batch, t=tokens: generation(cached, batch=b, tokens=t)) == (0, 0)
            theirs = generation(plain, batch=batch, tokens=tokens)
            assert_same(generation(cached, batch=batch, tokens=tokens), theirs)


def test_sizes_that_are_announced_share_code_from_the_first_on() -> None:
    plain = graphcache.transform(tiny(2), PLAN)
    sizes = [{"tokens": 3}, {"tokens": 9}, {"tokens": 5, "batch": 3}, {"tokens": 7, "batch": 4}]
    with compilations() as made:
        cached: Any = graphcache.transform(tiny(2), PLAN, backend="inductor")
        assert made.since(lambda: cached.warmup(*(arguments(**at) for at in sizes), progress=False)) == (0, 2)
        for at in (*sizes, {"tokens": 8, "batch": 5}):
            assert_same(generation(cached, **at), generation(plain, **at))
    assert (made.fixed, made.any) == (0, 2)


def test_sizes_are_fixed_where_that_is_asked_for_or_gradients_are() -> None:
    with compilations() as made:
        fixed = graphcache.transform(tiny(1), PLAN, backend="inductor", sizes="fixed")
        assert made.since(lambda: [generation(fixed, tokens=at) for at in (3, 4, 5)]) == (6, 0)
        learning = graphcache.transform(tiny(2), PLAN, backend="inductor")
        with torch.enable_grad():
            assert made.since(lambda: [generation(learning, tokens=at) for at in (3, 4, 5)]) == (6, 0)
    with pytest.raises(GraphCacheError, match="sizes='all': must be 'auto', 'fixed' or 'any'"):
        graphcache.transform(tiny(1), PLAN, sizes="all")  # type: ignore[arg-type]


def test_another_model_of_one_architecture_is_served_too() -> None:
    with compilations() as made:
        first, second = (graphcache.transform(tiny(2), PLAN, backend="inductor") for _ in range(2))
        for tokens in (3, 4):
            generation(first, tokens=tokens)
        assert made.since(lambda: [generation(second, tokens=at) for at in (6, 3, 4, 5)]) == (0, 0)
        wider = graphcache.transform(TinyDiT(2, dim=6).eval(), PLAN, backend="inductor")
        call = {"x": torch.randn(2, 3, 6), "timestep": torch.ones(2), "text": torch.randn(2, 6)}
        assert made.since(lambda: wider(**call)) == (1, 0), "weights keep their sizes"


def test_code_lives_as_long_as_a_model_that_uses_it() -> None:
    with compilations():
        cached = graphcache.transform(tiny(1), PLAN, backend="inductor")
        for tokens in (3, 4):
            generation(cached, tokens=tokens)
        assert len(EVERYONES_FAMILIES) == 2
        del cached
    assert not EVERYONES_FAMILIES


def test_regions_are_compiled_for_any_size() -> None:
    model = tiny(6)
    with compilations() as made, patch.object(torch_compilers_private, "standalone_compile", _forward):
        cached = graphcache.transform(model, PLAN, backend="inductor", regions=True)
        runs = [made.since(lambda at=at: generation(cached, tokens=at)) for at in (3, 4, 5, 9)]
        assert [run[1] > 0 for run in runs] == [False, True, False, False]
        assert_same(generation(cached, tokens=7), generation(graphcache.transform(model, PLAN), tokens=7))


def _forward(module: fx.GraphModule, examples: Any, **options: Any) -> Any:
    return module.forward


class Pooled(TinyDiT):
    """Two texts, whose lengths are alike in some calls and not in others."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, other: Tensor | None = None) -> Tensor:
        assert other is not None
        count = text.shape[1]
        place = torch.arange(count)[None, :, None] / (count + other.shape[1])
        now = timestep[:, None, None]
        return super().forward(x, timestep, (text * place * now).mean(1) + (other * now).cumsum(1)[:, -1])


def texts(one: int, other: int, tokens: int = 3) -> dict[str, Any]:
    made = {"text": torch.randn(2, one, 4), "other": torch.randn(2, other, 4)}
    return {**arguments(tokens=tokens), **made}


def test_what_the_examples_had_in_common_by_chance_is_compiled_anew() -> None:
    """Two lengths were equal, then one twice the other, in all sizes so far."""
    model = tiny(1, Pooled)
    plan = presets.compute(1)
    with compilations() as made:
        for relation in (1, 2):
            EVERYONES.clear()
            cached = graphcache.transform(model, plan, backend="inductor")
            plain = graphcache.transform(model, plan)
            found = []
            for one, other in (
                (3, 3 * relation),
                (4, 4 * relation),
                (5, 5 * relation),
                (4, 7),
                (9, 2),
                (2, 20),
            ):
                call = texts(one, other)
                ours: list[Any] = []
                found.append(made.since(lambda: ours.append(cached(**call))))  # noqa: B023
                assert_same(ours[0], plain(**call))
            assert found == [(1, 0), (0, 1), (0, 0), (0, 1), (0, 0), (0, 0)]
            EVERYONES_FAMILIES.clear()


class Choosing(TinyDiT):
    """Computes something else for few tokens, by what compiled code has to ask of a size."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        tail = x.new_zeros(x.shape[0], 12 - x.shape[1], x.shape[2]) if x.shape[1] < 12 else x[:, :0]
        return super().forward(torch.cat([x, tail], 1), timestep, text)[:, : x.shape[1]]


@pytest.mark.few(1)
@pytest.mark.parametrize("eagerly", [True, False])
def test_sizes_that_fold_otherwise_have_code_of_their_own(eagerly: bool) -> None:
    """As traced, and under Inductor, which asks more of sizes."""
    model = tiny(1, Choosing)
    cached = graphcache.transform(model, PLAN, backend="inductor")
    plain = graphcache.transform(model, PLAN)
    with compilations(eagerly) as made:
        for tokens in (3, 5, 20, 7, 11, 30, 12, 9, 13, 8):
            ours, theirs = (generation(run, tokens=tokens) for run in (cached, plain))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert made.fixed + made.any <= 2 * 6


def test_what_a_compiler_cannot_do_with_symbols_is_compiled_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: Any) -> Any:
        raise NotImplementedError("symbols")

    with compilations() as made, patch.object(code, "inductor", fails):
        cached = graphcache.transform(tiny(1), PLAN, backend="inductor")
        assert made.since(lambda: [generation(cached, tokens=at) for at in (3, 4, 5)]) == (6, 0)
    assert [record.getMessage() for record in caplog.records if "symbols" in record.getMessage()]


def test_code_that_is_not_right_for_its_own_example_is_made_once() -> None:
    with compilations() as made, patch.object(any_size.AnySize, "numbers", return_value=None):
        cached = graphcache.transform(tiny(1), PLAN, backend="inductor")
        assert made.since(lambda: [generation(cached, tokens=at) for at in (3, 4, 5, 6)]) == (8, 2)


def test_only_so_many_codes_of_one_form() -> None:
    model = tiny(1, Pooled)
    with compilations() as made, patch.object(any_size, "_MOST", 1):
        cached = graphcache.transform(model, presets.compute(1), backend="inductor")
        for one, other in ((3, 3), (4, 4), (4, 7), (9, 2)):
            assert_same(cached(**(call := texts(one, other))), model(**call))
    assert (made.fixed, made.any) == (3, 1)


DRAWN: Mapping[str, Mapping[str, Sequence[int]]] = {
    "pixart": {"batch": (1, 5), "height": (2, 9), "width": (2, 9), "text": (3, 77)},
    "sd3": {"batch": (1, 5), "height": (2, 4), "width": (2, 4), "text": (1, 77)},
    "flux": {"batch": (1, 5), "tokens": (2, 40), "text": (1, 77)},
    "wan": {"batch": (1, 3), "frames": (1, 5), "height": (2, 6), "width": (2, 6), "text": (1, 77)},
    "mochi": {"batch": (1, 3), "frames": (1, 4), "height": (2, 6), "width": (2, 6)},
}
EVEN = ("height", "width")


HOW = {"pixart": "toca", "sd3": "range", "flux": "packed", "wan": "fraction", "mochi": "taylorseer"}


@pytest.mark.few(1)
@pytest.mark.parametrize("sized", HOW)
def test_every_size_is_right(sized: str) -> None:
    """Code for any size, traced and run as it is, has the bits of the plan's own graphs at each size."""
    on, plan = subject(sized), PLANS[HOW[sized]]
    plain = graphcache.transform(on.model, plan, timestep=on.timestep)
    cached = graphcache.transform(on.model, plan, timestep=on.timestep, backend="inductor")
    ranges = DRAWN[sized]
    drawn = st.fixed_dictionaries({key: st.integers(*ends) for key, ends in ranges.items()})

    @settings(QUICK)
    @given(drawn)
    def check(sizes: Sizes) -> None:
        at = {key: size * (2 if key in EVEN else 1) for key, size in sizes.items()}
        for call in on.calls(at, plan.steps):
            assert_same(cached(**call), plain(**call))

    with compilations() as made:
        check()
    assert made.any


def columns(examples: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    return list(zip(*examples, strict=True))


@settings(QUICK)
@given(st.data())
def test_expressions_give_every_example(data: st.DataObject) -> None:
    number, count = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 4))
    drawn = [data.draw(st.lists(st.integers(2, 40), min_size=number, max_size=number)) for _ in range(count)]
    made: list[list[int]] = [*drawn]
    for _ in range(data.draw(st.integers(0, 8))):
        one, other = (data.draw(st.sampled_from(made)) for _ in range(2))
        by = data.draw(st.integers(1, 6))
        made.append(
            data.draw(
                st.sampled_from(
                    [
                        [a * b * by for a, b in zip(one, other, strict=True)],
                        [a + b for a, b in zip(one, other, strict=True)],
                        [a + by for a in one],
                        [a * by for a in one],
                    ]
                )
            )
        )
    given_ = [tuple(column) for column in made]
    found = expressions(given_)
    for example in range(number):
        values = [unit.column[example] for unit in found.units]
        assert (
            found.values([v for v, unit in zip(values, found.units, strict=True) if unit.made is None])
            == values
        )
        for column in given_:
            expected = found.found[column].of(values) if column in found.found else column[0]
            assert expected == column[example]


def test_simple_relations_are_found() -> None:
    height, width, text = (8, 12, 20), (8, 16, 10), (7, 9, 30)
    tokens = tuple(a * b // 4 for a, b in zip(height, width, strict=True))
    both = tuple(a + b for a, b in zip(tokens, text, strict=True))
    found = expressions([height, width, text, tokens, both, tuple(64 * n for n in both), (5, 5, 5)])
    assert [unit.column for unit in found.units] == [height, width, text, tokens, both]
    values = found.values([100, 40, 11])
    assert values == [100, 40, 11, 1000, 1011]
    assert found.found[tuple(64 * n for n in both)].of(values) == 64 * 1011


def graph_of(function: Callable[..., Any]) -> fx.Graph:
    return fx.symbolic_trace(function).graph


def test_numbers_that_are_no_sizes_stay_in_a_form() -> None:
    aten = torch.ops.aten

    def form(x: Tensor, *calls: tuple[Any, ...]) -> Any:
        graph = fx.Graph()
        last = graph.placeholder("x")
        for target, *rest in calls:
            last = graph.call_function(target, (last, *rest))
        graph.output((last,))
        return skeleton(graph, [x])

    view = aten.view.default
    one = form(torch.empty(4, 6), (view, [2, 12]))
    assert one == form(torch.empty(4, 6), (view, [2, 12]))
    assert one.sizes == (4, 6, 6, 2, 12)
    assert one.form == form(torch.empty(8, 6), (view, [6, 8])).form
    assert one.form != form(torch.empty(4, 6), (view, [1, 24])).form, "one is broadcast"
    assert one.form != form(torch.empty(4, 6), (view, [-1, 12])).form
    assert one.form != form(torch.empty(4, 6, dtype=torch.float64), (view, [2, 12])).form
    turned = [form(torch.empty(2, 3, 4, 5), (aten.transpose.int, 0, dim)) for dim in (2, 3)]
    assert turned[0].form != turned[1].form, "a dimension is no size"
    scaled = [form(torch.empty(4), (aten.mul.Tensor, by)) for by in (2.5, 3.5)]
    assert scaled[0].form != scaled[1].form
    weights = [form(nn.Parameter(torch.empty(size)), (aten.relu.default,)) for size in (4, 5)]
    assert weights[0].form != weights[1].form
