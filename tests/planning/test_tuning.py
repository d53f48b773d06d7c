"""Tuned coefficients: their gradients, what is kept of them, and what they are tuned against."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from examples.digits.model import ddim_scheduler, load_model
from examples.digits.sample import sample as sample_digits
from graphcache import GraphCacheError, Plan, PlanError, restore, tune, with_corrections
from graphcache.ir.roles import Names
from graphcache.planning.convergence import converged
from graphcache.planning.gradient_memory import GradientMemory
from graphcache.planning.references import References
from graphcache.planning.sampling import Sampling
from graphcache.planning.tuning import MOST_RATE, decibel_rate
from graphcache.planning.tuning_engine import TuningEngine, Weights
from graphcache.runtime.transform import wrapped
from linear import LinearDiT, Replanned, Sampler, linear
from tiny import tiny

PLAN = Plan.parse("""
    plan steps=6 preset=none
    f = fitted order=1
    @mlp  ##f#ff
      step 2 = 1.5 -0.5
      step 4 = 1.25 -0.25
      step 5 = 1.75 -0.5
""")
MIXED = Plan.parse("""
    plan steps=6 preset=none conditional=first
    f = fitted order=2
    n = newton order=1
    g = frequency low=1.1 low_until=4
    blocks.0.mlp  ###f#f
      step 3 = 1.1 0.2 -0.3
      step 5 = 0.9
    blocks.1.mlp  #n#n#n
    range(1..2)   ###.#f
      step 5 = 1.5 -0.5
    output        ####f#
      step 4 = 1.25 -0.25
""")


BUDGETED = Plan.parse("""
    plan steps=6 preset=none
    a = tokens 2 by random multiple=1
    k = tokens 2 by cluster multiple=1 blend=0.5
    f = fitted order=1
    @self  ##afa#
      step 3 = 1.25 -0.25
    @mlp   #k##af
      step 5 = 1.5 -0.5
