"""`transform(check=)`: what calls do is what it was, and promises that are not kept are named.

What is compared with is a pipeline under the same plan without a check, and the untouched one.
"""

import copy
import logging
import math
import pickle
import random
import warnings
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import graphcache
from graphcache import GraphCacheError, Plan, Promise, PromiseWarning, presets
from linear import Sampler, linear
from pipelines import PIPELINES
from reference_pipeline import fresh, transformed, untouched
from tiny_pipeline import Pipeline

STEPS = 3
PLAN = presets.fora(STEPS, interval=2)
PIXART = PIPELINES["pixart"]
KIND = diffusers.PixArtAlphaPipeline


def promising(worst: float, plan: Plan = PLAN) -> Plan:
    return plan.promising(Promise(worst + 1, worst, samples=3))


KEPT, BROKEN = promising(-100.0), promising(190.0)


def noisy(pipe: Any) -> Any:
    """With a scheduler that draws noise at every step."""
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    return pipe


def called(pipe: Any, seed: int | None = 0, **arguments: Any) -> Tensor:
    """A generation's latents; without a seed it draws from the global generator."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    given = {**PIXART.arguments(1, True, False), "generator": generator, **arguments}
    with torch.no_grad():
        return pipe(num_inference_steps=STEPS, return_dict=False, **given)[0]  # type: ignore[no-any-return]


def psnr(result: Tensor, target: Tensor, data_range: float = 2.0) -> float:
    return 10 * math.log10(data_range**2 / float((result.double() - target.double()).square().mean()))


def state_of(scheduler: Any) -> str:
    return str({name: value for name, value in vars(scheduler).items() if name != "_internal_dict"})


def test_calls_do_what_they_do_without_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    pipes = [
        noisy(transformed(PIXART, plan, **options)) for plan, options in ((KEPT, {"check": 1}), (PLAN, {}))
    ]
    found = []
    for pipe in pipes:
        seen: list[int] = []

        def note(step: int, *rest: Any, seen: list[int] = seen) -> dict[str, Any]:
            seen.append(step)
            random.random(), np.random.rand()
            return {}

        pipe.set_progress_bar_config(disable=False)
        generator = torch.Generator().manual_seed(7)
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        result = called(pipe, generator=generator, callback=note, callback_steps=1)
        after = generator.get_state(), torch.get_rng_state(), result
        drawn = random.random(), float(np.random.rand())
        bars = capsys.readouterr().err.count(" 0%|")
        summary = str(pipe.transformer.summary()).partition(" phases")[0]
        found.append(
            (
                after,
                (
                    drawn,
                    seen,
                    bars,
                    summary,
                    state_of(pipe.scheduler),
                    pipe.num_timesteps if hasattr(pipe, "num_timesteps") else None,
                ),
            )
        )
    (first, told), (other, expected) = found
    assert all(map(torch.equal, first, other))
    assert told == expected
    assert told[1:3] == (list(range(STEPS)), 1)


def test_the_promise_is_held_against_the_untouched_model() -> None:
    distance = psnr(
        *(PIXART.generate(pipe, STEPS) for pipe in (transformed(PIXART, PLAN), untouched(PIXART)))
    )
    kept, broken = (transformed(PIXART, promising(distance + more), check=2) for more in (-0.01, 0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromiseWarning)
        PIXART.generate(kept, STEPS)
    with pytest.warns(PromiseWarning) as told:
        _ = [PIXART.generate(broken, STEPS) for _ in range(3)]
    own = [item for item in told if item.category is PromiseWarning]
    texts = [str(item.message) for item in own]
    assert [text.partition(" comes")[0] for text in texts] == ["generation 1 of 2", "generation 2 of 2"]
    assert f"comes to {distance:.2f} dB" in texts[0]
    assert f"promises {distance + 0.01:.2f} dB at worst" in texts[0]
    assert "graphcache.auto" in texts[0]
    assert own[0].filename.endswith("tiny_pipelines.py"), "it is said where the pipeline was called"


@pytest.mark.parametrize("seed", [5, None])
def test_both_runs_draw_the_same_noise(seed: int | None) -> None:
    pipe = noisy(transformed(PIXART, promising(150.0, Plan(STEPS)), check=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromiseWarning)
        called(pipe, seed)


def test_latents_are_given_to_both_runs_as_they_were() -> None:
    given = torch.randn(1, 4, 8, 8)
    results = []
    for options in ({"check": 1}, {}):
        latents = given.clone()
        results.append(called(transformed(PIXART, KEPT, **options), latents=latents))
        assert torch.equal(latents, given)
    assert torch.equal(*results)


def test_the_worst_sample_of_a_batch_counts_and_the_range_is_that_of_the_promise() -> None:
    results = [
        PIXART.generate(pipe, STEPS, batch=2) for pipe in (transformed(PIXART, PLAN), untouched(PIXART))
    ]
    worst = min(psnr(a, b, 8.0) for a, b in zip(*results, strict=True))
    plan = PLAN.promising(Promise(worst + 50, worst + 0.01, data_range=8.0))
    with pytest.warns(PromiseWarning, match=f"comes to {worst:.2f} dB"):
        PIXART.generate(transformed(PIXART, plan, check=1), STEPS, batch=2)


def test_another_number_of_steps_is_not_held_against_the_promise() -> None:
    pipe = transformed(PIXART, KEPT, check=1)
    with pytest.warns(PromiseWarning, match="generation 1 of 1 has 4 steps and was not compared.* is for 3"):
        PIXART.generate(pipe, 4)


def test_results_that_are_not_finite_keep_no_promise() -> None:
    listed = "".join(f"\n  step {step} = 1e38" for step in range(1, STEPS))
    plan = Plan.parse(
        f"plan steps={STEPS} preset=none\nf = fitted order=0\noutput #{'f' * (STEPS - 1)}{listed}"
    )
    with pytest.warns(PromiseWarning, match="generation 1 of 1 comes to (nan|-inf) dB"):
        PIXART.generate(transformed(PIXART, promising(-100.0, plan), check=1), STEPS)


def test_a_model_that_is_not_called_keeps_no_promise() -> None:
    pipe = transformed(PIXART, KEPT, check=1)
    pipe.transformer = untouched(PIXART).transformer
    with pytest.warns(PromiseWarning, match="no call arrived at the model under the plan"):
        called(pipe)


def test_generations_that_keep_it_are_told_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "graphcache"):
        called(transformed(PIXART, KEPT, check=1))
    assert "generation 1 of 1 checked" in caplog.text


def test_the_pipeline_looks_like_its_own_kind_until_all_is_checked() -> None:
    pipe = transformed(PIXART, KEPT, check=1)
    kind = type(pipe)
    assert kind is not KIND
    assert kind == KIND
    assert isinstance(pipe, KIND)
    assert kind.__name__ == KIND.__name__
    assert kind in {KIND}
    called(pipe)
    assert type(pipe) is KIND


def test_copies_and_further_pipelines_are_not_checked() -> None:
    pipe = transformed(PIXART, BROKEN, check=1)
    made = [copy.copy(pipe), copy.deepcopy(pipe), diffusers.PixArtAlphaPipeline.from_pipe(pipe)]
    sent = pickle.loads(pickle.dumps(pipe.scheduler))
    assert type(sent) is type(pipe.scheduler)
    expected = called(transformed(PIXART, PLAN))
    for item in made:
        item.set_progress_bar_config(disable=True)
        assert type(item) is KIND
        with warnings.catch_warnings():
            warnings.simplefilter("error", PromiseWarning)
            assert torch.equal(called(item), expected)
    assert type(pipe) is not KIND


@pytest.mark.parametrize("again", [graphcache.restore, lambda pipe: graphcache.transform(pipe, PLAN)])
def test_restoring_and_transforming_anew_end_the_checks(again: Any) -> None:
    pipe = again(transformed(PIXART, BROKEN, check=3))
    assert type(pipe) is KIND


def test_a_checked_pipeline_is_profiled_as_any_other() -> None:
    pipe = transformed(PIXART, BROKEN, check=1)
    sample = {**PIXART.arguments(1, True, False), "seed": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromiseWarning)
        (row, *_) = graphcache.compare(pipe, {}, [sample], steps=STEPS, backend=None)
    assert row.name == "plain"
    assert type(pipe) is not KIND


@pytest.mark.parametrize(
    ("target", "plan", "check", "words"),
    [
        (lambda: fresh(PIXART), PLAN, 2, "promises nothing; take one of graphcache.auto"),
        (lambda: fresh(PIXART), replace(BROKEN, conditional="last"), 2, "changed has lost its promise"),
        (lambda: fresh(PIXART), PLAN.promising(Promise(2, 1, results="sampler")), 2, "results of a sampler"),
        (lambda: Pipeline(transformer=linear()), KEPT, 2, "Pipeline cannot be asked for tensors"),
        (linear, KEPT, 2, "calls of a module are steps"),
        (lambda: fresh(PIXART), KEPT, -1, "say how many generations"),
        (lambda: fresh(PIXART), KEPT, True, "say how many generations"),
    ],
)
def test_what_cannot_be_checked_is_refused(target: Any, plan: Plan, check: Any, words: str) -> None:
    made = target()
    kind, model = type(made), getattr(made, "transformer", None)
    with pytest.raises(GraphCacheError, match=words):
        graphcache.transform(made, plan, check=check)
    assert type(made) is kind
    assert getattr(made, "transformer", None) is model


def test_what_a_comparison_measured_can_be_promised() -> None:
    (_, row) = graphcache.compare(
        linear(), {"plan": PLAN}, [1, 2], steps=STEPS, sampler=Sampler(), backend=None
    )
    assert row.promise is not None
    assert row.promise.samples == 4, "each of the two samples is a batch of two"
    assert PLAN.promising(row.promise).promise is not None
    assert row.promise.mean == pytest.approx(row.psnr, abs=0.011)
