"""Which step a call is: told by a scheduler, by a pipeline's fields, by the timestep, or counted."""

import copy
import logging
from typing import Any

import diffusers
import pytest
import torch

import graphcache
from graphcache import GraphCacheError, Plan, PlanError, StateError, presets
from graphcache.runtime import schedulers
from graphcache.runtime import step_tracking as placement
from pipelines import PIPELINES
from reference import assert_same, subject
from reference_pipeline import reference, transformed, untouched
from tiny import arguments, tiny

MIXED = Plan.parse(
    "plan steps=6 preset=none\nt = taylorseer order=2\n@mlp ##t#tt\n@self #.##.#\n@cross #..#.."
)


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every timestep that is read, which would wait for a device."""
    seen: list[float] = []
    read = schedulers.read_timestep

    def reading(timestep: torch.Tensor) -> float:
        seen.append(read(timestep))
        return seen[-1]

    monkeypatch.setattr(schedulers, "read_timestep", reading)
    monkeypatch.setattr(placement, "read_timestep", reading)
    monkeypatch.setattr(placement, "read_progress", reading)
    return seen


READS = {
    "flux": 0,
    "pixart": 0,
    "chroma": 2,
    "mochi": 0,
    "wan": 0,
    "sd3": 1,
    "dit": 3,
    "wan_v2v": 3,
    "latte": 3,
}
"""Where nobody says at which index a generation begins, its first timestep is read. A second call of the same
step, and one that may be, have their timesteps compared: windows of a clip would be counted as steps.
"""


@pytest.mark.parametrize("name", READS)
def test_a_scheduler_tells_the_step_without_reading_the_device(name: str, reads: list[float]) -> None:
    tiny_pipe = PIPELINES[name]
    pipe = transformed(tiny_pipe, presets.fora(6))
    for _ in range(2):
        reads.clear()
        tiny_pipe.generate(pipe, 6)
        assert len(reads) == READS[name]


def test_a_bare_module_reads_each_timestep_unless_it_only_counts(reads: list[float]) -> None:
    on = subject("chunked_dit")
    for wait, expected in (("step", 6), ("never", 0)):
        reads.clear()
        model = on.transform(MIXED, wait=wait)
        for _ in range(2):
            assert_same(on.sample(model, 6), on.sample(on.reference(MIXED), 6))
        assert len(reads) == 2 * expected


def test_counting_keeps_the_branches_of_contexts_apart() -> None:
    on = subject("pixart")
    model = on.transform(MIXED, wait="never")
    other = {**on.static(), "encoder_hidden_states": on.static()["encoder_hidden_states"] * 2}
    calls = {"cond": on.static(), "uncond": other}
    for _ in range(2):
        references = {name: on.reference(MIXED) for name in calls}
        for step in range(6):
            for name, static in calls.items():
                kwargs = on.case.call(static, on.latents(step), 1 - step / 6)
                with model.cache_context(name):
                    assert_same(model(**kwargs), references[name](**kwargs))


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_declared_branches_keep_caches_of_their_own(order: tuple[str, str]) -> None:
    """Two calls a step in either order, and in half of the steps only one of them."""
    on = subject("pixart")
    model = on.transform(MIXED, branches=2)
    statics = {name: {**on.static(), "encoder_hidden_states": torch.randn(2, 6, 24)} for name in order}
    references = {name: on.reference(MIXED) for name in order}
    for step in range(6):
        latents = on.latents(step)
        for name in order if step < 3 else order[1:]:
            kwargs = on.case.call(statics[name], latents, 1 - step / 6)
            assert_same(model(**kwargs), references[name](**kwargs))
    labels = [branch.branch for branch in model.summary().branches]
    assert sorted(labels) == ["", "call 2"]


def test_declared_branches_and_a_second_order_solver() -> None:
    on = subject("pixart")
    model = on.transform(MIXED, branches=2)
    statics = [{**on.static(), "encoder_hidden_states": torch.randn(2, 6, 24)} for _ in range(2)]
    references = [on.reference(MIXED) for _ in statics]
    for seed, t in enumerate((1.0, 0.75, 0.75, 0.5, 0.5, 0.25)):
        for static, run in zip(statics, references, strict=True):
            kwargs = on.case.call(static, on.latents(seed), t)
            assert_same(model(**kwargs), run(**kwargs))


def test_one_call_more_than_declared_is_refused() -> None:
    on = subject("pixart")
    model = on.transform(MIXED, branches=2)
    for number in range(2):
        model(**on.case.call(on.static(), on.latents(number), 1.0))
    third = on.case.call(on.static(), on.latents(2), 1.0)
    with pytest.raises(StateError, match=r"called 3 times.*branches=2 were declared.*model\.reset\(\)"):
        model(**third)
    model.reset()
    model(**third)
    assert [len(branch.steps) for branch in model.summary().branches] == [1]


@pytest.mark.parametrize("options", [{"branches": 0}, {"branches": True}, {"wait": "often"}])
def test_options_that_say_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(GraphCacheError, match=r"branches=|wait="):
        graphcache.transform(tiny(), MIXED, **options)


def test_branches_cannot_be_told_apart_without_the_timestep() -> None:
    with pytest.raises(GraphCacheError, match="cannot be told apart without the timestep"):
        graphcache.transform(tiny(), MIXED, branches=2, wait="never")


def test_step_fields_of_a_context_tell_the_step_of_a_bare_module() -> None:
    on = subject("wan")
    model = on.transform(MIXED)
    plan = MIXED.resample(4)
    for _ in range(2):
        run = on.reference(plan, 1)
        for step in (1, 2, 3):
            kwargs = on.case.call(on.static(), on.latents(step), 0.5)
            with model.cache_context("cond", step_index=step, num_inference_steps=4, sigma=0.5):
                assert_same(model(**kwargs), run(**kwargs))


def test_a_transformer_put_into_a_pipeline_by_hand() -> None:
    """Wan says its step with each call; FLUX does not, so that the timestep tells."""
    for name, steps in (("wan", 4), ("flux", 6)):
        tiny_pipe = PIPELINES[name]
        pipe = tiny_pipe.make()
        pipe.transformer = graphcache.transform(pipe.transformer, presets.fora(6))
        for _ in range(2):
            assert_same(tiny_pipe.generate(pipe, steps), reference(tiny_pipe, presets.fora, steps))


def test_another_number_of_steps_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tiny_pipe = PIPELINES["pixart"]
    pipe = transformed(tiny_pipe, presets.fora(6))
    with caplog.at_level(logging.WARNING, logger="graphcache"):
        for steps in (6, 4, 6, 4):
            tiny_pipe.generate(pipe, steps)
    assert [record.getMessage() for record in caplog.records] == [
        "the plan has 6 steps, this generation 4: it was evaluated anew"
    ]
    assert pipe.transformer.plan == presets.fora(6)


def test_listed_coefficients_are_replaced_for_other_steps_with_a_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny_pipe = PIPELINES["pixart"]
    plan = Plan.parse("plan steps=6 preset=none\nf = fitted order=1\n* ##f###\n  step 2 = 1.5 -0.5")
    pipe = transformed(tiny_pipe, plan)
    with caplog.at_level(logging.WARNING, logger="graphcache"):
        made = tiny_pipe.generate(pipe, 4)
    assert "so values are extrapolated linearly" in caplog.text
    other = transformed(tiny_pipe, plan.resample(4))
    assert_same(made, tiny_pipe.generate(other, 4))


def test_a_plan_for_another_scheduler_or_model_is_refused() -> None:
    tiny_pipe = PIPELINES["pixart"]
    pipe = tiny_pipe.make()
    kind = type(pipe.scheduler).__name__
    for header, message in (
        ("scheduler=PNDMScheduler", f"made for a PNDMScheduler, and this generation runs a {kind}"),
        ("graph=mother", "the plan was made for model mother, and this one is m"),
    ):
        graphcache.transform(pipe, Plan.parse(f"plan steps=6 {header} preset=none\n* #.#.#."))
        with pytest.raises(PlanError, match=message):
            tiny_pipe.generate(pipe, 6)
    graphcache.transform(pipe, Plan.parse(f"plan steps=6 scheduler={kind} preset=none\n* #.#.#."))
    tiny_pipe.generate(pipe, 6)


KINDS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


def test_the_scheduler_may_be_replaced_at_any_time() -> None:
    tiny_pipe = PIPELINES["pixart"]
    pipe = transformed(tiny_pipe, presets.fora(6))
    plain = untouched(tiny_pipe)
    given = plain.scheduler
    try:
        for kind in KINDS:
            pipe.scheduler, plain.scheduler = (
                getattr(diffusers, kind).from_config(given.config) for _ in range(2)
            )
            assert_same(tiny_pipe.generate(pipe, 6), reference(tiny_pipe, presets.fora, 6))
    finally:
        plain.scheduler = given


def test_reset_announces_another_number_of_steps() -> None:
    on = subject("chunked_dit")
    model = on.transform(presets.fora(6))
    model.reset(steps=9)
    for _ in range(2):
        assert_same(on.sample(model, 9), on.sample(on.reference(presets.fora(9)), 9))
    model.reset(steps=6)
    assert_same(on.sample(model, 6), on.sample(on.reference(presets.fora(6)), 6))


def test_a_pipeline_that_is_gone_leaves_a_bare_module() -> None:
    model = graphcache.transform(PIPELINES["dit"].make(), presets.fora(6)).transformer
    kwargs = subject("dit").case.kwargs(t=1.0)
    assert_same(model(**kwargs), graphcache.restore(model)(**kwargs))


def test_more_calls_at_a_step_than_branches_are_likely_are_refused() -> None:
    """The pipeline's scheduler has begun, and somebody calls the model without it."""
    tiny_pipe = PIPELINES["flux"]
    pipe = transformed(tiny_pipe, presets.fora(6))
    pipe.scheduler.set_timesteps(6, mu=1.0)
    on = subject("flux")
    calls = [on.case.call(on.static(), on.latents(), 1.0) for _ in range(5)]
    for kwargs in calls[:4]:
        pipe.transformer(**kwargs)
    with pytest.raises(StateError, match=r"called 5 times at one timestep.*model\.session\(\)"):
        pipe.transformer(**calls[4])


