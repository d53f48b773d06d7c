"""`max_cache_bytes` is kept: as it is, by host memory, or by a refusal with a plan that fits."""

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._dynamo.testing import CompileCounter

import graphcache
from graphcache import GraphCacheError, Plan, PlanError, presets
from inside import programs_of, states_of
from reference import assert_same
from tiny import arguments, tiny

STEPS = 4
PLAN = presets.taylorseer(STEPS, interval=2)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def generation(model: Any, names: tuple[str, ...] = ("",)) -> list[torch.Tensor]:
    results = []
    for step in range(STEPS):
        for name in names:
            with model.cache_context(name):
                results.append(model(**arguments(t=1 - step / STEPS)))
    return results


def peak(plan: Plan, depth: int = 3) -> int:
    cached: Any = graphcache.transform(tiny(depth), plan)
    generation(cached)
    (branch,) = cached.summary().branches
    return int(branch.peak_bytes)


def offloads(model: Any) -> list[bool]:
    return [state.program.offload for state in states_of(model).values()]


def test_what_fits_stays_where_it_is() -> None:
    cached = graphcache.transform(tiny(3), PLAN, max_cache_bytes=peak(PLAN))
    assert_same(generation(cached), generation(graphcache.transform(tiny(3), PLAN)))
    assert offloads(cached) == [False]


@pytest.mark.parametrize("allowed", [1.0, 1.7, 2.0])
def test_branches_share_the_limit(allowed: float, caplog: pytest.LogCaptureFixture) -> None:
    """The first one stays, and the second goes to host memory unless there is room for both."""
    names, depth = ("cond", "uncond"), 12
    limit = int(allowed * peak(PLAN, depth))
    cached = graphcache.transform(tiny(depth), PLAN, max_cache_bytes=limit)
    plain = graphcache.transform(tiny(depth), PLAN)
    if allowed == 1:
        with pytest.raises(PlanError, match=r"beside the .* of the generation's other branches"):
            generation(cached, names)
        return
    with caplog.at_level(logging.WARNING, "graphcache"):
        assert_same(generation(cached, names), generation(plain, names))
        assert_same(generation(cached, names), generation(plain, names))
    assert offloads(cached) == [False, allowed < 2]
    assert sum("kept in host memory" in record.getMessage() for record in caplog.records) == (allowed < 2)


def test_branches_that_have_generations_of_their_own_share_it_too() -> None:
    """As where fields of the context tell the step: each name begins by itself."""
    limit = int(1.7 * peak(PLAN, 12))
    cached: Any = graphcache.transform(tiny(12), PLAN, max_cache_bytes=limit)
    for _ in range(2):
        for step in range(STEPS):
            for name in ("cond", "uncond"):
                with cached.cache_context(name, step_index=step, num_inference_steps=STEPS):
                    cached(**arguments(t=1 - step / STEPS))
        assert offloads(cached) == [False, True]


def adapted() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tiny(12)
        inject_adapter_in_model(LoraConfig(r=1, target_modules=["out"], init_lora_weights=False), model)
    return model.eval()


def fade(model: nn.Module, scale: float) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] = scale


@pytest.mark.parametrize("changes", ["adapter", "input"])
def test_another_form_or_input_within_a_generation_stays_in_host_memory(changes: str) -> None:
    """What was cached there is read from there."""
    model, plain = adapted(), adapted()
    cached: Any = graphcache.transform(model, PLAN, max_cache_bytes=peak(PLAN, 12) // 2)
    expected = graphcache.transform(plain, PLAN)
    for _ in range(2):
        text = arguments()["text"]
        for step in range(STEPS):
            if changes == "adapter":
                for one in (model, plain):
                    fade(one, 1.0 if step < 2 else 0.5)
            else:
                text = text * 1.1
            call = {**arguments(t=1 - step / STEPS), "text": text}
            assert_same(cached(**call), expected(**call))
            assert offloads(cached) == [True]
    if changes == "input":
        assert [bool(program.varying) for program in programs_of(cached)] == [True], "seen once"


def test_warmup_is_made_for_what_the_limit_leaves() -> None:
    counter, plan = CompileCounter(), Plan.parse("plan steps=4\n@self #.#.\nguidance #.#.")
    for limit in (None, peak(PLAN, 6) // 4):
        cached: Any = graphcache.transform(tiny(6), plan, backend=counter, max_cache_bytes=limit)
        cached.warmup(arguments(), progress=False)
        made, call = counter.frame_count, arguments()
        for step in range(STEPS):
            for name in ("cond", "uncond"):
                with cached.cache_context(name):
                    cached(**{**call, "timestep": torch.full((2,), 1 - step / STEPS)})
        assert counter.frame_count == made
    assert True in offloads(cached)


def test_a_plan_that_fits_is_told() -> None:
    for plan in (PLAN, presets.toca(STEPS), presets.fora(STEPS, interval=2)):
        limit = peak(plan, 4)
        while True:  # down to where host memory does not help
            cached: Any = graphcache.transform(tiny(4), plan, max_cache_bytes=limit)
            try:
                generation(cached)
            except PlanError as error:
                refused = str(error)
                break
            limit = limit * 3 // 4
        assert re.match(r"max_cache_bytes=\d+.*This plan would fit", refused)
        told = Plan.parse(refused.split("\n", 1)[1])
        assert re.search(r"range\(0\.0\.\.1\.0\)|output", str(told))
        cached = graphcache.transform(tiny(4), told, max_cache_bytes=limit)
        assert_same(generation(cached), generation(graphcache.transform(tiny(4), told)))
        assert cached.summary().branches[0].peak_bytes <= limit


def test_where_nothing_fits_computing_is_advised() -> None:
    cached: Any = graphcache.transform(tiny(3), PLAN, max_cache_bytes=16)
    with pytest.raises(PlanError, match=r"Nothing that caches fits: raise the limit"):
        cached(**arguments())
    with pytest.raises(PlanError, match="Nothing that caches fits"):
        cached(**arguments())
    assert not states_of(cached)
    for none in (0, -1, 2.5, True):
        with pytest.raises(GraphCacheError, match="max_cache_bytes="):
            graphcache.transform(tiny(1), PLAN, max_cache_bytes=none)  # type: ignore[arg-type]
