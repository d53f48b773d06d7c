"""Pipelines whose denoisers take turns: one generation, one profile and one plan, with a step that computes
where a model takes over."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import graphcache
from folders import FOLDERS
from graphcache import GraphCacheError, Plan, Profile, Sampling, load_profile, presets, save_profile
from graphcache.analysis.full_steps import SiteProducts, best_steps, gap_errors, gap_squares, steadied
from graphcache.cli.main import app
from graphcache.ir.letter import Letter
from graphcache.ir.plan import Row
from graphcache.ir.selector import Selector
from graphcache.planning.automatic import checker
from graphcache.planning.candidates import candidates
from graphcache.planning.comparison import compare, load_rows
from graphcache.planning.other_steps import at_steps
from graphcache.planning.prediction import predicted
from graphcache.planning.site_sensitivity import sensitivity
from graphcache.planning.timeline import meet
from graphcache.planning.tuning import tune, with_corrections
from graphcache.planning.turns import handovers
from inside import engine_of
from linear import linear
from pipelines import PIPELINES
from reference import assert_same
from reference_pipeline import fresh, reference, transformed
from relay import FIRST, STEPS, Relay, another, relay

SAMPLES = [{"seed": 5}, {"seed": 8}]
PROBES = 8


class Measured:
    """A profile of two models, with what came back as probes; another one of two calls a step."""

    def __init__(self, calls: bool) -> None:
        self.pipe = relay(calls=calls)
        self.on = Sampling.of(self.pipe)
        self.profile = graphcache.profile(
            self.on, SAMPLES, steps=STEPS, probes=PROBES, window=4, detail="sites"
        )
        self.directions = [*self.pipe.directions]

    def change(self, plan: Plan, number: int) -> Tensor:
        """What a plan changes of a sample's result."""
        planned, plain = (
            self.on.generate(models, SAMPLES[number], STEPS)
            for models in (self.on.planned(plan), self.on.model)
        )
        return (planned - plain).double()

    def effects(self, plan: Plan) -> np.ndarray:
        """(probes, samples): the probes' products with what a plan changes, by real runs."""
        parts = []
        for number in range(len(SAMPLES)):
            change, own = self.change(plan, number), self.directions[number * PROBES :][:PROBES]
            parts.append(torch.stack([(d.double() * change).flatten(1).sum(1) for d in own]))
        return torch.cat(parts, dim=1).numpy()


@cache
def measured(calls: bool = False) -> Measured:
    return Measured(calls)


def replacing(site: str, step: int, weights: tuple[float, ...]) -> Plan:
    """The site computed at all steps but one."""
    if site == "guidance":
        actions = "#" * step + "." + "#" * (STEPS - step - 1)
        return Plan(STEPS, rows=(Row(Selector.parse(site), actions),))
    actions = "#" * step + "f" + "#" * (STEPS - step - 1)
    row = Row(Selector.parse(site), actions, ((step, weights),))
    return Plan(STEPS, (Letter("f", "fitted", (("order", 2),)),), (row,))


def test_the_steps_at_which_a_model_takes_over_are_those_of_a_real_generation() -> None:
    pipe = relay()
    assert handovers(Sampling.of(pipe), SAMPLES[0], STEPS) == (FIRST,)
    assert pipe.called == ["early"] * FIRST + ["late"] * (STEPS - FIRST)
    assert measured().profile.handovers == (FIRST,)
    pipe.called.clear()
    assert handovers(Sampling.of(linear(1), lambda *_: pytest.fail("it ran")), 0, STEPS) == ()


@pytest.mark.few(1)
@pytest.mark.parametrize("calls", [False, True])
def test_effects_are_those_of_real_runs_on_both_sides(calls: bool) -> None:
    on = measured(calls)
    assert on.profile.calls == 1 + calls
    for site in on.profile.sites:
        table = on.profile.effects[on.profile.index(site.name)]
        for step, weights in ((1, (1.0,)), (2, (1.5, -0.5)), (4, (1.0,)), (6, (1.7, -0.4, -0.3))):
            used = (1.0,) if site.name == "guidance" else weights
            estimated = sum(w * table[step, gap] for gap, w in enumerate(used, 1)) - table[step, 0]
            real = on.effects(replacing(site.name, step, used))
            assert np.abs(real).max() > 1e-5, (site.name, step)
            np.testing.assert_allclose(estimated, real, rtol=1e-3, atol=1e-4 * np.abs(real).max())


