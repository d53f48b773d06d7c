"""`compare`: quality by its definition, and what the command line writes."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from graphcache import GraphCacheError, Plan, load_profile, presets, profile, search, transform
from graphcache.cli.main import app
from graphcache.planning.automatic import checker
from graphcache.planning.comparison import Contender, compare, load_rows
from graphcache.planning.metrics import frechet_distance
from graphcache.planning.pipeline_sampler import solved_by
from graphcache.planning.sampling import Sampling
from graphcache.runtime.closeness import psnr
from inside import engine_of
from linear import Replanned, Sampler, linear
from pipelines import PIPELINES

STEPS = 6
SAMPLES = (3, 4, 5)
SEARCHED = Plan.parse(
    "plan steps=6 preset=none\nf = fitted order=1\noutput  ##f##f\n  step 2 = 1.5 -0.5\n  step 5 = 1.5 -0.5"
)
PLANS = {"fora": presets.fora(STEPS, 2), "found": SEARCHED}


def factory() -> tuple[nn.Module, Sampler, tuple[int, ...]]:
    """What the command line asks for."""
    return linear(), Sampler(), SAMPLES


def features(results: torch.Tensor) -> torch.Tensor:
    return results.flatten(1)


def compared(**options: Any) -> tuple[Contender, ...]:
    return compare(
        linear(),
        PLANS,
        SAMPLES,
        steps=STEPS,
        sampler=Sampler(),
        fewer={"half": (None, 3)},
        backend=None,
        **options,
    )


def test_rows_hold_distances_to_the_plain_models_results() -> None:
    rows = {row.name: row for row in compared(features=features)}
    assert {name: row.kind for name, row in rows.items()} == {
        "plain": "plain",
        "fora": "preset",
        "found": "searched",
        "half": "fewer steps",
    }
    assert rows["plain"].psnr is None
    assert rows["plain"].speedup == 1
    sampler, replanned = Sampler(), Replanned(linear(), STEPS)
    with torch.no_grad():
        wanted = [sampler(linear(), sample, STEPS) for sample in SAMPLES]
        made = {
            name: [sampler(replanned.under(plan), one, STEPS) for one in SAMPLES]
            for name, plan in PLANS.items()
        }
        made["half"] = [sampler(linear(), one, 3) for one in SAMPLES]
    for name, results in made.items():
        means = [float(psnr(one, other).mean()) for one, other in zip(results, wanted, strict=True)]
        assert rows[name].psnr == pytest.approx(statistics.fmean(means))
        assert rows[name].spread == pytest.approx(statistics.pstdev(means))
        distance = frechet_distance(features(torch.cat(results)), features(torch.cat(wanted)))
        assert rows[name].frechet == pytest.approx(distance)
    assert rows["half"].steps == 3
    assert rows["half"].ideal == 2
    assert rows["found"].ideal == pytest.approx(6 / 4, rel=0.05)


def test_caches_and_results_that_do_not_fit_are_refused_with_what_would_do() -> None:
    (uncached,) = {Sampler()(linear(), sample, STEPS).nbytes for sample in SAMPLES}
    with pytest.raises(GraphCacheError, match=r"less than comparing needs here: (\d+) bytes") as told:
        compared(memory=0)
    results = int(str(told.value).split("here: ")[1].split()[0])
    assert results == 12 * uncached
    with pytest.raises(GraphCacheError, match=rf"plan fora caches (\d+) bytes.*leaves {uncached} ") as told:
        compared(memory=results + uncached)
    schedule, sizes = _lowered(PLANS["fora"])
    cached = int(str(told.value).split("caches ")[1].split()[0])
    assert cached >= schedule.peak(sizes) > uncached
    assert len(compared(memory=results + cached)) == 4
    with pytest.raises(GraphCacheError, match="plan fora caches"):
        compared(memory=results + cached - 1)


def _lowered(plan: Plan) -> tuple[Any, Any]:
    """A plan's schedule for the linear model, and the bytes of its entries."""
    inputs = Sampling.of(linear(), Sampler()).first_call(SAMPLES[0], STEPS)
    with torch.no_grad():
        program, schedule, _ = engine_of(transform(linear(), plan)).prepared(inputs, plan, "")
    return schedule, program.entry_bytes(schedule)


