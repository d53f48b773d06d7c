"""Whatever a user does in whatever order: the answer is the reference interpreter's, or a GraphCacheError.

`ACTIONS=200000 pytest tests/test_stateful.py` does more of it.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import graphcache
from graphcache import Plan, StateError, runner
from graphcache.schedulers import Driver
from reference import Reference, assert_same, capture_call, runner_tensors
from tiny import arguments, tiny

ACTIONS = int(os.environ.get("ACTIONS", "400"))
LENGTH = 50
CONTEXTS = ("", "cond", "uncond")
PLANS = (
    Plan.parse("plan steps=6 preset=none\nt = taylorseer order=2\n@self ##t#tt\n@mlp #.##.#"),
    Plan.parse("plan steps=5 preset=none\nn = newton order=1\nc = tuned compute\nrange(0..0) ##n.#\n* #.#.."),
    graphcache.presets.fora(4),
    graphcache.presets.taylorseer(7, lite=True),
)
SHAPES = ((1, 3), (2, 3), (2, 5))
SETTINGS = settings(
    max_examples=max(1, min(ACTIONS, 2000) // LENGTH),
    stateful_step_count=LENGTH,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Expected:
    """A generation as a reader of the documentation would follow it, with a reference per context."""

    plan: Plan
    start: int
    shape: tuple[int, int]
    static: dict[str, Tensor]
    step: int = -1
    time: float = 1.0
    repeats: int = 0
    branches: dict[str, tuple[Reference, int]] = field(default_factory=dict)

    def call(self, latents: Tensor, context: str) -> dict[str, Any]:
        return {
            "x": latents,
            "timestep": torch.full((self.shape[0],), self.time),
            "text": self.static[context],
        }


class BareModule(RuleBasedStateMachine):
    """Generations, contexts, sessions, threads and accidents on one module without a scheduler."""

    counts: ClassVar[Counter[str]] = Counter()

    @initialize(plan=st.sampled_from(PLANS), backend=st.sampled_from([None, None, "eager"]))
    def make(self, plan: Plan, backend: str | None) -> None:
        self.model = tiny(1)
        self.cached: Any = graphcache.transform(self.model, plan, backend=backend)
        self.plan = plan
        self.captures: dict[tuple[int, int], Any] = {}
        self.sessions: list[Any] = [None]
        self.now: dict[int, Expected | None] = {0: None}
        self.steps = {0: plan.steps}
        self.seed = 0

    def within(self, session: int, action: Callable[[], Any]) -> Any:
        """Run something in a session, each of which is entered once and kept open."""
        with torch.no_grad():
            if session == 0:
                return action()
            engine = self.cached._graphcache
            with engine.surround(session=self.sessions[session]):
                return action()

    def reference(self, now: Expected, start: int) -> Reference:
        if now.shape not in self.captures:
            kwargs = arguments(1.0, *now.shape)
            with torch.no_grad():
                self.captures[now.shape] = capture_call(self.model, kwargs, "timestep")
        return Reference(self.captures[now.shape], now.plan, start)

    def noise(self, *shape: int) -> Tensor:
        self.seed += 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))

    def begin(self, session: int, shape: tuple[int, int], start: int = 0) -> Expected:
        """Another generation; only after one of a single evaluation the model has to be told."""
        before = self.now[session]
        if before is not None and before.step == before.start and not start:
            self.within(session, self.cached.reset)
        steps = self.steps[session]
        plan = graphcache.presets.resample(self.plan, steps)
        static = {name: self.noise(shape[0], 4) for name in CONTEXTS}
        now = Expected(plan, start, shape, static, step=start - 1)
        self.now[session] = now
        return now

    def evaluate(self, session: int, contexts: list[str]) -> None:
        """One evaluation: every context calls once, each result is compared."""
        now = self.now[session]
        assert now is not None
        latents = self.noise(*now.shape, 4)
        for context in contexts:
            kwargs = now.call(latents, context)
            reference, last = now.branches.get(context, (None, -2))
            if reference is None or last + 1 != now.step:
                reference = self.reference(now, now.step)
            result = self.within(session, lambda kwargs=kwargs, context=context: self.call(context, kwargs))
            signature = runner_tensors(self.cached, kwargs)
            assert_same(result, reference(signature))
            now.branches[context] = (reference, now.step)

    def call(self, context: str, kwargs: dict[str, Any]) -> Any:
        if not context:
            return self.cached(**kwargs)
        with self.cached.cache_context(context):
            return self.cached(**kwargs)

    def advance(self, session: int) -> None:
        now = self.now[session]
        assert now is not None
        now.step += 1
        now.time = 1 - (now.step - now.start) / (now.plan.steps - now.start) if now.step > now.start else 1.0
        now.repeats = 0

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """The next evaluation of a generation, or the first of another when that one is over."""
        self.counts["step"] += 1
        session = data.draw(st.integers(0, len(self.sessions) - 1))
        contexts = data.draw(st.lists(st.sampled_from(CONTEXTS), unique=True, min_size=1))
        now = self.now[session]
        if now is None or now.step + 1 >= now.plan.steps:
            self.begin(session, data.draw(st.sampled_from(SHAPES)))
        self.advance(session)
        self.evaluate(session, contexts)

    @rule(data=st.data())
    def whole_steps(self, data: st.DataObject) -> None:
        """Several evaluations in a row, as a sampler makes them."""
        session = data.draw(st.integers(0, len(self.sessions) - 1))
        contexts = data.draw(st.sampled_from([[""], ["cond", "uncond"]]))
        now = self.now[session]
        if now is None or now.step + 1 >= now.plan.steps:
            now = self.begin(session, data.draw(st.sampled_from(SHAPES)))
        for _ in range(min(3, now.plan.steps - now.step - 1)):
            self.counts["step"] += 1
            self.advance(session)
            self.evaluate(session, contexts)

    @rule(data=st.data())
    def second_evaluation(self, data: st.DataObject) -> None:
        """A second-order solver evaluates twice at one timestep; that is the plan's next step."""
        session = data.draw(st.integers(0, len(self.sessions) - 1))
        now = self.now[session]
        if now is None or now.repeats or now.step in (-1, now.start) or now.step + 1 >= now.plan.steps:
            return
        self.counts["second evaluation"] += 1
        contexts = [name for name, (_, last) in now.branches.items() if last == now.step]
        now.step += 1
        now.repeats += 1
        self.evaluate(session, contexts)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """A generation is given up; after a reset the next may begin anywhere and have any length."""
        self.counts["reset"] += 1
        session = data.draw(st.integers(0, len(self.sessions) - 1))
        steps = data.draw(st.integers(1, 9))
        self.within(session, lambda: self.cached.reset(0, steps))
        self.steps[session] = steps
        start = data.draw(st.integers(0, self.steps[session] - 1))
        self.within(session, lambda: self.cached.reset(start))
        self.begin(session, data.draw(st.sampled_from(SHAPES)), start)
        self.advance(session)
        self.evaluate(session, ["cond"])

    @rule(data=st.data())
    def start_again(self, data: st.DataObject) -> None:
        """A generation that begins at the first timestep again."""
        session = data.draw(st.integers(0, len(self.sessions) - 1))
        self.counts["begin again"] += 1
        if self.now[session] is None:
            return
        self.begin(session, data.draw(st.sampled_from(SHAPES)))
        self.advance(session)
        self.evaluate(session, [data.draw(st.sampled_from(CONTEXTS))])

    @rule(data=st.data(), error=st.sampled_from([RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError]))
    def accident(self, data: st.DataObject, error: type[BaseException]) -> None:
        """Something fails in the middle of a step: nothing is held, the next generation is right."""
        self.counts["accident"] += 1
        session = data.draw(st.integers(0, len(self.sessions) - 1))
        now = self.now[session]
        if now is None or now.step + 1 >= now.plan.steps:
            now = self.begin(session, SHAPES[0])
        self.advance(session)
        kwargs = now.call(self.noise(*now.shape, 4), "cond")
        with mock.patch.object(runner, "feed", side_effect=error), pytest.raises(error):
            self.within(session, lambda: self.call("cond", kwargs))
        held = self.within(session, lambda: self.cached.summary().held_bytes)
        assert held == 0
        self.now[session] = None

    @rule(data=st.data())
    def refused(self, data: st.DataObject) -> None:
        """What is refused in the middle of a generation leaves it as it was."""
        session = data.draw(st.integers(0, len(self.sessions) - 1))
        now = self.now[session]
        if now is None or now.step + 1 >= now.plan.steps or not now.branches:
            return
        kind = data.draw(st.sampled_from(["thread", "dtype", "missing", "second call"]))
        self.counts[f"refused: {kind}"] += 1
        context = next(iter(now.branches))
        if kind == "second call" and now.branches[context][1] != now.step:
            return
        kwargs = now.call(self.noise(*now.shape, 4), context)
        if kind == "second call":
            kwargs["text"] = kwargs["text"].clone()
        else:
            kwargs["timestep"] = kwargs["timestep"] - 0.01
        if kind == "dtype":
            if now.branches[context][1] != now.step:
                return
            kwargs["x"] = kwargs["x"].double()
        if kind == "missing":
            del kwargs["text"]

        def call() -> Any:
            return self.within(session, lambda: self.call(context, kwargs))

        with pytest.raises(TypeError if kind == "missing" else StateError):
            in_thread(call) if kind == "thread" else call()

    @rule(data=st.data())
    def plainly(self, data: st.DataObject) -> None:
        """Disabled, the model runs as the original; the generation in progress ends there."""
        self.counts["disabled"] += 1
        session = data.draw(st.integers(0, len(self.sessions) - 1))
        kwargs = arguments(0.5, *data.draw(st.sampled_from(SHAPES)))

        def run() -> Any:
            with self.cached.disabled():
                return self.cached(**kwargs)

        assert_same(self.within(session, run), self.within(0, lambda: self.model(**kwargs)))
        self.now[session] = None

    @precondition(lambda self: len(self.sessions) < 4)
    @rule()
    def open_session(self) -> None:
        self.counts["session"] += 1
        engine = self.cached._graphcache
        self.sessions.append(engine.new_session(Driver()))
        self.now[len(self.sessions) - 1] = None
        self.steps[len(self.sessions) - 1] = self.plan.steps

    @rule(data=st.data())
    def in_another_thread(self, data: st.DataObject) -> None:
        """A whole generation beside those in progress, in a session of its own."""
        self.counts["thread"] += 1
        shape = data.draw(st.sampled_from(SHAPES))

        def generation() -> None:
            now = Expected(self.plan, 0, shape, {"": self.noise(shape[0], 4)})
            reference = self.reference(now, 0)
            with torch.no_grad(), self.cached.session():
                for step in range(self.plan.steps):
                    now.time = 1 - step / self.plan.steps
                    kwargs = now.call(self.noise(*shape, 4), "")
                    assert_same(self.cached(**kwargs), reference(runner_tensors(self.cached, kwargs)))

        in_thread(generation)

    @rule(data=st.data(), kind=st.sampled_from(["values", "parameter", "module"]))
    def change_weights(self, data: st.DataObject, kind: str) -> None:
        """Between generations weights change in place, or parts of the model are replaced."""
        if data.draw(st.integers(0, 3)) and kind != "values":
            return  # each costs a capture
        self.counts[f"weights: {kind}"] += 1
        block: Any = self.model.blocks[0]
        with torch.no_grad():
            if kind == "values":
                self.model.text.weight.data.mul_(-1.1)
                block.up.weight.data.add_(0.01)
            elif kind == "parameter":
                block.down.weight = nn.Parameter(block.down.weight * 0.9)
            else:
                block.out = nn.Linear(4, 4)
        if kind != "values":
            self.captures.clear()
        for session in range(len(self.sessions)):
            self.within(session, self.cached.reset)
            self.now[session] = None


def in_thread(action: Callable[[], Any]) -> None:
    """Run in a thread of its own; what it raises is raised here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def test_a_bare_module_is_right_or_refuses() -> None:
    while BareModule.counts.total() < ACTIONS:
        run_state_machine_as_test(BareModule, settings=SETTINGS)
    print(f"\n{BareModule.counts.total()} actions: {dict(BareModule.counts)}")