def test_nothing_is_said_of_values_from_before_another_model_took_over() -> None:
    on = measured()
    assert not on.profile.gram[:, :FIRST, FIRST:].any()
    assert not on.profile.gram[:, FIRST:, :FIRST].any()
    for step in range(FIRST, STEPS):
        assert not on.profile.effects[:, step, step - FIRST + 1 :].any()
    assert np.isnan(sensitivity(on.profile)[:, [0, FIRST]]).all()
    assert np.isfinite(np.delete(sensitivity(on.profile), [0, FIRST], axis=1)).all()


def test_products_are_those_of_what_the_models_gave() -> None:
    on, given = measured(), []
    hooks = [
        model.register_forward_hook(lambda module, args, output: given.append(output.flatten().double()))
        for model in on.on.models
    ]
    for sample in SAMPLES:
        on.on.generate(on.on.model, sample, STEPS)
    for hook in hooks:
        hook.remove()
    values = torch.stack(given).unflatten(0, (len(SAMPLES), STEPS))
    products = torch.einsum("sin,sjn->ij", values, values).numpy()
    products[:FIRST, FIRST:] = products[FIRST:, :FIRST] = 0
    np.testing.assert_allclose(on.profile.gram[on.profile.index("output")], products, rtol=1e-5)


@pytest.mark.parametrize("steps", [6, 7])
def test_the_best_sets_of_steps_hold_the_one_that_takes_over(steps: int) -> None:
    """Two models of which nothing is shared are two problems: every split of the number is tried."""
    rng, cut = np.random.default_rng(steps), 3
    values = rng.normal(size=(steps, 5)).cumsum(axis=0)
    whole = SiteProducts("site", values @ values.T, rng.normal(size=(steps, 4, 2, 3)), False, (cut,))
    parts = [
        SiteProducts("site", whole.gram[own, own], whole.effects[own])
        for own in (slice(cut), slice(cut, steps))
    ]
    found = best_steps(gap_errors(steadied(gap_squares([whole]), [whole]), (cut,)), steps)
    one, other = (best_steps(gap_errors(steadied(gap_squares([p]), [p])), p.steps) for p in parts)
    for size, choice in found.items():
        splits = [(a, b) for a in one for b in other if a + b == size]
        assert choice.error == pytest.approx(min(one[a].error + other[b].error for a, b in splits))
        assert cut in choice.steps
    assert min(found) == min(one) + min(other)


def test_every_candidate_computes_where_a_model_takes_over() -> None:
    for calls in (False, True):
        found = candidates(measured(calls).profile)
        assert {item.family for item in found} > {"branches", "output", "range(0..0)"}
        for item in found:
            for row in item.plan.rows:
                assert row.actions[FIRST] == "#"
                for step, listed in row.coefficients:
                    start = FIRST if step > FIRST else 0
                    assert len(listed) <= sum(symbol == "#" for symbol in row.actions[start:step])


def test_what_a_plan_is_promised_is_what_happens() -> None:
    on = measured()
    check = checker(on.on, SAMPLES, STEPS)
    for item in (replacing("output", 2, (1.4, -0.4)), replacing("range(0..0)", 5, (1.0,))):
        promised = predicted(meet("plan", item, on.profile))
        assert promised is not None
        # the estimate is the mean over random vectors of a square whose mean over all is the error's
        real = np.sqrt((on.effects(item) ** 2).mean(axis=0).sum() / (on.profile.numbers * 4))
        assert promised.error == pytest.approx(float(real), rel=1e-3)
        assert 0.4 < promised.error / check(item) < 2.5
    found = graphcache.search(on.profile, speedup=1.5)
    again = predicted(meet("found", found.plan, on.profile))
    assert again is not None
    assert again.error == pytest.approx(found.chosen.error)
    assert 0.3 < found.chosen.error / check(found.plan) < 3


