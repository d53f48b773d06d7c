"""Searched plans: budgets are kept, promises are those of the profile, and the library runs them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphcache
from counted import compilations
from examples.digits.model import ddim_scheduler, load_model
from examples.digits.sample import sample as sample_digits
from graphcache import GraphCacheError, Plan, Profile, search, transform
from graphcache.ir.roles import UNNAMED
from graphcache.planning import calibration
from graphcache.planning.candidates import Candidate, candidates, pareto, predicted_speedup
from graphcache.planning.profile import Provenance, Site, families
from graphcache.planning.sampling import Sampling
from inside import engine_of
from linear import Replanned, Sampler, linear

STEPS = 8


@cache
def profile_of(mode: str | None = "first", steps: int = STEPS, tokens: int = 3) -> Profile:
    conditional = mode if mode in ("first", "last") else None
    options: dict[str, Any] = {"probes": 2, "conditional": conditional}
    return graphcache.profile(linear(), [1, 2], steps=steps, sampler=Sampler(mode, tokens), **options)


def estimated(profile: Profile, item: Candidate) -> float:
    """The error of a plan's own coefficients, from the effects: gaps are independent, steps within add up."""
    rows = [row for row in item.plan.rows if not row.selector.is_guidance]
    tokens = {
        letter.symbol: float(letter.option("count")) for letter in item.plan.letters if letter.is_tokens
    }
    total, probes, samples = 0.0, *profile.effects.shape[-2:]
    for newest, end in zip(item.computed, (*item.computed[1:], profile.steps), strict=True):
        sums = np.zeros((probes, samples))
        for step in range(newest + 1, end):
            for row in rows:
                table = profile.effects[profile.index(str(row.selector)), step]
                if row.actions[step] in tokens:
                    sums += (1 - tokens[row.actions[step]]) * (table[step - newest] - table[0])
                    continue
                history = [done for done in reversed(item.computed) if done < step]
                for entry, weight in zip(history, row.listed(step) or (), strict=False):
                    sums += weight * table[step - entry]
                sums -= table[0]
            if not rows:
                table = profile.effects[profile.index("guidance"), step]
                sums += table[step - newest] - table[0]
        total += float((sums**2).mean(axis=0).sum())
    return math.sqrt(total / (profile.numbers * samples))


@pytest.mark.parametrize(
    ("mode", "steps"),
    [(None, STEPS), ("first", STEPS), ("calls", STEPS), ("first", 2), (None, 4), ("calls", 5)],
)
def test_every_family_has_a_plan_for_every_number_of_steps(mode: str | None, steps: int) -> None:
    profile = profile_of(mode, steps)
    found = candidates(profile)
    expected = {"branches", "range(0..2)", "range(0..1)", "output"} | ({"guidance"} if mode else set())
    for role in ("mlp", "mlp.1"):
        expected |= {f"branches but {role}", f"branches, 0.5 of {role}", f"branches, 0.25 of {role}"}
    assert {item.family for item in found} == expected
    for family in expected:
        sizes = {len(item.computed) for item in found if item.family == family}
        assert sizes == set(range(1, steps))
    for item in found:
        assert item.computed[0] == 0
        for row in item.plan.rows:
            assert tuple(step for step, action in enumerate(row.actions) if action == "#") == item.computed


@pytest.mark.parametrize("mode", [None, "first", "calls"])
def test_errors_are_those_of_the_plans_own_coefficients(mode: str | None) -> None:
    profile = profile_of(mode)
    for item in candidates(profile):
        assert item.error == pytest.approx(estimated(profile, item), rel=1e-5), item


@pytest.mark.parametrize("speedup", [1.01, 1.2, 1.5, 2.0, 3.9])
def test_the_chosen_plan_reaches_the_speedup_with_the_least_error(speedup: float) -> None:
    found = search(profile_of(), speedup=speedup)
    assert found.chosen.speedup >= speedup
    assert found.plan is found.chosen.plan
    reaching = [item for item in candidates(profile_of()) if item.speedup >= speedup]
    assert found.chosen.error == min(item.error for item in reaching)


