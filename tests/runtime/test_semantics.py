"""Transformed models against the reference interpreter, and the laws that hold for every plan."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
import strategies
from graphcache import Plan, PlanError, StateError, presets
from graphcache.ir.plan import Preset
from graphcache.ir.state import CacheState, Entry
from graphcache.ir.text import render
from graphcache.runtime import runner
from inside import engine_of, only_program, programs_of, states_of
from reference import Subject, assert_same, capture_call, subject
from tiny import arguments, tiny
from zoo import CASES

ADJACENT = Plan.parse("""
    plan steps=4 preset=none
    c = fitted compute
    range(0..0)  ##c.
      step 2 = -1.1 0.3
    range(1..2)  #...
""")
MIXED = Plan.parse("""
    plan steps=6 preset=none
    t = taylorseer order=1
    c = tuned compute
    @self   ##.tt#
    @cross  #...#.
    @mlp    ##t#ct
      step 4 = 0.9 0.1
""")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def selectors(on: Subject) -> list[str]:
    """Rows of every kind that match something in this model."""
    step = on.captured.step
    names = [branch.name for branch in step.branches]
    roles = [f"@{branch.role}{'.context' * branch.context}" for branch in step.branches]
    ranges = [f"range({a}..{b})" for a in range(step.blocks) for b in range(a, step.blocks)]
    globs = ["*", "*.mlp*", names[0].rsplit(".", 1)[0] + ".*"]
    depths = ["@mlp[0..0.5]", "range(0.0..0.5)", "range(0.5..1.0)"]
    return [*names, *dict.fromkeys(roles), *ranges, *globs, *depths, "output"]


def plans(on: Subject) -> st.SearchStrategy[Plan]:
    return strategies.plans(selectors(on), steps=(2, 6))


def only_state(model: nn.Module) -> runner.BranchState:
    return states_of(model)["", 0]


def measured(model: nn.Module) -> Callable[..., Any]:
    """The model's call, with the bytes held after each step and the most held at any time checked."""
    most = 0
    trim = CacheState.trim

    def measure(cache: CacheState, keep: Any) -> None:
        nonlocal most
        most = max(most, cache.held_bytes())
        trim(cache, keep)

    def call(**kwargs: Any) -> Any:
        with mock.patch.object(CacheState, "trim", measure):
            result = model(**kwargs)
        state = only_state(model)
        size = state.program.entry_bytes(state.schedule)
        assert state.cache.held_bytes() == state.schedule.held(state.step, size)
        if state.finished:
            assert most == state.schedule.peak(size)
        return result

    return call


def check_against_reference(on: Subject, plan: Plan, same: Callable[..., None] = assert_same) -> None:
    """The same bits as the reference and the bytes that the schedule foretells, or a refusal by both."""
    try:
        model = on.transform(plan)
    except PlanError:
        with pytest.raises(PlanError):
            on.sample(on.reference(plan), plan.steps)
        return
    expected = on.sample(on.reference(plan), plan.steps)
    same(on.sample(measured(model), plan.steps), expected)


def check_random_plans(on: Subject) -> None:
    @strategies.QUICK
    @given(plan=plans(on))
    def check(plan: Plan) -> None:
        check_against_reference(on, plan)

    check()


@pytest.mark.few(6)
@pytest.mark.parametrize("name", CASES)
def test_a_plan_that_computes_everything_equals_the_model_bit_for_bit(name: str) -> None:
    on = subject(name)
    rows = Plan.parse("plan steps=3 preset=none\n* ###\nrange(0.0..1.0) ###\noutput ###")
    for plan in (presets.compute(3), rows):
        assert_same(on.sample(on.transform(plan), 3), on.sample(on.model, 3))


@pytest.mark.few(6)
@pytest.mark.parametrize("name", CASES)
def test_random_plans_equal_the_reference_and_hold_the_bytes_foretold(name: str) -> None:
    check_random_plans(subject(name))


@pytest.mark.parametrize(("name", "batch"), [("dit", 1), ("sana", 3), ("functional_mmdit", 3)])
def test_random_plans_equal_the_reference_at_other_batch_sizes(name: str, batch: int) -> None:
    check_random_plans(subject(name, batch))


@pytest.mark.parametrize(
    ("name", "dtype"), [("dit", torch.bfloat16), ("wan", torch.bfloat16), ("pixart", torch.float64)]
)
def test_random_plans_equal_the_reference_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    check_random_plans(subject(name, dtype=dtype))