@pytest.mark.parametrize("name", ["fora", "taylorseer"])
def test_a_plan_that_knows_of_no_models_is_met_as_it_runs(name: str) -> None:
    on, plan = measured(), getattr(presets, name)(STEPS, interval=4)
    timeline = meet(name, plan, on.profile)
    held = []

    class Noting(Relay):
        def denoised(self, *given: Any) -> Tensor:
            found = super().denoised(*given)
            held.append(_held(self))
            return found

    pipe = graphcache.transform(Noting(linear(1), another(1)), plan)
    pipe(STEPS, torch.Generator().manual_seed(0))
    assert timeline.held == tuple(held)
    assert timeline.peak >= max(held)
    ran = [step for model in (pipe.early, pipe.late) for step in model.summary().branches[0].steps]
    assert [step.step for step in ran] == [*range(STEPS)]
    assert timeline.whole == tuple(step.step for step in ran if step.computed == 2)
    assert FIRST in timeline.whole
    assert timeline.graphs == sum(model.summary().branches[0].graphs for model in (pipe.early, pipe.late))


def _held(pipe: Relay) -> int:
    states = [
        state for m in (pipe.early, pipe.late) for state in engine_of(m).surroundings.session.states.values()
    ]
    return sum(state.cache.held_bytes() for state in states)


def test_a_found_plan_leaves_nothing_behind_when_another_model_takes_over() -> None:
    on = measured()
    plans = [item.plan for item in candidates(on.profile) if len(item.computed) == 4]
    assert len(plans) > 6
    for plan in plans:
        timeline = meet("found", plan, on.profile)
        assert timeline.held[FIRST - 1] == 0


def judged(on: Sampling, plan: Plan, samples: Sequence[Any], data_range: float) -> float:
    """Mean decibels of the results, from the definition."""
    errors = [
        (on.generate(on.planned(plan), sample, plan.steps) - on.generate(on.model, sample, plan.steps))
        .double()
        .square()
        .flatten(1)
        .mean(1)
        for sample in samples
    ]
    return float((10 * torch.log10(data_range**2 / torch.cat(errors))).mean())


def test_tuning_trains_both_models_steps_and_corrects_none_that_has_no_value_before() -> None:
    on = measured()
    reused = tuple((step, (1.0,)) for step in (2, 5, 6))
    row = Row(Selector.parse("output"), "##f##ff#", reused)
    plan = with_corrections(
        Plan(STEPS, (Letter("f", "tuned", (("order", 1),)),), (row,)), handovers=on.profile.handovers
    )
    assert plan.rows[0].actions == "#cf#cffc"
    made = tune(on.on, plan, SAMPLES[:1], SAMPLES[1:], iterations=12, every=12, rate=0.01)
    assert made.after > made.before + 1
    (before,), (after,) = plan.rows, made.plan.rows
    moved = {step for step, listed in before.coefficients if after.listed(step) != listed}
    assert moved == {1, 2, 4, 5, 6, 7}
    assert judged(on.on, made.plan, SAMPLES[1:], 2.0) == pytest.approx(made.after)


def test_auto_and_compare_run_the_pipeline_as_one() -> None:
    pipe, samples = relay(), [{"seed": seed} for seed in range(3)]
    originals = pipe.early, pipe.late
    made = graphcache.auto(pipe, samples, steps=STEPS, speedup=1.3, iterations=2, backend=None)
    assert made.model is pipe
    assert made.plan.graph == made.profile.provenance.graph
    on = Sampling.of(pipe)
    assert on.models == originals
    assert made.held_out == pytest.approx(judged(on, made.plan, samples[2:], 2.0), abs=0.005)
    result = on.generate((pipe.early, pipe.late), samples[2], STEPS)
    assert_same(result, on.generate(on.planned(made.plan), samples[2], STEPS))
    rows = compare(pipe, {"found": made.plan}, samples[2:], steps=STEPS, fewer={"4": (None, 4)}, backend=None)
    assert [row.name for row in rows] == ["plain", "found", "4"]
    assert rows[1].psnr == pytest.approx(made.held_out, abs=0.005)
    work = [model.summary().branches[0] for model in (pipe.early, pipe.late)]
    assert rows[1].ideal == pytest.approx(
        sum(item.plain_flops for item in work) / sum(item.flops for item in work)
    )
    assert graphcache.restore(pipe) is pipe
    assert (pipe.early, pipe.late) == originals