def test_the_chosen_plan_is_the_fastest_within_an_error() -> None:
    every = candidates(profile_of())
    for error in sorted(item.error for item in every)[:: len(every) // 6]:
        found = search(profile_of(), max_error=error)
        assert found.chosen.error <= error
        assert found.chosen.speedup == max(item.speedup for item in every if item.error <= error)


def test_errors_grow_with_speed_along_the_front_and_nothing_beats_it() -> None:
    front = search(profile_of(), speedup=1.01).front
    assert len(front) > 3
    for faster, slower in pairwise(front):
        assert faster.speedup > slower.speedup
        assert faster.error > slower.error
    for item in candidates(profile_of()):
        assert any(best.speedup >= item.speedup and best.error <= item.error for best in front)
    assert pareto(front[::-1]) == front


def test_bytes_are_kept_within_the_budget() -> None:
    every = candidates(profile_of())
    for most in sorted({item.bytes for item in every}):
        found = search(profile_of(), speedup=1.01, max_bytes=most)
        assert all(item.bytes <= most for item in found.front)
        allowed = [item.error for item in every if item.bytes <= most and item.speedup >= 1.01]
        assert found.chosen.error == min(allowed)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"speedup": 100},
            r"no plan is 100 times as fast; the nearest computes 1 of 8 steps \(.*\): 8\.00",
        ),
        ({"max_error": 1e-12}, r"no plan has an error of at most 1e-12; the nearest computes \d of 8 steps"),
        ({"speedup": 1.5, "max_bytes": 7}, r"within 7 bytes; the smallest cache, of family gu"),
        ({}, "either speedup= or max_error="),
        ({"speedup": 2.0, "max_error": 1.0}, "either speedup= or max_error="),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphCacheError, match=message):
        search(profile_of(), **budget)


def test_a_single_step_is_refused() -> None:
    with pytest.raises(GraphCacheError, match="none to skip"):
        search(profile_of("first", 1), speedup=1.5)


def test_checks_replace_the_estimates_of_the_best_candidates() -> None:
    fast = sorted((i for i in candidates(profile_of()) if i.speedup >= 1.5), key=lambda item: item.error)
    best = {item.family: item for item in reversed(fast)}
    estimates = sorted(best.values(), key=lambda item: item.error)
    measured = {estimates[0].plan: 3.0, estimates[1].plan: 1.0, estimates[2].plan: 2.0}
    asked: list[Plan] = []

    def check(plan: Plan) -> float:
        asked.append(plan)
        return measured[plan]

    found = search(profile_of(), speedup=1.5, check=check, checked=3)
    assert set(asked) == set(measured)
    assert found.plan == estimates[1].plan
    assert (found.chosen.measured, found.chosen.error) == (1.0, estimates[1].error)
    assert search(profile_of(), speedup=1.5).chosen.measured is None


def test_a_plan_that_is_not_finite_is_never_chosen() -> None:
    errors = iter([math.nan, 5.0, math.inf])
    found = search(profile_of(), speedup=1.5, check=lambda plan: next(errors))
    assert found.chosen.measured == 5.0