@pytest.mark.parametrize("name", presets.names())
def test_presets_equal_the_reference(name: str) -> None:
    check_against_reference(subject("factorised_dit"), presets.evaluate(Preset(name), 9))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param("range(0..1) ##\nrange(1..1) ##", id="both compute"),
        pytest.param(
            "range(0..1) #C\n step 1 = 0.5 0.25\nrange(1..1) #.", id="outer corrected, inner reused"
        ),
        pytest.param("range(0..1) #C\n step 1 = 0.5\nrange(1..1) #C\n step 1 = 2", id="both corrected"),
        pytest.param(
            "range(0..1) #C#.\n step 1 = 0.5\nrange(1..1) ##..", id="inner computes beside a correction"
        ),
    ],
)
def test_ranges_that_end_at_the_same_block_nest(rows: str) -> None:
    steps = len(rows.split("\n")[0].split()[1])
    plan = Plan.parse(f"plan steps={steps} preset=none\nC = tuned compute\n{rows}")
    check_against_reference(subject("chunked_dit"), plan)


@pytest.mark.parametrize("site", ["output", "*", "range(0..1)"])
def test_a_first_step_shares_the_graph_of_corrected_ones(site: str) -> None:
    listed = "step 2 = 0.5 0.25\nstep 4 = 2 -1"
    plan = Plan.parse(f"plan steps=5 preset=none\nc = tuned compute\n{site} #.c.c\n{listed}")
    on = subject("chunked_dit")
    check_against_reference(on, plan)
    model = on.transform(plan)
    on.sample(model, plan.steps)
    program = only_program(model)
    assert program.graphs == 2
    steps = model.summary().branches[0].steps
    assert [(step.computed > 0, step.corrected > 0) for step in steps] == [
        (True, False),
        (False, False),
        (site != "*", True),
        (False, False),
        (site != "*", True),
    ]


def test_output_ages_while_a_range_of_all_blocks_is_reused() -> None:
    plan = Plan.parse("plan steps=4 preset=none\nrange(0..1) #.#.\noutput ##..")
    check_against_reference(subject("chunked_dit"), plan)


def test_sites_inside_a_reused_range_do_not_age() -> None:
    rows = "l = newton order=1\nrange(0..1) #.#..#\n@self ####l#"
    plan = Plan.parse(f"plan steps=6 preset=none\n{rows}")
    check_against_reference(subject("chunked_dit"), plan)


def test_parameters_are_shared_not_copied() -> None:
    on = subject("dit")
    model = on.transform(MIXED)
    originals = dict(on.model.named_parameters())
    assert dict(model.named_parameters()).keys() == originals.keys()
    assert all(value is originals[name] for name, value in model.named_parameters())
    program = only_program(model)
    assert program.prologue is not None
    assert len(program.phases) > 3
    for runnable in (program.prologue, *program.phases.values()):
        found = dict(runnable.step.module.named_parameters())
        assert found
        assert all(value is originals[name.removeprefix("model.")] for name, value in found.items())


@pytest.mark.usefixtures("captured_anew")
@pytest.mark.parametrize("name", ["chunked_dit", "pixart"])
def test_two_captures_print_identically(name: str) -> None:
    on = subject(name)
    again = capture_call(on.model, on.case.kwargs(), on.case.timestep)
    assert render(again.step) == render(on.captured.step)


def test_a_sample_does_not_depend_on_its_neighbour() -> None:
    on = subject("pixart")
    model = on.transform(MIXED)

    def first_rows(seed: int) -> list[Tensor]:
        latents, static, rows = on.latents(), on.static(), []
        latents[1] = on.latents(seed)[1]
        static["encoder_hidden_states"][1].mul_(seed)
        for step in range(6):
            result = model(**on.case.call(static, latents, 1 - step / 6))
            latents = latents - on.case.prediction(result) / 6
            rows.append(result[0][0])
        return rows

    assert_same(first_rows(3), first_rows(4))


@pytest.mark.usefixtures("own_garbage")
def test_entries_that_no_later_step_reads_are_freed_at_once() -> None:
    on, stored = subject("chunked_dit"), []
    model = on.transform(Plan.parse("plan steps=5 preset=none\n@self #.###\n@mlp ###.#"))
    store = CacheState.store

    def watch(cache: CacheState, site: str, entry: Entry) -> None:
        stored.extend(map(weakref.ref, entry))
        store(cache, site, entry)

    alive = []

    def call(**kwargs: Any) -> Any:
        with mock.patch.object(CacheState, "store", watch):
            result = model(**kwargs)
        gc.collect()
        alive.append(sum(ref() is not None for ref in stored))
        return result

    on.sample(call, 5)
    assert alive == [2, 0, 2, 0, 0]