""")


def psnr(result: Tensor, target: Tensor, data_range: float = 2.0) -> float:
    """Mean over samples, in decibels."""
    rows = zip(result.double(), target.double(), strict=True)
    return sum(10 * math.log10(data_range**2 / float(((a - b) ** 2).mean())) for a, b in rows) / len(result)


@pytest.mark.parametrize(("plan", "mode"), [(PLAN, None), (MIXED, "first"), (MIXED, "calls")])
def test_corrections_change_nothing_at_first(plan: Plan, mode: str | None) -> None:
    corrected = with_corrections(plan)
    sampler, replanned = Sampler(mode), Replanned(linear(), 6)
    with torch.no_grad():
        before = sampler(replanned.under(plan), 1, 6)
        after = sampler(replanned.under(corrected), 1, 6)
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
        assert not torch.equal(before, sampler(replanned.under(Plan(6)), 1, 6))


def test_every_computed_step_but_the_first_is_corrected() -> None:
    corrected = with_corrections(PLAN, "k")
    (row,) = corrected.rows
    assert row.actions == "#kfkff"
    assert [row.listed(step) for step in (1, 3)] == [(1.0, 0.0), (1.0, 0.0)]
    assert [row.listed(step) for step in (2, 4, 5)] == [PLAN.rows[0].listed(step) for step in (2, 4, 5)]
    assert Plan.parse(str(corrected)) == corrected
    with pytest.raises(PlanError, match="has a letter 'f' already; give symbol="):
        with_corrections(PLAN, "f")


def test_guidance_is_left_as_it_is_by_corrections() -> None:
    guided = Plan.parse("plan steps=4 preset=none conditional=last\n@mlp ####\nguidance ##.#")
    assert [row.actions for row in with_corrections(guided).rows] == ["#ccc", "##.#"]


@pytest.mark.parametrize("plan", [PLAN, MIXED, with_corrections(PLAN)])
def test_weights_hand_back_the_coefficients_that_they_were_given(plan: Plan) -> None:
    again = Weights(plan).plan()
    for row, other in zip(again.rows, plan.rows, strict=True):
        assert (row.selector, row.actions) == (other.selector, other.actions)
        assert [step for step, _ in row.coefficients] == [step for step, _ in other.coefficients]
        for (_, ours), (_, theirs) in zip(row.coefficients, other.coefficients, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)
    assert Plan.parse(str(again)) == again


@pytest.mark.parametrize("plan", [Plan(6), Plan.parse("plan steps=6 preset=none\n* #.#.#.")])
def test_a_plan_without_coefficients_is_refused(plan: Plan) -> None:
    with pytest.raises(GraphCacheError, match=r"lists no coefficients.*with_corrections"):
        tune(linear(), plan, [1], [2], sampler=Sampler())


@pytest.mark.few(6)
@pytest.mark.parametrize("memory", [0, 30_000, 1 << 20])
@pytest.mark.parametrize(
    ("plan", "mode", "in_place"),
    [
        (with_corrections(PLAN), None, False),
        (with_corrections(PLAN), "calls", True),
        (MIXED, None, True),
        (MIXED, "last", True),
        (MIXED, "first", False),
        (MIXED, "calls", False),
        (with_corrections(BUDGETED), "first", False),
        (with_corrections(BUDGETED), "calls", True),
    ],
)
def test_gradients_of_coefficients_are_finite_differences(
    plan: Plan, mode: str | None, in_place: bool, memory: int
) -> None:
    model = (linear() if plan is MIXED else tiny(3)).double()
    sampling = Sampling.of(model, Sampler(mode, dtype=torch.float64, in_place=in_place, fades=in_place))
    weights = Weights(plan).double()
    engine = TuningEngine(model, weights, Names())
    engine.left = GradientMemory(memory)
    tuned = wrapped(model, engine)
    target = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

    def loss(gradients: bool = False) -> Tensor:
        result = sampling.generate(tuned, 1, 6, gradients=gradients)
        return -10 * torch.log10((result - target).flatten(1).square().mean(dim=1)).mean()

    loss(gradients=True).backward(inputs=list(weights.parameters()))
    compared = 0
    for parameter in weights.parameters():
        for place in range(len(parameter)):
            with torch.no_grad():
                ends = []
                for change in (1e-6, -2e-6):
                    parameter[place] += change
                    ends.append(float(loss()))
                parameter[place] += 1e-6
            expected = (ends[0] - ends[1]) / 2e-6
            assert float(parameter.grad[place]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
            compared += abs(expected) > 1e-3
    assert compared >= 5


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_a_model_that_was_compiled_has_the_same_gradients(memory: int) -> None:
    def gradients(model: nn.Module) -> list[Tensor]:
        sampling, weights = Sampling.of(model, Sampler()), Weights(PLAN)
        engine = TuningEngine(sampling.model, weights, Names())
        engine.left = GradientMemory(memory)
        sampling.generate(wrapped(sampling.model, engine), 1, 6, gradients=True).sum().backward()
        return [parameter.grad for parameter in weights.parameters()]

    compiled = linear()
    compiled.compile(backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients(linear()), rtol=0, atol=0)


class Squashed(LinearDiT):
    """Its last operation needs its result for the gradient."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return torch.tanh(super().forward(x, timestep, text))


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_results_may_be_changed_in_place(memory: int) -> None:
    model, found = Squashed().eval(), []
    for in_place in (False, True):
        sampling, weights = Sampling.of(model, Sampler("calls", in_place=in_place)), Weights(PLAN)
        engine = TuningEngine(model, weights, Names())
        engine.left = GradientMemory(memory)
        sampling.generate(wrapped(model, engine), 1, 6, gradients=True).sum().backward()
        found.append([parameter.grad for parameter in weights.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("rows", ["@mlp ##.###", "output ##.###"])
def test_coefficients_that_reach_no_result_are_refused(rows: str) -> None:
    plan = Plan.parse(
        f"plan steps=6 preset=none\nf = fitted order=1\n@mlp ##f###\n  step 2 = 1.5 -0.5\n{rows}"
    )
    with pytest.raises(GraphCacheError, match="no coefficient that the plan lists reaches the result"):
        tune(linear(), plan, [1], [2], sampler=Sampler())


def test_memory_is_for_evaluations_on_the_way_to_a_coefficient() -> None:
    sampling, memory = Sampling.of(linear().requires_grad_(False), Sampler()), 1 << 20
    engine = TuningEngine(sampling.model, Weights(PLAN), Names())
    engine.left = GradientMemory(memory)
    sampling.generate(wrapped(sampling.model, engine), 1, 6, gradients=True)
    ((_, program),) = engine.maker.programs.items()
    computed, forecast = sorted(runnable.computed_bytes for runnable in program.phases.values())
    # the first coefficient is that of step 2
    assert memory - engine.left.left == computed + 3 * forecast


def test_tuning_raises_the_psnr_of_samples_it_was_not_trained_on() -> None:
    seen = []
    found = tune(
        linear(), PLAN, [1, 2, 3], [7, 8], sampler=Sampler(), iterations=24, every=8, progress=seen.append
    )
    assert found.after > found.before + 1
    assert seen == list(found.curve)
    assert [item.number for item in seen] == list(range(24))
    assert [item.held_out is not None for item in seen] == [number % 8 == 7 for number in range(24)]
    assert found.plan.rows[0].actions == PLAN.rows[0].actions


@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_the_best_plan_for_the_held_out_samples_is_kept(rate: float) -> None:
    found = tune(linear(), PLAN, [1], [7, 8], sampler=Sampler(), iterations=12, every=2, rate=rate)
    sampling = Sampling.of(linear(), Sampler())
    looks = [item.held_out for item in found.curve if item.held_out is not None]
    assert found.after == max(found.before, *looks)
    results = [sampling.generate(sampling.planned(found.plan), sample, 6) for sample in (7, 8)]
    references = [sampling.generate(sampling.model, sample, 6) for sample in (7, 8)]
    expected = sum(map(psnr, results, references)) / 2
    assert found.after == pytest.approx(expected, abs=1e-3)
    promise = found.plan.promise
    assert promise is not None
    each = [
        psnr(a[None], b[None])
        for pair in zip(results, references, strict=True)
        for a, b in zip(*pair, strict=True)
    ]
    assert (promise.samples, promise.data_range, promise.results) == (4, 2.0, "sampler")
    assert expected - 0.011 < promise.mean <= expected + 1e-3
    assert min(each) - 0.011 < promise.worst <= min(each) + 1e-3


@pytest.mark.parametrize(
    ("slopes", "rate"), [((30.0, -10.0), 1 / 40), ((2.0, 0.0), MOST_RATE), ((0.0, 0.0), MOST_RATE)]
)
def test_the_first_update_gains_a_decibel_along_the_slopes(slopes: tuple[float, ...], rate: float) -> None:
    parameters = [nn.Parameter(torch.ones(1)) for _ in slopes]
    for parameter, slope in zip(parameters, slopes, strict=True):
        parameter.grad = torch.full((1,), -slope)
    assert decibel_rate(parameters) == pytest.approx(rate)
    torch.optim.Adam(parameters, lr=decibel_rate(parameters)).step()
    gained = sum(slope * (float(p.detach()) - 1) for p, slope in zip(parameters, slopes, strict=True))
    assert gained == pytest.approx(min(1.0, MOST_RATE * sum(map(abs, slopes))), abs=1e-5)


def test_the_given_plan_is_kept_where_nothing_is_better() -> None:
    found = tune(linear(), PLAN, [1], [7], sampler=Sampler(), iterations=6, every=1, rate=5.0)
    assert replace(found.plan, promise=None) == PLAN
    assert found.after == found.before


def test_tuning_stops_after_looks_without_a_gain() -> None:
    found = tune(linear(), PLAN, [1], [7], sampler=Sampler(), iterations=50, every=2, rate=5.0, patience=3)
    assert len(found.curve) == 2 * (3 + 1)


def test_the_data_range_shifts_decibels_alone() -> None:
    small, large = (
        tune(linear(), PLAN, [1], [7], sampler=Sampler(), iterations=4, every=2, data_range=size)
        for size in (2.0, 20.0)
    )
    assert large.before - small.before == pytest.approx(20)
    assert large.after - small.after == pytest.approx(20, abs=1e-4)


def test_tuning_that_diverges_says_so() -> None:
    with pytest.raises(GraphCacheError, match=r"PSNR is .*; lower rate="):
        tune(linear(), PLAN, [1], [7], sampler=Sampler(), iterations=20, rate=1e30)


def test_references_of_another_run_are_refused() -> None:
    sampling = Sampling.of(linear(), Sampler())
    for other in (References(sampling, 5), References(Sampling.of(linear(), Sampler()), 6)):
        with pytest.raises(GraphCacheError, match=r"holds results of \d steps, or of another Sampling"):
            tune(sampling, PLAN, [1], [2], reference=other)


@pytest.mark.parametrize("empty", ["samples", "held_out"])
def test_tuning_without_samples_is_refused(empty: str) -> None:
    given = {"samples": [1], "held_out": [2], empty: []}
    with pytest.raises(GraphCacheError, match=f"{empty} is empty"):
        tune(linear(), PLAN, sampler=Sampler(), **given)


def test_a_random_sampler_is_refused() -> None:
    def noisy(model: nn.Module, sample: int, steps: int) -> Tensor:
        return Sampler()(model, sample, steps) + torch.randn(2, 3, 4)

    with pytest.raises(GraphCacheError, match="draws random numbers"):
        tune(linear(), PLAN, [1], [2], sampler=noisy)


@pytest.mark.parametrize("trainable", [False, True])
def test_tuning_leaves_the_model_as_it_is(trainable: bool) -> None:
    model = linear().requires_grad_(trainable)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tune(model, PLAN, [1], [7], sampler=Sampler(), iterations=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(item.grad is None and item.requires_grad is trainable for item in model.parameters())


def test_tuning_a_trained_model_raises_the_psnr() -> None:
    def digits(model: nn.Module, labels: tuple[int, ...], steps: int) -> Tensor:
        # the example's loop without its torch.no_grad
        loop: Any = sample_digits.__wrapped__
        result: Tensor = loop(model, ddim_scheduler(), torch.tensor(labels), steps=steps, seed=sum(labels))
        return result

    listed = "\n".join(f"step {step} = 1.5 -0.5" for step in (3, 5, 7, 9))
    plan = Plan.parse(f"plan steps=10 preset=none\nf = fitted order=1\noutput ###f#f#f#f\n{listed}")
    found = tune(load_model(), plan, [(3,)], [(5,)], sampler=digits, iterations=4, every=4, rate=0.1)
    assert found.after > found.before + 0.5


class Ode:
    """Results of so many steps, given by a function; the model is never called."""

    def __init__(self, result: Any) -> None:
        self.result, self.asked = result, list[int]()

    def __call__(self, model: nn.Module, sample: float, steps: int) -> Tensor:
        self.asked.append(steps)
        return torch.tensor([[float(self.result(steps)) * sample]], dtype=torch.float64)


def sampling(result: Any) -> tuple[Sampling, Ode]:
    sampler = Ode(result)
    return Sampling.of(linear(1), sampler), sampler


@pytest.mark.parametrize(
    ("result", "counts"),
    [
        # an error of C/n: half of 2ᵏ·n steps are 2ᵏ − 1 times closer than n, which is 10 dB at k = 3
        (lambda n: 1 + 1 / n, [4, 8, 16, 32]),
        # of C/n²: (4ᵏ − 1)/3 times closer, 10 dB at k = 2
        (lambda n: 1 + 1 / n**2, [4, 8, 16]),
        (lambda n: 1.0, [4, 8, 16]),
    ],
)
def test_steps_are_doubled_until_the_result_stays(result: Any, counts: list[int]) -> None:
    on, sampler = sampling(result)
    found = converged(on, 3.0, 4)
    assert sampler.asked == counts
    assert float(found) == pytest.approx(3 * result(counts[-1]))


def failing(steps: int) -> float:
    if steps > 20:
        raise ValueError("at most 20 steps")
    return 1 + 1 / steps


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda n: math.cos(n), "results still change at 256 steps; tune against the uncached run instead"),
        (lambda n: n, "results still change at 256 steps"),
        (failing, r"the sampler fails at 32 steps \(at most 20 steps\); tune against the uncached run"),
        (lambda n: 1.0 if n < 8 else math.inf, "the result of 8 steps is not finite"),
        (lambda n: math.nan, "the result of 8 steps is not finite"),
    ],
)
def test_what_does_not_converge_is_refused(result: Any, message: str) -> None:
    on, _ = sampling(result)
    with pytest.raises(GraphCacheError, match=f"no converged solution: .*{message}"):
        converged(on, 1.0, 4)