def test_a_session_follows_the_scheduler_that_it_is_given() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    cached = graphcache.transform(tiny(), presets.fora(6))
    scheduler.set_timesteps(4)
    x = arguments()["x"]
    with cached.session(scheduler=scheduler):
        for t in scheduler.timesteps:
            noise = cached(**{**arguments(), "x": x, "timestep": t.expand(2) / 1000})
            x = scheduler.step(noise, t, x, return_dict=False)[0]
        assert [step.reused for step in cached.summary().branches[0].steps] == [0, 2, 2, 0]


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize(
    "kind", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_a_loop_of_ones_own_may_start_in_the_middle_of_a_schedule(kind: str, scale: int) -> None:
    """Also where the model is given a thousandth of the timestep, and no begin index was set."""
    scheduler = getattr(diffusers, kind)()
    scheduler.set_timesteps(6)
    cached = graphcache.transform(tiny(), presets.fora(6))
    alone = graphcache.transform(tiny(), presets.fora(6))
    alone.reset(start_step=3)
    with cached.session(scheduler=scheduler):
        for t in scheduler.timesteps[3:]:
            kwargs = {**arguments(), "timestep": (t / scale).float().expand(2)}
            noise = cached(**kwargs)
            assert_same(noise, alone(**kwargs))
            scheduler.step(noise, t, arguments()["x"])
        (branch,) = cached.summary().branches
    assert [step.step for step in branch.steps] == [3, 4, 5]


def test_a_copied_pipeline_follows_its_own_scheduler() -> None:
    tiny_pipe = PIPELINES["pixart"]
    pipe = transformed(tiny_pipe, presets.fora(6))
    twin = copy.deepcopy(pipe)
    weights = zip(pipe.transformer.parameters(), twin.transformer.parameters(), strict=True)
    assert not any(mine is theirs for mine, theirs in weights)
    assert_same(tiny_pipe.generate(twin, 4), reference(tiny_pipe, presets.fora, 4))
    assert pipe.transformer.summary().branches == ()
