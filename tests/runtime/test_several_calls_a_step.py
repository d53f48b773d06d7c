"""Every loop that calls a denoiser more than once a step: each call as if it were alone, or a refusal."""

import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcache
from graphcache import Plan, StateError
from reference import assert_same
from tiny import tiny

STEPS = 6
PLAN = Plan.parse("plan steps=6 preset=none\nt = taylorseer order=1\n@self #.#t.#\n@mlp #.##..")
Call = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(2)


class Step:
    """The scheduler of a loop, as far as it tells the step."""

    def __init__(self, with_index: bool) -> None:
        self.num_inference_steps = STEPS
        self.timesteps = torch.linspace(1, 0.1, STEPS)
        if with_index:
            self.step_index: int | None = None

    def at(self, step: int) -> None:
        if hasattr(self, "step_index"):
            self.step_index = step


def loop(
    call: Call,
    clips: Sequence[Tensor],
    texts: Sequence[Tensor],
    order: Callable[[int], Sequence[int]],
    **options: Any,
) -> list[Tensor]:
    """Denoise several latents side by side, one call each a step."""
    clips, driver = list(clips), options.get("driver")
    if driver:
        driver.timesteps = torch.linspace(1, 0.1, STEPS)
    for step in range(STEPS):
        timestep = 1 - step * 0.18
        if driver:
            driver.at(step)
            timestep = driver.timesteps[step].item()
        for k in order(step):
            time = torch.full((len(clips[k]),), timestep)
            text = texts[k].clone() if options.get("remade") else texts[k]
            clips[k] = clips[k] - 0.1 * call(x=clips[k], timestep=time, text=text)
    return clips


def in_order(count: int) -> Callable[[int], Sequence[int]]:
    return lambda step: range(count)