def test_a_found_plan_runs_as_the_reference_runs_each_model_by_its_part() -> None:
    tiny = PIPELINES["wan_two_transformers"]
    sample = {**tiny.arguments(1, True, False), "seed": 0}
    made = graphcache.profile(fresh(tiny), [sample], steps=6, probes=1, detail="steps")
    assert made.calls == 2
    (cut,) = made.handovers
    plans = {item.family: item.plan for item in candidates(made) if len(item.computed) == 3}
    assert plans.keys() >= {"output", "range(0..1)", "range(0..0)"}
    plan = graphcache.search(made, speedup=1.5).plan
    assert all(row.actions[cut] == "#" for row in plan.rows)
    pipe = transformed(tiny, replace(plan, graph=made.provenance.graph))
    assert_same(tiny.generate(pipe, 6), reference(tiny, lambda steps: plan, steps=6))
    summaries = [model.summary().branches[0].steps for model in (pipe.transformer, pipe.transformer_2)]
    assert [step.step for steps in summaries for step in steps] == [*range(6)]


def test_a_profile_with_handovers_is_written_and_read(tmp_path: Any) -> None:
    on = measured()
    save_profile(on.profile, tmp_path / "profile.json")
    again = load_profile(tmp_path / "profile.json")
    assert again.handovers == on.profile.handovers
    assert graphcache.search(again, speedup=1.5).plan == graphcache.search(on.profile, speedup=1.5).plan


@pytest.mark.parametrize("steps", [4, 5, 6, 12, 16])
def test_at_another_number_of_steps_a_model_takes_over_as_the_scheduler_goes(steps: int) -> None:
    found = at_steps(measured().profile, steps)
    (real,) = handovers(measured().on, SAMPLES[0], steps)
    assert real in found.handovers
    between = {step for step in range(steps) if FIRST - 1 < step * STEPS / steps < FIRST}
    assert set(found.handovers) == between | {min(s for s in range(steps) if s * STEPS / steps >= FIRST)}
    turn = np.searchsorted(found.handovers, range(steps), side="right")
    apart = turn[:, None] != turn
    assert not found.gram[:, apart].any()
    for step, gap in np.ndindex(found.effects.shape[1:3]):
        if step >= gap and turn[step] != turn[step - gap]:
            assert not found.effects[:, step, gap].any()
    for item in candidates(found):
        assert all(row.actions[step] == "#" for row in item.plan.rows for step in found.handovers)


def test_every_second_step_of_both_models_is_taken_as_it_is() -> None:
    pipe = relay(boundary=0.55)
    whole = graphcache.profile(pipe, SAMPLES, steps=8, probes=1, window=7)
    assert whole.handovers == (4,)
    half = at_steps(whole, 4)
    assert half.handovers == (2,)
    np.testing.assert_allclose(half.gram, whole.gram[:, ::2, ::2])
    expected = whole.effects[:, ::2, ::2] * np.float32(2)
    np.testing.assert_allclose(half.effects, expected[:, :, : half.window + 1], rtol=1e-5)


class Side(Relay):
    """Calls both models at every step."""

    def chosen(self, time: float, boundary: float) -> list[str]:
        return ["early", "late"]


def test_what_is_no_generation_of_turns_is_refused() -> None:
    def profiled(pipe: Any, samples: Any = SAMPLES, **options: Any) -> Profile:
        return graphcache.profile(Sampling.of(pipe, **options), samples, steps=STEPS, probes=1)

    with pytest.raises(GraphCacheError, match="step 0 calls two denoisers, of LinearDiT and of LinearDiT"):
        profiled(Side(linear(1), another(1)))
    with pytest.raises(GraphCacheError, match=r"different graphs: LinearDiT \w+, and LinearDiT \w+; one"):
        profiled(Relay(linear(1), another(2)))
    with pytest.raises(GraphCacheError, match="none of the models at 5, the first of them step 3"):
        profiled(relay(), parts="early")

    moving = [{"seed": 1}, {"seed": 1, "boundary": 0.4}]
    with pytest.raises(GraphCacheError, match=r"take over at different steps, \(3,\) and \(5,\)"):
        profiled(relay(), moving)


