"""Whatever is done with a pipeline in whatever order: the reference's answer.

`PIPELINE_ACTIONS=2000 pytest tests/whole/test_stateful_pipelines.py` does more of it.
"""

import contextlib
import copy
import functools
import inspect
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import diffusers
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import graphcache
from graphcache import Plan, presets
from graphcache.runtime import runner
from pipelines import PIPELINES
from reference import assert_same
from reference_pipeline import fresh, parts, reference, untouched
from tests.whole.test_stateful import in_thread

ACTIONS = int(os.environ.get("PIPELINE_ACTIONS", "20"))
LENGTH = 10
NAMES = ("dit", "pixart", "flux", "wan", "chroma", "flux_img2img", "cogvideox_v2v", "sd3_skip_layers")
SCHEDULERS = {
    "dit": [diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.DPMSolverMultistepScheduler],
    "pixart": [
        diffusers.DPMSolverMultistepScheduler,
        diffusers.DDIMScheduler,
        diffusers.HeunDiscreteScheduler,
        diffusers.EulerAncestralDiscreteScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.PNDMScheduler,
    ],
}
PLANS = (
    functools.partial(presets.fora, interval=3),
    functools.partial(presets.taylorseer, interval=2, order=1),
    lambda steps: Plan.parse("plan steps=6 preset=none\n* ##.#..").resample(steps),
)
SETTINGS = settings(
    max_examples=max(1, min(ACTIONS, 200) // LENGTH),
    stateful_step_count=LENGTH,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CALLS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "guided": st.booleans(),
        "large": st.booleans(),
        "steps": st.sampled_from((6, 4)),
    }
)


class Stopped(Exception):
    """A user's accident."""


@contextmanager
def stopping(pipe: Any, after: int, inside: bool) -> Iterator[None]:
    """Raise in the middle of an evaluation, or in the scheduler's step that follows one."""
    target, name = (runner, "feed") if inside else (pipe.scheduler, "step")
    original, left = getattr(target, name), iter(range(after))

    def stop(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise Stopped
        return original(*args, **kwargs)

    with mock.patch.object(target, name, stop):
        yield


def cancel(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    pipe._interrupt = step >= 1
    return {}


def fail(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    if step == 1:
        raise Stopped
    return {}


class Pipeline(RuleBasedStateMachine):
    """Generations of any kind, accidents, other schedulers, other pipelines, sessions, weights."""

    counts: ClassVar[Counter[str]] = Counter()

    @initialize(name=st.sampled_from(NAMES), plan=st.sampled_from(PLANS))
    def make(self, name: str, plan: Any) -> None:
        self.name, self.tiny, self.plan = name, PIPELINES[name], plan
        self.given = untouched(self.tiny).scheduler
        self.pipe = fresh(self.tiny)
        self.weights = [
            (parameter, parameter.detach().clone())
            for model in parts(self.pipe).values()
            for parameter in model.parameters()
        ]
        graphcache.transform(self.pipe, plan(6))

    def teardown(self) -> None:
        """Other tests share the untouched pipeline."""
        untouched(self.tiny).scheduler = self.given
        for parameter, values in self.weights:
            parameter.data.copy_(values)

    def expected(self, call: dict[str, Any]) -> Any:
        return reference(self.tiny, self.plan, **call)

    @rule(call=CALLS)
    def generate(self, call: dict[str, Any]) -> None:
        self.counts["generation"] += 1
        assert_same(self.tiny.generate(self.pipe, **call), self.expected(call))

    @rule(call=CALLS, after=st.integers(0, 1), inside=st.booleans())
    def accident(self, call: dict[str, Any], after: int, inside: bool) -> None:
        self.counts["accident"] += 1
        with stopping(self.pipe, after, inside), pytest.raises(Stopped):
            self.tiny.generate(self.pipe, **call)

    @rule(data=st.data())
    def other_scheduler(self, data: st.DataObject) -> None:
        kinds = SCHEDULERS.get(self.name)
        if kinds is None:
            return
        self.counts["scheduler"] += 1
        kind = data.draw(st.sampled_from(kinds))
        self.pipe.scheduler = kind.from_config(self.given.config)
        untouched(self.tiny).scheduler = kind.from_config(self.given.config)

    @rule()
    def other_weights(self) -> None:
        """In place, as merging an adapter does; the untouched pipeline shares them."""
        self.counts["weights"] += 1
        for parameter, _ in self.weights[::7]:
            parameter.data.mul_(1.01)

    @rule(call=CALLS)
    def disabled(self, call: dict[str, Any]) -> None:
        self.counts["disabled"] += 1
        with self.pipe.transformer.disabled():
            result = self.tiny.generate(self.pipe, **call)
        assert_same(result, self.tiny.generate(untouched(self.tiny), **call))

    def another(self) -> Any:
        """A pipeline and scheduler of its own, over the same model."""
        other = self.tiny.make()
        other.scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        for part, model in parts(self.pipe).items():
            setattr(other, part, model)
        return other

    @rule(call=CALLS, named=st.booleans())
    def in_a_session_of_another_thread(self, call: dict[str, Any], named: bool) -> None:
        self.counts["session"] += 1
        other, results = self.another(), []

        def run() -> None:
            with self.pipe.transformer.session(scheduler=other.scheduler if named else None):
                results.append(self.tiny.generate(other, **call))

        in_thread(run)
        assert_same(results[0], self.expected(call))

    @rule(call=CALLS)
    def without_a_session(self, call: dict[str, Any]) -> None:
        self.counts["no session"] += 1
        assert_same(self.tiny.generate(self.another(), **call), self.expected(call))

    @rule(call=CALLS, how=st.sampled_from([cancel, fail]))
    def given_up_in_a_pool(self, call: dict[str, Any], how: Any) -> None:
        """A request that its thread does not bring to an end; the next ones come in other threads."""
        if "callback_on_step_end" not in inspect.signature(self.pipe.__call__).parameters:
            return
        self.counts[f"request: {how.__name__}"] += 1
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
            with contextlib.suppress(Stopped):
                one.submit(self.tiny.generate, self.pipe, **call, callback=how).result()
            for pool in (two, one):
                result = pool.submit(self.tiny.generate, self.pipe, **call).result()
                assert_same(result, self.expected(call))

    @rule()
    def copied(self) -> None:
        """The copy, with a scheduler of its own, goes on in the pipeline's place."""
        self.counts["copy"] += 1
        self.pipe = copy.copy(self.pipe)
        self.pipe.scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)


def test_a_pipeline_is_right() -> None:
    while Pipeline.counts.total() < ACTIONS:
        run_state_machine_as_test(Pipeline, settings=SETTINGS)
    print(f"\n{Pipeline.counts.total()} actions: {dict(Pipeline.counts)}")