def test_the_command_line_writes_the_rows(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    arguments = [
        "compare",
        "tests.planning.test_comparison:factory",
        "--steps",
        str(STEPS),
        "--plan",
        "fora",
        "--fewer",
        "3",
    ]
    result = CliRunner().invoke(app, [*arguments, "--backend", "none", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert [row.name for row in load_rows(output)] == ["plain", "fora", "3 steps"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_the_command_line_writes_promises_into_plans(tmp_path: Path) -> None:
    place = tmp_path / "plan.txt"
    PLANS["fora"].save(place)
    arguments = [
        "compare",
        "tests.planning.test_comparison:factory",
        "--steps",
        str(STEPS),
        "--backend",
        "none",
    ]
    result = CliRunner().invoke(app, [*arguments, "--plan", str(place), "--promise"])
    assert result.exit_code == 0, result.output
    promise = Plan.load(place).promise
    (_, row, _) = compare(linear(), PLANS, SAMPLES, steps=STEPS, sampler=Sampler(), backend=None)
    assert promise is not None
    assert row.promise == replace(promise, plan="any")
    refused = CliRunner().invoke(app, [*arguments, "--plan", "fora", "--promise"])
    assert isinstance(refused.exception, GraphCacheError), "a preset has no file"


def test_the_command_line_checks_the_plans_that_it_finds(tmp_path: Path) -> None:
    place, output = tmp_path / "profile.json", tmp_path / "plan.txt"
    profile(linear(), SAMPLES[:1], steps=STEPS, sampler=Sampler(), path=place)
    arguments = ["search", str(place), "--speedup", "1.4", "--output", str(output)]
    result = CliRunner().invoke(app, [*arguments, "--model", "tests.planning.test_comparison:factory"])
    assert result.exit_code == 0, result.output
    assert "measured error" in " ".join(result.output.split())
    check = checker(Sampling.of(linear(), Sampler()), SAMPLES, STEPS)
    expected = search(load_profile(place), speedup=1.4, check=check).plan
    assert replace(Plan.load(output), graph=None) == expected


def test_a_cluster_without_runs_to_shard_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "profile.json"
    profile(linear(), SAMPLES[:1], steps=STEPS, sampler=Sampler(), path=place)
    result = CliRunner().invoke(app, ["search", str(place), "--speedup", "1.4", "--ray", "local"])
    assert isinstance(result.exception, GraphCacheError)
    assert "--model" in str(result.exception)


def test_no_samples_are_refused() -> None:
    with pytest.raises(GraphCacheError, match="needs at least one"):
        compare(linear(), PLANS, (), steps=STEPS, sampler=Sampler())


@pytest.mark.parametrize(
    ("name", "solver"), [("dit", "DPMSolverMultistepScheduler"), ("sd3", "UniPCMultistepScheduler")]
)
def test_fewer_steps_may_have_another_solver(name: str, solver: str) -> None:
    pipe = PIPELINES[name].make()
    own = pipe.scheduler
    sample = {**PIPELINES[name].arguments(1, True, False), "seed": 0}
    fewer = {solver: (solved_by(pipe, solver), 4)}
    rows = compare(pipe, {}, [sample], steps=STEPS, fewer=fewer, backend=None)
    assert pipe.scheduler is own
    expected = Sampling.of(pipe).generate(pipe.transformer, sample, STEPS)
    flow = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": own.config.get("shift"),
    }
    kind = getattr(diffusers, solver)
    pipe.scheduler = kind.from_config(own.config, **(flow if name == "sd3" else {}))
    made = Sampling.of(pipe).generate(pipe.transformer, sample, 4)
    assert rows[1].steps == 4
    assert rows[1].psnr == pytest.approx(float(psnr(made, expected).mean()))


def test_a_solver_of_another_equation_is_refused() -> None:
    with pytest.raises(GraphCacheError, match=r"'DDIMScheduler' cannot.*UniPCMultistepScheduler"):
        solved_by(PIPELINES["sd3"].make(), "DDIMScheduler")


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--fewer", "3"), "give a pipeline"), ((), "give --fewer a number of steps")],
    ids=["a bare module", "no steps"],
)
def test_solvers_that_would_have_no_effect_are_refused(options: tuple[str, ...], message: str) -> None:
    arguments = [
        "compare",
        "tests.planning.test_comparison:factory",
        "--steps",
        "6",
        *options,
        "--solver",
        "DDIMScheduler",
    ]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, GraphCacheError)
    assert message in str(result.exception)