def test_text_changed_in_place_between_generations_is_honoured() -> None:
    on = subject("pixart")
    model, static = on.transform(MIXED), on.static()
    first = on.sample(model, 6, static=static)
    static["encoder_hidden_states"].mul_(0.5)
    second = on.sample(model, 6, static=static)
    assert_same(second, on.sample(on.reference(MIXED), 6, static=static))
    assert not torch.equal(first[0][0], second[0][0])


@pytest.mark.parametrize("in_place", [False, True], ids=["another object", "in place"])
@pytest.mark.parametrize("when", [{3}, {1, 2, 3, 4, 5}], ids=["once", "at every step"])
def test_text_changed_within_a_generation_is_honoured(in_place: bool, when: set[int]) -> None:
    on = subject("pixart")

    def run(call: Callable[..., Any]) -> list[Any]:
        latents, static, results = on.latents(), on.static(), []
        for step in range(6):
            text = static["encoder_hidden_states"]
            if step in when:
                static["encoder_hidden_states"] = text.mul_(0.7) if in_place else text * 0.7
            results.append(call(**on.case.call(static, latents, 1 - step / 6)))
            latents = latents - on.case.prediction(results[-1]) / 6
        return results

    model, expected = on.transform(MIXED), run(on.reference(MIXED))
    assert_same(run(model), expected)
    assert_same(run(model), expected)
    assert_same(on.sample(model, 6), on.sample(on.reference(MIXED), 6))


def test_weights_changed_in_place_are_honoured_at_the_next_generation() -> None:
    model = tiny()
    cached = graphcache.transform(model, presets.compute(1))
    cached(**arguments())
    model.text.weight.data.mul_(2)
    model.blocks[0].up.weight.data.mul_(2)
    assert_same(cached(**arguments()), model(**arguments()))


