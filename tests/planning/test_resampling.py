"""A found plan in a generation of another length is found anew by its profile."""

import logging
import pickle
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import graphcache
from graphcache import GraphCacheError, Plan, PlanError, Resampler
from graphcache.planning.prediction import speedup
from graphcache.planning.timeline import meet
from linear import Sampler, linear
from profiled import of_steps as profiled
from reference import assert_same


@cache
def found() -> Plan:
    plan = graphcache.search(profiled(32), speedup=2.0).plan
    return replace(plan, graph=profiled(32).provenance.graph)


@pytest.mark.few(1)
@pytest.mark.parametrize("steps", [16, 20])
def test_another_length_has_a_plan_as_fast_as_the_given_one(steps: int) -> None:
    plan, profile = found(), profiled(32)
    other = Resampler(profile)(plan, steps)
    assert (other.steps, other.graph, other.conditional) == (steps, plan.graph, plan.conditional)
    expected = graphcache.search(profile, steps=steps, speedup=speedup(meet("", plan, profile))).plan
    assert other.rows == expected.rows
    assert other.lists_coefficients, "no lines in their place"


def test_generations_run_under_it(caplog: pytest.LogCaptureFixture) -> None:
    plan, sampler = found(), Sampler("first")
    resample = pickle.loads(pickle.dumps(Resampler(profiled(32))))
    cached = graphcache.transform(linear(2), plan, resample=resample)
    direct = graphcache.transform(linear(2), Resampler(profiled(32))(plan, 16))
    plain = graphcache.transform(linear(2), plan)
    for model in (cached, plain):
        model.reset(steps=16)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        results = [sampler(model, 1, 16) for model in (cached, direct, plain)]
    assert_same(results[0], results[1])
    assert not torch.equal(results[0], results[2]), "which takes lines"
    assert [record.getMessage() for record in caplog.records if "resample= made" in record.getMessage()]
    exact = sampler(linear(2), 1, 16)
    errors = [float((result - exact).norm()) for result in results]
    assert errors[0] < errors[2]


def test_what_no_search_finds_is_resampled_and_said(caplog: pytest.LogCaptureFixture) -> None:
    plan = found()
    assert Resampler(profiled(32))(plan, 1) == plan.resample(1)
    assert "no plan of 1 steps was found by the profile" in caplog.text
    caplog.clear()
    short = plan.resample(12)
    assert Resampler(profiled(32))(short, 16) == short.resample(16), "it is not of the profile's length"
    assert "the profile is of 32 steps" in caplog.text


def test_wrong_profiles_and_wrong_answers_are_refused() -> None:
    with pytest.raises(GraphCacheError, match="the profile that the plan was found by"):
        Resampler(profiled(32))(replace(found(), graph="other"), 16)
    wrong: list[Any] = [found(), "plan steps=16"]
    for answer, words in zip(wrong, ("returned a plan of 32 steps", "returned str"), strict=True):
        model = graphcache.transform(linear(2), found(), resample=lambda plan, steps, answer=answer: answer)
        with pytest.raises(PlanError, match=words):
            model.reset(steps=16)
