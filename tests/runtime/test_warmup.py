"""After `warmup` a generation captures and compiles nothing, and computes what it would have."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import graphcache
from graphcache import CaptureError, Plan, PlanError, presets
from inside import programs_of, states_of
from reference import assert_same, subject
from tiny import arguments, tiny
from zoo import CASES

STEPS = 5
PLANS = {
    "taylorseer": presets.taylorseer(STEPS, interval=2),
    "toca": presets.toca(STEPS),
    "clusters": presets.clusca(STEPS),
    "ranges": Plan.parse("plan steps=5\nrange(0..1) #.#.#"),
}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.few(2)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("name", "how"), [("dit", "toca"), ("flux", "taylorseer"), ("pixart", "clusters"), ("wan", "ranges")]
)
def test_nothing_is_left_to_capture_or_compile(name: str, how: str, offload: bool) -> None:
    plan, case, model = PLANS[how], CASES[name], subject(name).model
    counter = CompileCounter()
    options: dict[str, Any] = {"timestep": case.timestep, "offload": offload}
    cached = graphcache.transform(model, plan, backend=counter, **options)
    cached.warmup(case.kwargs(2), case.kwargs(3), progress=False)
    made = counter.frame_count
    assert made
    assert len(programs_of(cached)) == 2
    assert not states_of(cached), "no generation has begun"
    for batch in (2, 3):
        assert_same(run(cached, name, batch), run(graphcache.transform(model, plan, **options), name, batch))
    assert counter.frame_count == made
    assert len(programs_of(cached)) == 2


def run(model: Any, name: str, batch: int) -> list[Tensor]:
    case = CASES[name]
    static, latents, found = case.static(batch), case.latents(batch), []
    for step in range(STEPS):
        found.append(case.prediction(model(**case.call(static, latents, 1 - step / STEPS))))
        latents = latents - found[-1] / STEPS
    return found


GUIDED = "plan steps=4 conditional=last\nt = taylorseer order=1\n@mlp ##t#\nguidance #.#."


@pytest.mark.parametrize("doubled", [True, False])
def test_both_branches_of_guidance_are_ready(doubled: bool, caplog: pytest.LogCaptureFixture) -> None:
    counter, plan = CompileCounter(), Plan.parse(GUIDED)
    cached: Any = graphcache.transform(tiny(2), plan, backend=counter)
    call = arguments(batch=2)
    call["x"] = call["x"][:1].repeat(2, 1, 1) if doubled else call["x"]
    cached.warmup(call, progress=False)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    made = counter.frame_count
    for step in range(4):
        now = {**call, "timestep": torch.full((2,), 1 - step / 4)}
        for name in ("",) if doubled else ("cond", "uncond"):
            with cached.cache_context(name):
                cached(**now)
    assert counter.frame_count == made >= 2


def test_a_generation_in_progress_keeps_its_caches() -> None:
    model = tiny(2)
    cached: Any = graphcache.transform(model, PLANS["taylorseer"])
    plain = graphcache.transform(model, PLANS["taylorseer"])
    for step in range(STEPS):
        call = arguments(t=1 - step / STEPS)
        assert_same(cached(**call), plain(**call))
        cached.warmup(arguments(tokens=4 + step), arguments(), progress=False)


def test_another_number_of_steps_is_compiled_for(caplog: pytest.LogCaptureFixture) -> None:
    counter = CompileCounter()
    cached: Any = graphcache.transform(tiny(2), presets.fora(4, interval=4), backend=counter)
    with caplog.at_level(logging.WARNING, "graphcache"):
        cached.warmup(arguments(), steps=9, progress=False)
    assert any("this generation 9" in record.getMessage() for record in caplog.records)
    assert counter.frame_count == 2


def test_what_does_not_fit_is_refused() -> None:
    cached: Any = graphcache.transform(tiny(2), Plan.parse("plan steps=2\n@cross #."))
    with pytest.raises(PlanError, match="cross"):
        cached.warmup(arguments(), progress=False)
    with pytest.raises(CaptureError, match="training mode"):
        graphcache.transform(tiny(2).train(), presets.fora(2)).warmup(arguments(), progress=False)


def test_a_bar_is_drawn_on_the_error_output(capfd: pytest.CaptureFixture[str]) -> None:
    cached: Any = graphcache.transform(tiny(1), presets.fora(2))
    cached.warmup(arguments())
    out, err = capfd.readouterr()
    assert "compiling" in err
    assert not out