def test_replaced_weights_are_captured_again_at_the_next_generation() -> None:
    model = tiny()
    cached = graphcache.transform(model, presets.compute(1))
    before = cached(**arguments())
    model.text.weight = nn.Parameter(model.text.weight * 2)
    after = cached(**arguments())
    assert_same(after, model(**arguments()))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_after_an_exception_the_next_generation_starts_afresh(
    error: type[BaseException], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = subject("chunked_dit")
    model, feed = on.transform(MIXED), runner.feed

    def failing(cache: Any, runnable: Any, laid: Any, now: Any) -> Any:
        if only_state(model).step == step:
            raise error
        return feed(cache, runnable, laid, now)

    monkeypatch.setattr(runner, "feed", failing)
    with pytest.raises(error):
        on.sample(model, 6)
    monkeypatch.undo()
    assert_same(on.sample(model, 6), on.sample(on.reference(MIXED), 6))


def test_a_call_beyond_the_last_step_is_an_error_that_changes_nothing() -> None:
    on = subject("chunked_dit")
    model = on.transform(MIXED)
    expected = on.sample(model, 6)
    state, step = only_state(model), only_state(model).step
    with pytest.raises(StateError, match="the plan has 6 steps and this generation goes on to another one"):
        model(**on.case.call(on.static(), on.latents(), 0.01))
    assert only_state(model) is state
    assert state.step == step
    assert_same(on.sample(model, 6), expected)


@pytest.mark.parametrize("done", [2, 5, 6])
def test_starting_again_from_the_first_timestep_is_a_new_generation(done: int) -> None:
    on = subject("chunked_dit")
    model, static = on.transform(MIXED), on.static()
    for step in range(done):
        model(**on.case.call(static, on.latents(seed=5), 1 - step / 6))
    assert_same(on.sample(model, 6, static=static), on.sample(on.reference(MIXED), 6, static=static))


def test_a_jump_back_that_misses_the_first_timestep_is_a_new_generation() -> None:
    model = graphcache.transform(tiny(), presets.compute(5))
    for t in (1.0, 0.6, 0.3):
        model(**arguments(t))
    model(**arguments(0.8))
    assert only_state(model).step == 0


def test_timesteps_may_rise() -> None:
    model = graphcache.transform(tiny(), presets.compute(3))
    for step, t in enumerate((0.1, 0.4, 0.9)):
        model(**arguments(t))
        assert only_state(model).step == step
    model(**arguments(0.1))
    assert only_state(model).step == 0


def test_branches_of_a_cache_context_keep_separate_states() -> None:
    on = subject("pixart")
    model = on.transform(MIXED)
    other = {**on.static(), "encoder_hidden_states": on.static()["encoder_hidden_states"] * 2}
    calls = {"cond": on.static(), "uncond": other}
    references = {name: on.reference(MIXED) for name in calls}
    latents = on.latents()
    for step in range(6):
        for name, static in calls.items():
            kwargs = on.case.call(static, latents, 1 - step / 6)
            with model.cache_context(name):
                result = model(**kwargs)
            assert_same(result, references[name](**kwargs))
        latents = latents - on.case.prediction(result) / 6
    assert set(states_of(model)) == {("cond", 0), ("uncond", 0)}


def test_two_calls_at_one_timestep_with_other_inputs_need_a_context_and_change_nothing() -> None:
    on = subject("pixart")
    model, static, expected = on.transform(MIXED), on.static(), on.sample(on.reference(MIXED), 6)
    results, latents = [], on.latents()
    for step in range(6):
        t = 1 - step / 6
        results.append(model(**on.case.call(static, latents, t)))
        if step in (0, 2, 3):
            with pytest.raises(StateError, match=r"called 2 times at one timestep.*cache_context"):
                model(**on.case.call(on.static(), latents, t))
        latents = latents - on.case.prediction(results[-1]) / 6
    assert_same(results, expected)


def test_a_second_evaluation_at_one_timestep_is_a_step_of_its_own() -> None:
    on = subject("chunked_dit")
    model, reference, static = on.transform(MIXED), on.reference(MIXED), on.static()
    for seed, t in enumerate((1.0, 0.75, 0.75, 0.5, 0.5, 0.25)):
        kwargs = on.case.call(static, on.latents(seed), t)
        assert_same(model(**kwargs), reference(**kwargs))


def test_a_third_call_at_one_timestep_is_no_solvers() -> None:
    model, kwargs = graphcache.transform(tiny(), presets.compute(5)), arguments()
    for step, t in enumerate((1.0, 0.6, 0.6)):
        model(**{**kwargs, "timestep": torch.full((2,), t)})
        assert only_state(model).step == step
    with pytest.raises(StateError, match=r"at one timestep.*branches="):
        model(**{**kwargs, "timestep": torch.full((2,), 0.6)})
    model(**{**kwargs, "timestep": torch.full((2,), 0.3)})
    assert only_state(model).step == 3


def test_another_signature_is_captured_again_and_the_oldest_forgotten() -> None:
    model = tiny()
    cached = graphcache.transform(model, presets.fora(1), signatures=2)
    for shape in ({"batch": 1}, {"batch": 2}, {"tokens": 5}):
        kwargs = arguments(**shape)
        assert_same(cached(**kwargs), model(**kwargs))
    programs = engine_of(cached).maker.programs
    kept = list(programs.values())
    assert len(kept) == 2
    cached(**arguments(batch=2))
    assert list(programs.values()) == kept[::-1]
    assert all(a is b for a, b in zip(programs.values(), kept[::-1], strict=True))


def test_a_batch_that_changes_at_a_new_timestep_starts_an_empty_history() -> None:
    plan = Plan.parse("plan steps=4 preset=none\n* ##.#")
    model = tiny()
    cached = graphcache.transform(model, plan)
    for t in (1.0, 0.75):
        cached(**arguments(t))
    kwargs = arguments(0.5, batch=3)
    assert_same(cached(**kwargs), model(**kwargs))
    assert only_state(cached).step == 2


def test_a_dtype_that_changes_within_a_generation_is_an_error_that_changes_nothing() -> None:
    model = tiny()
    cached = graphcache.transform(model, Plan.parse("plan steps=3 preset=none\n* ##."))
    first = arguments()
    cached(**first)
    second = {**first, "timestep": torch.full((2,), 0.5)}
    with pytest.raises(StateError, match=r"argument x changed from torch\.float32 on cpu to torch\.float64"):
        cached(**{**second, "x": second["x"].double()})
    assert_same(cached(**second), model(**second))
    assert only_state(cached).step == 1


@pytest.mark.parametrize("start", [1, 2, 4, 5])
def test_reset_begins_later_and_computes_what_lacks_history(start: int) -> None:
    on = subject("factorised_dit")
    plan = Plan.parse("""
        plan steps=6 preset=none
        t = taylorseer order=2
        @self   #..##.
        @mlp    ##ttt#
        @cross  ##tt#t
        range(0.5..1.0)  #####.
    """)
    model = on.transform(plan)
    model.reset(start_step=start)
    expected = on.sample(on.reference(plan, start), 6, start)
    assert_same(on.sample(model, 6, start), expected)


def test_the_generation_after_a_late_start_begins_at_the_first_step() -> None:
    on = subject("chunked_dit")
    model = on.transform(MIXED)
    model.reset(start_step=3)
    on.sample(model, 6, start=3)
    assert_same(on.sample(model, 6), on.sample(on.reference(MIXED), 6))


def test_reset_refuses_a_step_that_the_plan_does_not_have() -> None:
    model = graphcache.transform(tiny(), presets.compute(3))
    with pytest.raises(StateError, match="start_step=3 is not a step of the plan, which has steps 0 to 2"):
        model.reset(start_step=3)


def test_reset_forgets_the_generation_in_progress() -> None:
    on = subject("chunked_dit")
    model, static = on.transform(MIXED), on.static()
    model(**on.case.call(static, on.latents(), 1.0))
    model(**on.case.call(static, on.latents(), 0.9))
    model.reset()
    assert states_of(model) == {}
    kwargs = on.case.call(static, on.latents(), 0.8)
    assert_same(model(**kwargs), on.model(**kwargs))


def test_results_keep_their_class() -> None:
    case = CASES["dit"]
    kwargs = case.kwargs()
    del kwargs["return_dict"]
    model = case.make()
    cached = graphcache.transform(model, presets.compute(2))
    expected, result = model(**kwargs), cached(**kwargs)
    assert type(result) is type(expected)
    assert_same(result.sample, expected.sample)


def test_the_result_is_an_instance_of_the_models_class() -> None:
    model = tiny()
    cached = graphcache.transform(model, presets.compute(2))
    assert isinstance(cached, type(model))
    assert type(cached).__name__ == "TinyDiT"
    assert type(model)(1).load_state_dict(cached.state_dict())
    assert cached.plan == presets.compute(2)


def test_positional_and_named_arguments_are_one_signature() -> None:
    kwargs = arguments()
    cached = graphcache.transform(tiny(), Plan.parse("plan steps=2 preset=none\n* #."))
    first = cached(*kwargs.values())
    again = {**kwargs, "timestep": torch.full((2,), 0.5)}
    cached(again["x"], text=again["text"], timestep=again["timestep"])
    assert only_state(cached).step == 1
    assert len(programs_of(cached)) == 1
    assert_same(first, tiny()(**kwargs))


def test_layouts_other_than_the_captured_one_are_laid_out_anew() -> None:
    model, kwargs = tiny(), arguments()
    cached = graphcache.transform(model, presets.compute(2), example_inputs=kwargs)
    for x in (kwargs["x"].mT.contiguous().mT, kwargs["x"][:1].expand(2, -1, -1)):
        cached.reset()
        assert_same(cached(**{**kwargs, "x": x}), model(**{**kwargs, "x": x.contiguous()}))


def test_changing_a_result_in_place_does_not_reach_the_cache() -> None:
    plan = Plan.parse("plan steps=3 preset=none\noutput #..")
    cached, kwargs = graphcache.transform(tiny(), plan), arguments()
    results = []
    for t in (1.0, 0.6, 0.3):
        result = cached(**{**kwargs, "timestep": torch.full((2,), t)})
        results.append(result.clone())
        result.zero_()
    assert_same(results[1:], [results[0]] * 2)


def test_the_summary_counts_what_each_step_did() -> None:
    model = graphcache.transform(
        tiny(depth=2), Plan.parse("plan steps=3 preset=none\nl = newton order=1\n@mlp ##l")
    )
    assert str(model.summary()) == "no generation yet"
    for t in (1.0, 0.6, 0.3):
        model(**arguments(t))
    (branch,) = model.summary().branches
    counts = [(s.computed, s.forecast, s.reused, s.held_bytes) for s in branch.steps]
    assert counts == [(4, 0, 0, 2 * 96), (4, 0, 0, 4 * 96), (2, 2, 0, 0)]


@pytest.mark.parametrize("name", ["factorised_dit", "flux", "latte"])
def test_a_range_begins_with_what_the_one_before_it_was_given(name: str) -> None:
    """The larger one is behind the smaller."""
    on = subject(name)
    assert_same(on.sample(on.transform(ADJACENT), 4), on.sample(on.reference(ADJACENT), 4))