def test_a_model_that_is_never_called_takes_no_part() -> None:
    pipe = relay(boundary=2.0)
    found = graphcache.profile(pipe, SAMPLES[:1], steps=STEPS, probes=1)
    assert found.handovers == ()
    alone = Relay(pipe.late, another(1), boundary=2.0)
    alone.early = nn.Identity()  # type: ignore[assignment]
    expected = graphcache.profile(alone, SAMPLES[:1], steps=STEPS, probes=1)
    np.testing.assert_array_equal(found.gram, expected.gram)
    np.testing.assert_array_equal(found.effects, expected.effects)


FACTORY = """
from relay import relay
def made():
    return relay(), [{"seed": seed} for seed in range(3)]
"""


def test_the_command_line_does_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})
        assert result.exception is None, result.exception
        return result.output

    (tmp_path / "relay_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model, eager = "relay_factory:made", ("--backend", "none")
    run("profile", model, "--steps", "8", *eager)
    assert load_profile("profile.json").handovers == (FIRST,)
    run("search", "profile.json", "--steps", "6", "--speedup", "1.2", "--model", model)
    plan = Plan.load("plan.txt")
    for step in handovers(Sampling.of(relay()), SAMPLES[0], 6):
        assert all(row.actions[step] == "#" for row in plan.rows)
    run("search", "profile.json", "--speedup", "1.2")
    run("tune", model, "plan.txt", "--iterations", "2")
    tuned = Plan.load("tuned.txt")
    assert any("c" in row.actions for row in tuned.rows)
    assert all(row.actions[FIRST] == "#" for row in tuned.rows)
    run("compare", model, "--steps", "8", "--plan", "tuned.txt", "--output", "rows.json", *eager)
    assert [row.name for row in load_rows("rows.json")] == ["plain", "tuned.txt"]
    run("report", "profile.json", "--plan", "tuned.txt", "--plan", "taylorseer:8", "--charts", "charts")
    assert "nothing to reuse yet" in Path("report.html").read_text()


def test_warmup_makes_all_that_a_generation_of_two_models_needs(tmp_path: Path) -> None:
    given = FOLDERS["wan_2_2"]
    place = given.saved(tmp_path / "pipe")
    call = json.dumps({**given.arguments, "prompt": "a fox"})
    run = CliRunner().invoke(
        app,
        ["warmup", place, "--plan", "fora:4", "--call", call, "--backend", "none"],
        env={"COLUMNS": "200"},
    )
    assert run.exception is None, run.exception
    assert "for 1 sizes of calls of 2 models" in run.output


@pytest.mark.parametrize("name", ["unet", "prior", "denoiser", "anything"])
def test_a_denoiser_of_any_name_is_found(name: str) -> None:
    class Pipeline(Relay):
        def chosen(self, time: float, boundary: float) -> list[str]:
            return [name]

    pipe = Pipeline(linear(1), linear(1))
    del pipe.early, pipe.late
    setattr(pipe, name, linear(1))
    on = Sampling.of(pipe)
    assert on.parts == (name,)
    made = graphcache.auto(pipe, [{"seed": 1}, {"seed": 2}], steps=4, speedup=1.2, iterations=1, backend=None)
    assert made.profile.handovers == ()
    assert getattr(pipe, name).plan == made.plan
    assert on.models[0] is graphcache.restore(getattr(pipe, name))


@pytest.mark.parametrize(("real", "expected"), [(5, "##f####f"), (2, "#####fff")])
def test_a_model_that_takes_over_elsewhere_than_was_planned_computes_what_it_lacks(
    real: int, expected: str
) -> None:
    pipe, listed = relay(boundary=1.01 - real / STEPS), dict.fromkeys((2, 5, 6, 7), (1.5, -0.5))

    def planned(actions: str) -> Plan:
        own = tuple((step, weights) for step, weights in listed.items() if actions[step] == "f")
        return Plan(
            STEPS, (Letter("f", "fitted", (("order", 1),)),), (Row(Selector.parse("output"), actions, own),)
        )

    on = Sampling.of(pipe)
    assert handovers(on, SAMPLES[0], STEPS) == (real,)
    result = on.generate(on.planned(planned("##f##fff")), SAMPLES[0], STEPS)
    whole = on.generate(on.planned(planned(expected)), SAMPLES[0], STEPS)
    assert_same(result, whole)