def test_tuning_against_the_converged_solution() -> None:
    model, sampler = linear(), Sampler()
    found = tune(model, PLAN, [1], [7], sampler=sampler, reference="converged", iterations=8, every=4)
    on = Sampling.of(model, sampler)
    expected = psnr(on.generate(on.planned(PLAN), 7, 6), converged(on, 7, 6))
    assert found.before == pytest.approx(expected, abs=1e-3)
    assert found.after > found.before
    assert found.plan.promise is None, "it is no distance to the uncached run"


@pytest.mark.parametrize("mode", [None, "first"])
def test_auto_finds_tunes_and_applies_a_plan(mode: str | None, tmp_path: Path) -> None:
    model, sampler, told = linear(), Sampler(mode), list[str]()
    made = graphcache.auto(
        model,
        [1, 2, 3, 4],
        steps=6,
        speedup=1.5,
        sampler=sampler,
        iterations=4,
        conditional=mode,
        backend=None,
        folder=tmp_path,
        progress=told.append,
    )
    assert sorted(item.name for item in tmp_path.iterdir()) == ["plan.txt", "profile.json"]
    assert Plan.load(tmp_path / "plan.txt") == made.plan == made.model.plan
    assert made.plan.graph == made.profile.provenance.graph
    assert made.profile.provenance.samples == 3
    assert made.found.chosen.speedup >= 1.5
    assert made.found.chosen.measured is not None
    with torch.no_grad():
        result, plain = sampler(made.model, 4, 6), sampler(model, 4, 6)
    promise = made.plan.promise
    assert promise is not None
    assert made.held_out == promise.mean == pytest.approx(psnr(result, plain), abs=0.011)
    worst = min(psnr(a[None], b[None]) for a, b in zip(result, plain, strict=True))
    assert promise.worst == pytest.approx(worst, abs=0.011)
    assert (promise.samples, promise.results) == (2, "sampler")
    if made.tuned is not None:
        assert made.held_out == pytest.approx(made.tuned.after, abs=2e-2)
    (summary,) = made.model.summary().branches
    assert summary.ideal_speedup >= 1.5
    assert restore(made.model) is model
    assert told[0] == "profile, 0 of 3"
    assert told[-1] == "check"


def test_auto_wants_a_sample_to_judge_by() -> None:
    with pytest.raises(GraphCacheError, match="two samples or more"):
        graphcache.auto(linear(), [1], steps=4, sampler=Sampler(), backend=None)
