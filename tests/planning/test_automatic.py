"""How `auto` chooses between families: the best plans of those that are near are tuned shortly and judged."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import graphcache
from graphcache import Plan
from graphcache.cli.main import app
from graphcache.planning import automatic
from graphcache.planning.automatic import NEAR, Parts, Trial, best
from graphcache.planning.sampling import Sampling
from linear import Sampler, linear

FACTORY = """
from linear import Sampler, linear
def made():
    return linear(2), Sampler(tokens=8), [1, 2, 3, 4]
"""


def parts(samples: tuple[int, ...] = (1, 2, 3, 4), **options: Any) -> Parts:
    sampling = Sampling.of(linear(2), Sampler(tokens=8))
    return Parts(sampling, samples, 6, 1.5, backend=None, **{"iterations": 2, **options})


def each(plan: Plan, sample: int) -> list[float]:
    """Decibels of the two results of a sample."""
    sampling = Sampling.of(linear(2), Sampler(tokens=8))
    result, target = (
        sampling.generate(m, sample, 6).double() for m in (sampling.planned(plan), sampling.model)
    )
    errors = (result - target).square().flatten(1).mean(dim=1)
    return [10 * math.log10(4 / float(error)) for error in errors]


def test_families_are_near_whose_errors_are() -> None:
    tried = parts()
    found = tried.searched(tried.profiled())
    near = tried.near(found)
    assert near[0] == found.chosen
    assert len({item.family for item in found.families}) == len(found.families) > 1
    least = found.chosen.known_error
    for item in found.families:
        assert item.measured is not None
        assert (item in near) is (item.known_error <= NEAR * least)
    assert parts(iterations=0).near(found) == (found.chosen,)


@pytest.mark.parametrize(("samples", "judges"), [((1, 2, 3, 4), (2, 3)), ((1, 2, 3), (2,)), ((1, 2), (2,))])
def test_a_trial_is_judged_by_samples_that_it_was_not_tuned_on(
    samples: tuple[int, ...], judges: tuple[int, ...]
) -> None:
    on = parts(samples)
    item = on.searched(on.profiled()).chosen
    trial = on.tried(item.family, item.plan)
    assert trial.decibels == pytest.approx(
        [db for judge in judges for db in each(trial.plan, judge)], abs=1e-3
    )
    assert [row.selector for row in trial.plan.rows] == [row.selector for row in item.plan.rows]


def test_a_plan_without_coefficients_is_tried_as_it_is() -> None:
    plan = Plan.parse("plan steps=6 preset=none\n* #.#.#.")
    trial = parts().tried("branches", plan)
    assert trial.plan == plan
    assert trial.decibels == pytest.approx([*each(plan, 2), *each(plan, 3)], abs=1e-3)


def test_a_family_takes_the_lead_by_more_than_chance() -> None:
    first, near, ahead, far, once = (
        Trial(name, Plan(2), decibels)
        for name, decibels in {
            "first": (40.0, 44.0, 42.0),
            "near": (45.0, 41.0, 42.0),  # ahead by 2/3, give or take 2.4
            "ahead": (41.0, 45.5, 42.5),  # by 1, give or take 0.3
            "far": (60.0, 61.0, 62.0),
            "once": (99.0,),
        }.items()
    )
    assert best([first, near]) is first
    assert best([first, near, ahead]) is ahead
    assert best([first, ahead, far]) is far
    assert not once.leads(Trial("first", Plan(2), (40.0,))), "a single sample tells nothing of chance"


def test_the_best_trial_is_tuned_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "NEAR", math.inf)
    made = graphcache.auto(
        linear(2), [1, 2, 3, 4], steps=6, speedup=1.5, sampler=Sampler(tokens=8), iterations=2, backend=None
    )
    assert [trial.family for trial in made.trials] == [item.family for item in made.found.families]
    chosen = best(made.trials).plan
    assert [row.actions for row in made.plan.rows] == [row.actions for row in chosen.rows]
    assert made.held_out == pytest.approx(fmean(each(made.plan, 4)), abs=0.02)


@pytest.mark.parametrize(("reference", "again"), [("uncached", 0), ("converged", 1)])
def test_every_uncached_result_is_made_once(
    reference: Any, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of samples too that are other objects at every look."""
    monkeypatch.setattr(automatic, "NEAR", math.inf)
    runs: list[tuple[int, int]] = []

    def sampler(model: Any, sample: int, steps: int) -> torch.Tensor:
        if model is sampling.model:
            runs.append((sample, steps))
        return Sampler(tokens=8)(model, sample, steps)

    sampling = Sampling.of(linear(2), sampler)
    on = Parts(
        sampling, range(1001, 1005), 6, 1.5, backend=None, iterations=2, reference=reference, data_range=4.0
    )
    profile = on.profiled()
    runs.clear()
    found = on.searched(profile)
    assert runs == [(1001, 6), (1002, 6)]
    trials = [on.tried(item.family, item.plan) for item in on.near(found)]
    assert len(trials) > 1
    tuned = on.tuned(best(trials).plan)
    assert tuned is not None
    on.promised(tuned.plan)
    whole = Counter(sample for sample, steps in runs if steps == 6)
    # each converged one begins with a run of as many steps; tuning looks at the first call each time, and
    # once whether a second run draws other numbers
    first = 1 + (len(trials) + 1) + 1 + 2 * again
    assert whole == {1001: first, 1002: 1 + again, 1003: 1, 1004: 1 + again}
    converged = [run for run in runs if run[1] > 6]
    assert len(converged) == len(set(converged))
    assert bool(converged) is (reference == "converged")