def alone(model: Any, clips: Sequence[Tensor], texts: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """What each latents become under a model of their own."""
    return [
        loop(graphcache.transform(model, PLAN), [clip], [text], in_order(1), **options)[0]
        for clip, text in zip(clips, texts, strict=True)
    ]


def made(count: int, tokens: Sequence[int] = (3,)) -> list[Tensor]:
    return [torch.randn(1, tokens[k % len(tokens)], 4) for k in range(count)]


DRIVERS = pytest.mark.parametrize(
    "driver", [None, Step(True), Step(False)], ids=["timestep", "index", "no index"]
)


@DRIVERS
@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize("count", [2, 4, 18])
def test_windows_of_one_prompt_are_kept_apart_when_declared(
    model: Any, count: int, remade: bool, driver: Step | None, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing is said, since nothing is lost."""
    clips, texts = made(count), [torch.randn(1, 4)] * count
    expected = alone(model, clips, texts, driver=driver)
    cached: Any = graphcache.transform(model, PLAN, branches=count)
    for _ in range(2):
        with cached.session(driver):
            result = loop(cached, clips, texts, in_order(count), remade=remade, driver=driver)
            assert_same(result, expected)
            assert [step.reused for step in cached.summary().branches[-1].steps] == [0, 4, 0, 0, 4, 2]
    assert not [record for record in caplog.records if record.name == "graphcache"]


@DRIVERS
@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_windows_of_one_prompt_are_refused_when_nobody_said_so(
    model: Any, count: int, remade: bool, driver: Step | None
) -> None:
    cached: Any = graphcache.transform(model, PLAN)
    with cached.session(driver), pytest.raises(StateError, match=r"cache_context.*branches="):
        loop(cached, made(count), [torch.randn(1, 4)] * count, in_order(count), remade=remade, driver=driver)
    assert all(branch.ideal_speedup < 1.2 for branch in cached.summary().branches)


@pytest.mark.parametrize("count", [2, 17, 40])
def test_any_number_of_windows_has_names(model: Any, count: int) -> None:
    clips, texts = made(count), [torch.randn(1, 4)] * count
    cached: Any = graphcache.transform(model, PLAN)
    turn = iter(range(count * STEPS))

    def named(**kwargs: Tensor) -> Tensor:
        with cached.cache_context(f"window {next(turn) % count}"):
            return cached(**kwargs)  # type: ignore[no-any-return]

    assert_same(loop(named, clips, texts, in_order(count)), alone(model, clips, texts))


@DRIVERS
@pytest.mark.parametrize("prompt_first", [True, False])
def test_windows_under_guidance(model: Any, prompt_first: bool, driver: Step | None) -> None:
    prompts, windows = made(2, (1,)), made(3)
    pairs = (
        [(w, p) for p in range(2) for w in range(3)]
        if prompt_first
        else [(w, p) for w in range(3) for p in range(2)]
    )
    clips, texts = [windows[w] for w, _ in pairs], [prompts[p][:, 0] for _, p in pairs]
    cached: Any = graphcache.transform(model, PLAN, branches=6)
    with cached.session(driver):
        result = loop(cached, clips, texts, in_order(6), driver=driver)
    assert_same(result, alone(model, clips, texts, driver=driver))


@DRIVERS
def test_tiles_of_differing_sizes(model: Any, driver: Step | None) -> None:
    clips, texts = made(5, (3, 5, 4)), [torch.randn(1, 4)] * 5
    cached: Any = graphcache.transform(model, PLAN, branches=5)
    with cached.session(driver):
        assert_same(
            loop(cached, clips, texts, in_order(5), driver=driver), alone(model, clips, texts, driver=driver)
        )
    undeclared: Any = graphcache.transform(model, PLAN)
    with undeclared.session(driver), pytest.raises(StateError, match="branches="):
        loop(undeclared, clips, texts, in_order(5), driver=driver)


@pytest.mark.parametrize("declared", [None, 3])
def test_regions_with_prompts_of_their_own_may_come_in_any_order(model: Any, declared: int | None) -> None:
    """The texts stay the same objects, by which the calls are known wherever they come in a step."""
    clips, texts, driver = made(3), [torch.randn(1, 4) for _ in range(3)], Step(True)
    cached: Any = graphcache.transform(model, PLAN, branches=declared)
    orders = [torch.randperm(3).tolist() for _ in range(STEPS)]
    with cached.session(driver):
        result = loop(cached, clips, texts, lambda step: orders[step], driver=driver)
    assert_same(result, alone(model, clips, texts, driver=driver))


@DRIVERS
def test_a_call_more_than_declared_is_refused(model: Any, driver: Step | None) -> None:
    cached: Any = graphcache.transform(model, PLAN, branches=3)
    with (
        cached.session(driver),
        pytest.raises(StateError, match=r"called 4 times at one timestep.*branches=3 were"),
    ):
        loop(cached, made(4), [torch.randn(1, 4)] * 4, in_order(4), driver=driver)


LATE = {
    "unconditional first": lambda step: [1, 0] if step else [0],
    "conditional first": lambda step: [0, 1] if step else [0],
    "a region joins before the last": lambda step: [0, 2, 1] if step > 1 else [0, 1],
    "a region takes another's place": lambda step: [0, 2] if step > 1 else [0, 1],
}


@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize("order", LATE.values(), ids=LATE)
@pytest.mark.parametrize(
    ("driver", "declared"), [(Step(True), None), (Step(True), 3), (Step(False), 3), (None, 3)]
)
def test_calls_that_join_late_read_nobodys_caches(
    model: Any,
    order: Callable[[int], Sequence[int]],
    remade: bool,
    driver: Step | None,
    declared: int | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each is as if it had begun alone at its first step; the log says that its caches begin late."""
    clips, texts = made(3), [torch.randn(1, 4) for _ in range(3)]
    cached: Any = graphcache.transform(model, PLAN, branches=declared)
    with cached.session(driver):
        result = loop(cached, clips, texts, order, remade=remade, driver=driver)
    for k, (clip, text) in enumerate(zip(clips, texts, strict=True)):
        steps = [step for step in range(STEPS) if k in order(step)]
        own: Any = graphcache.transform(model, PLAN)
        if steps:
            own.reset(start_step=steps[0])
        for step in steps:
            time = torch.full((1,), driver.timesteps[step].item() if driver else 1 - step * 0.18)
            clip = clip - 0.1 * own(x=clip, timestep=time, text=text)
        assert_same(result[k], clip)
    assert [r for r in caplog.records if "fits none of the calls of the steps before" in r.getMessage()]


@DRIVERS
def test_texts_written_into_two_buffers_in_turn(
    model: Any, driver: Step | None, caplog: pytest.LogCaptureFixture
) -> None:
    """No object tells the calls apart: none reads the other's caches, and the log says what is lost."""
    clips, texts = made(2), [torch.randn(1, 4) for _ in range(2)]
    buffers = [torch.zeros(1, 4) for _ in range(2)]
    cached: Any = graphcache.transform(model, PLAN, branches=2)
    begun: list[list[Any]] = [[], []]
    if driver:
        driver.timesteps = torch.linspace(1, 0.1, STEPS)
    with cached.session(driver):
        for step in range(STEPS):
            if driver:
                driver.at(step)
            time = torch.full((1,), driver.timesteps[step].item() if driver else 1 - step * 0.18)
            for k in range(2):
                begun[k].append(graphcache.transform(model, PLAN))
                begun[k][-1].reset(start_step=step)
                allowed = [run(x=clips[k], timestep=time, text=texts[k]) for run in begun[k]]
                buffer = buffers[(k + step) % 2].copy_(texts[k])
                result = cached(x=clips[k], timestep=time, text=buffer)
                assert any(torch.equal(result, other) for other in allowed)
    assert caplog.records


def test_a_timestep_and_latents_that_are_written_in_place(model: Any) -> None:
    for inference in (False, True):
        driver = Step(False)
        with torch.inference_mode(inference):
            (clip,), text, time = made(1), torch.randn(1, 4), torch.ones(1)
            expected = alone(model, [clip.clone()], [text], driver=driver)
            cached: Any = graphcache.transform(model, PLAN)
            with cached.session(driver):
                driver.timesteps = torch.linspace(1, 0.1, STEPS)
                for step in range(STEPS):
                    time.fill_(driver.timesteps[step])
                    clip.sub_(0.1 * cached(x=clip, timestep=time, text=text))
            assert_same([clip], expected)


def test_a_scheduler_that_goes_back_begins_anew_and_the_log_says_so(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Restart sampling: each stretch is as if it had begun alone, mid-schedule."""
    driver, (clip,), text = Step(True), made(1), torch.randn(1, 4)
    cached: Any = graphcache.transform(model, PLAN)
    stretches = ([0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5])
    with cached.session(driver):
        for steps in stretches:
            alone: Any = graphcache.transform(model, PLAN)
            alone.reset(start_step=steps[0])
            for step in steps:
                driver.at(step)
                call = {"x": clip, "timestep": driver.timesteps[step].expand(1), "text": text}
                assert_same(cached(**call), alone(**call))
    assert sum("the scheduler went back from step" in r.getMessage() for r in caplog.records) == 2


def test_windows_that_begin_late_are_refused(model: Any) -> None:
    cached = graphcache.transform(model, PLAN)
    with pytest.raises(StateError, match="step 3: this model was called 2 times"):
        loop(cached, made(2), [torch.randn(1, 4)] * 2, lambda step: range(1 + (step > 2)))


def test_a_branch_that_was_not_there_at_first_may_be_a_second_evaluation(model: Any) -> None:
    cached = graphcache.transform(model, PLAN, branches=2)
    with pytest.raises(StateError, match="may be another branch's or a second evaluation"):
        loop(cached, made(2), [torch.randn(1, 4)] * 2, lambda step: range(1 + (step > 0)))


def test_a_branch_that_misses_a_step_begins_anew_and_the_log_says_so(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    clips, texts = made(2), [torch.randn(1, 4) for _ in range(2)]
    cached = graphcache.transform(model, PLAN, branches=2)
    with caplog.at_level(logging.WARNING, "graphcache"):
        loop(cached, clips, texts, lambda step: range(1 + (step != 2)))
    assert [r for r in caplog.records if "call 2 of a step, missed" in r.getMessage()]


def test_counting_takes_no_window_for_a_step(model: Any) -> None:
    """Where timesteps are not read, one and the same tensor tells that the step is the same."""
    cached = graphcache.transform(model, PLAN, wait="never")
    clips, text, time = made(2), torch.randn(1, 4), torch.ones(1)
    cached(x=clips[0], timestep=time, text=text)
    with pytest.raises(StateError, match="called 2 times at one timestep"):
        cached(x=clips[1], timestep=time, text=text)


def test_the_very_same_call_again_begins_again(model: Any) -> None:
    """Somebody who warms up, or measures."""
    cached: Any = graphcache.transform(model, PLAN)
    (clip,), text = made(1), torch.randn(1, 4)
    call = {"x": clip, "timestep": torch.ones(1), "text": text}
    for _ in range(3):
        assert_same(cached(**call), model(**call))
    assert_same(loop(cached, [clip], [text], in_order(1)), alone(model, [clip], [text]))


def test_a_scheduler_that_stands_still_is_told_from_branches(model: Any) -> None:
    """Its pipeline steps copies of it: the timesteps tell the step, with guidance in two calls as without."""
    scheduler = SimpleNamespace(num_inference_steps=STEPS, step_index=None, begin_index=None)
    for count in (1, 2, 3):
        clips, texts = made(count), [torch.randn(1, 4) for _ in range(count)]
        cached: Any = graphcache.transform(model, PLAN)
        for _ in range(2):
            scheduler.timesteps = torch.tensor([1 - step * 0.18 for step in range(STEPS)])
            with cached.session(scheduler):
                assert_same(loop(cached, clips, texts, in_order(count)), alone(model, clips, texts))
                assert [step.reused for step in cached.summary().branches[-1].steps] == [0, 4, 0, 0, 4, 2]


def test_frames_with_timesteps_of_their_own(model: Any) -> None:
    """Noise that falls frame by frame: no maximum tells the steps, their mean does."""
    times = [torch.tensor([max(0.0, 1 - 0.2 * max(0, step - k)) for k in range(3)]) for step in range(STEPS)]
    plan = graphcache.presets.fora(STEPS, interval=2)
    cached: Any = graphcache.transform(model, plan)
    x, text = torch.randn(3, 3, 4), torch.randn(3, 4)
    for time in times:
        x = x - 0.1 * cached(x=x, timestep=time, text=text)
    assert [step.step for step in cached.summary().branches[0].steps] == list(range(STEPS))