def test_checks_go_on_until_a_plan_keeps_within_the_error() -> None:
    every = candidates(profile_of())
    most = sorted(item.error for item in every)[len(every) // 2]
    fast = sorted((i for i in every if i.error <= most), key=lambda item: (-item.speedup, item.error))
    good = fast[7]

    def check(plan: Plan) -> float:
        return most / 2 if plan == good.plan else 2 * most

    found = search(profile_of(), max_error=most, check=check)
    assert found.plan == good.plan
    with pytest.raises(GraphCacheError, match="with a measured error of"):
        search(profile_of(), max_error=most, check=lambda plan: 2 * most)


def test_checks_may_run_elsewhere() -> None:
    def run(check: Any, plans: Sequence[Plan]) -> Iterable[float]:
        return [check(plan) for plan in reversed(plans)][::-1]

    def check(plan: Plan) -> float:
        return float(len(str(plan)))

    here, there = (search(profile_of(), speedup=1.5, check=check, run=way) for way in (map, run))
    assert here == there


def test_plans_survive_their_text_and_name_their_conditional_half() -> None:
    for mode in ("first", "last", "calls"):
        for item in candidates(profile_of(mode)):
            assert Plan.parse(str(item.plan)) == item.plan
            assert item.plan.conditional == (None if mode == "calls" else mode)


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", [None, "first", "calls"])
def test_candidates_run_as_fast_and_as_small_as_promised(mode: str | None) -> None:
    # budgets are multiples of 16 tokens
    sampler, replanned = Sampler(mode, tokens=64), Replanned(linear(), STEPS)
    for item in candidates(profile_of(mode, tokens=64)):
        if len(item.computed) not in (1, 3, 5):
            continue
        model = replanned.under(item.plan)
        with torch.no_grad():
            assert torch.isfinite(sampler(model, 1, STEPS)).all()
        branches = model.summary().branches
        speedup = len(branches) / sum(1 / branch.ideal_speedup for branch in branches)
        assert item.speedup == pytest.approx(speedup, rel=0.03)
        assert sum(branch.peak_bytes - branch.hoisted_bytes for branch in branches) <= item.bytes
        if item.family != "guidance":
            assert {branch.phases for branch in branches} <= {1, 2}


class Digits:
    steps, labels = 10, (3,)

    def __call__(self, model: nn.Module, sample: Sequence[int], steps: int) -> Tensor:
        # the example's loop without its torch.no_grad
        loop: Any = sample_digits.__wrapped__
        result: Tensor = loop(model, ddim_scheduler(), torch.tensor(sample), steps=steps, seed=1)
        return result


def test_plans_for_a_trained_model_run_as_promised() -> None:
    model, digits = load_model(), Digits()
    options: dict[str, Any] = {"sampler": digits, "probes": 1, "conditional": "first"}
    profile = graphcache.profile(model, [digits.labels], steps=digits.steps, **options)
    chosen = search(profile, speedup=2.0).chosen
    made: Any = transform(model, replace(chosen.plan, graph=profile.provenance.graph))
    errors = {}
    every = {item.family: item for item in reversed(candidates(profile)) if len(item.computed) == 4}
    # it would take another capture
    del every["guidance"]
    with torch.no_grad():
        plain = digits(model, digits.labels, digits.steps)
        for item in (chosen, *every.values()):
            made.reset()
            engine_of(made).plans[digits.steps] = item.plan
            result = digits(made, digits.labels, digits.steps)
            (summary,) = made.summary().branches
            assert item.speedup == pytest.approx(summary.ideal_speedup, rel=0.02)
            assert summary.phases == 2
            assert summary.peak_bytes - summary.hoisted_bytes <= item.bytes
            errors[item.plan] = float((result - plain).square().mean().sqrt())
    assert chosen.speedup >= 2
    assert all(0 < error < 0.5 for error in errors.values())


def priced(timings: dict[str, float]) -> Profile:
    """Four blocks of ten FLOPs in a model of a hundred, three steps."""
    sites = [Site(f"b.{number}", "branch", 10, 8) for number in range(4)]
    sites += [Site("range(0..1)", "range", 20, 8), Site("output", "output", 100, 4)]
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 3, 4))
    return Profile(
        Provenance("g", 3, "ddim", 1, 1, 0),
        tuple(sites),
        values @ values.transpose(0, 2, 1),
        rng.normal(size=(6, 3, 3, 1, 1)),
        {},
        {},
        None,
        numbers=4,
        flops=100,
        timings=timings,
    )


def test_speed_is_predicted_from_flops_or_from_measured_steps() -> None:
    plain = priced({})
    assert list(families(plain)) == ["branches", "range(0..1)", "output"]
    assert predicted_speedup(plain, "branches", 1) == pytest.approx(3 * 100 / (100 + 2 * 60))
    assert predicted_speedup(plain, "range(0..1)", 2) == pytest.approx(3 * 100 / (200 + 80))
    assert predicted_speedup(plain, "output", 1) == pytest.approx(3)
    assert predicted_speedup(plain, "output", 3) == pytest.approx(1)
    timed = priced({"plain": 1.0, "compute": 1.25, "branches": 0.5, "output": 0.05, "range(0..1)": 1.2})
    assert predicted_speedup(timed, "branches", 1) == pytest.approx(3 / (1.25 + 2 * 0.5))
    assert predicted_speedup(timed, "range(0..1)", 1) == pytest.approx(3 / (1.25 + 2 * 1.2))
    assert search(timed, speedup=2.0).chosen.family == "output"


@pytest.mark.parametrize(("replayed", "compiled"), [(False, 1 + 3), (True, 3 + 3)])
def test_whole_steps_are_compiled_for_one_family(
    replayed: bool, compiled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a CUDA graph takes what it reads from where other graphs left it
    monkeypatch.setattr(calibration, "replays_cuda_graphs", lambda backend: replayed)
    families = {name: [name] for name in ("range(0..3)", "range(0..1)", "output")}
    call = Sampling.of(linear(4), Sampler()).first_call(1, 4)
    with compilations() as made:
        found = calibration.step_seconds(linear(4), call, families, backend="eager", names=UNNAMED, rounds=1)
    assert made.fixed == compiled
    assert found.keys() == {"plain", "compute", *families}
    assert all(seconds > 0 for seconds in found.values())