def test_the_command_goes_on_family_by_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "NEAR", math.inf)
    (tmp_path / "tried_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "out"

    def run() -> Any:
        options = (
            "--backend",
            "none",
            "--steps",
            "6",
            "--iterations",
            "2",
            "--speedup",
            "1.5",
            "--threads",
            "1",
            "--no-rivals",
        )
        return CliRunner().invoke(app, ["auto", "tried_factory:made", "--output", str(folder), *options])

    def content() -> dict[str, str]:
        names = [*folder.glob("*.txt"), *folder.glob("famil*.json")]
        return {path.name: path.read_text() for path in names}

    first = run()
    assert first.exception is None, first.exception
    before = content()
    trials = [name for name in before if name.startswith("family-")]
    assert len(trials) > 1
    chosen = (folder / "plan.txt").read_text().rstrip()
    assert chosen in [json.loads(before[name])[0]["plan"] for name in trials]
    for name in ("family-2.json", "plan.txt", "tuned.txt"):
        (folder / name).unlink()
    made = (folder / "family-1.json").stat().st_mtime_ns
    again = run()
    assert again.exception is None, again.exception
    assert content() == before
    assert (folder / "family-1.json").stat().st_mtime_ns == made
    (folder / "tuned.txt").unlink()
    (folder / "family-1.json").write_text("[]")
    assert "names no family: remove it" in str(run().exception)


@pytest.mark.parametrize(("steps", "mode"), [(2, None), (4, "first"), (5, "calls")])
def test_few_steps_are_planned_tuned_and_promised(steps: int, mode: str | None) -> None:
    conditional = "first" if mode == "first" else None
    sampling = Sampling.of(linear(1), Sampler(mode), conditional=conditional)
    on = Parts(sampling, (1, 2, 3), steps, 1.9, backend=None, iterations=3)
    profile = on.profiled()
    found = on.searched(profile)
    assert len(found.chosen.computed) <= steps / 1.9
    tuned = on.tuned(found.plan)
    plan = on.promised(found.plan if tuned is None else tuned.plan)
    assert plan.promise is not None
    with torch.no_grad():
        pairs = [(sampling.generate(m, 3, steps)) for m in (sampling.planned(plan), sampling.model)]
    errors = torch.stack(pairs).double().diff(dim=0)[0].square().flatten(1).mean(dim=1)
    assert plan.promise.worst == pytest.approx(10 * math.log10(4 / float(errors.max())), abs=0.011)
    with pytest.raises(graphcache.GraphCacheError, match=rf"the nearest computes 1 of {steps} steps"):
        replace(on, speedup=100.0).searched(profile)
