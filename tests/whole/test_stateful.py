"""Whatever a user does in whatever order: the answer is the reference interpreter's, or a GraphCacheError.

`ACTIONS=200000 pytest tests/whole/test_stateful.py` does more of it.
"""

import asyncio
import copy
import logging
import os
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import graphcache
from graphcache import Plan, StateError
from graphcache.runtime import runner
from reference import Reference, assert_same, capture_call, runner_tensors
from tiny import arguments, tiny

ACTIONS = int(os.environ.get("ACTIONS", "150"))
LENGTH = 50
CONTEXTS = ("", "cond", "uncond", "hooked")
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


class Louder(ModelHook):
    """What a guider may put on a part of the model for some of its calls."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 0.5


@dataclass
class Expected:
    """A generation as a reader of the documentation would follow it, with a reference per call of a step."""

    plan: Plan
    start: int
    shape: tuple[int, int]
    static: dict[str, Tensor]
    step: int = -1
    time: float = 1.0
    repeats: int = 0
    singles: int = 0
    branches: dict[tuple[str, int], tuple[Reference, int]] = field(default_factory=dict)

    def call(self, latents: Tensor, context: str) -> dict[str, Any]:
        return {
            "x": latents,
            "timestep": torch.full((self.shape[0],), self.time),
            "text": self.static[context],
        }

    @property
    def contexts(self) -> list[str]:
        """Those whose first call this step has seen."""
        return [
            name for (name, number), (_, last) in self.branches.items() if last == self.step and not number
        ]


class Way:
    """How the calls of a session are made: each step enters it anew, in some thread, or something goes on."""

    def __init__(self, handle: Any, kind: str, pools: list[ThreadPoolExecutor]) -> None:
        self.handle, self.kind, self.pools, self.turn = handle, kind, pools, 0
        self.stream = self.streaming()
        next(self.stream)

    def streaming(self) -> Generator[Any, Callable[[], Any], None]:
        result = None
        with self.handle if self.kind == "generator" else nullcontext():
            while True:
                result = attempt((yield result))

    def run(self, action: Callable[[], Any]) -> Any:
        self.turn += 1
        pool = self.pools[self.turn % len(self.pools)]
        if self.kind == "generator":
            return pool.submit(self.stream.send, action).result()()
        if self.kind == "task":
            return asyncio.run(self.task(action))
        return pool.submit(self.entered, action).result()

    def entered(self, action: Callable[[], Any]) -> Any:
        with self.handle:
            return action()

    async def task(self, action: Callable[[], Any]) -> Any:
        with self.handle:
            return await asyncio.to_thread(action)

    def close(self) -> None:
        self.stream.close()
        self.handle.close()


def attempt(action: Callable[[], Any]) -> Callable[[], Any]:
    """What gives the result, or raises what was raised."""
    try:
        result = action()
    except BaseException as error:
        return partial(raise_again, error)
    return lambda: result


def raise_again(error: BaseException) -> None:
    raise error


class BareModule(RuleBasedStateMachine):
    """Generations, windows, contexts, sessions, threads, forms and accidents, without a scheduler."""

    counts: ClassVar[Counter[str]] = Counter()

    @initialize(
        plan=st.sampled_from(PLANS),
        backend=st.sampled_from([None, None, "eager"]),
        windows=st.sampled_from([None, None, 2]),
        adapted=st.booleans(),
    )
    def make(self, plan: Plan, backend: str | None, windows: int | None, adapted: bool) -> None:
        self.said = Said()
        logging.getLogger("graphcache").addHandler(self.said)
        self.pools = [ThreadPoolExecutor(1) for _ in range(2)]
        self.model: Any = tiny(1)
        if adapted:
            config = LoraConfig(r=1, init_lora_weights=False, target_modules=["out"])
            self.model = inject_adapter_in_model(config, self.model)
        self.cached: Any = graphcache.transform(self.model, plan, backend=backend, branches=windows)
        self.plan, self.windows = plan, windows or 1
        self.seed = 0
        self.begin_anew()

    def begin_anew(self) -> None:
        self.captures: dict[Any, Any] = {}
        self.ways: list[Any] = [None]
        self.now: dict[int, Expected | None] = {0: None}
        self.steps = {0: self.plan.steps}

    def teardown(self) -> None:
        logging.getLogger("graphcache").removeHandler(self.said)
        for way in self.ways[1:]:
            way.close()
        for pool in self.pools:
            pool.shutdown()

    def within(self, session: int, action: Callable[[], Any]) -> Any:
        """Run something in a session."""

        def run() -> Any:
            with torch.no_grad():
                return action()

        return run() if session == 0 else self.ways[session].run(run)

    def captured(self, shape: tuple[int, int], context: str) -> Any:
        key = shape, context == "hooked", self.scale
        if key not in self.captures:
            kwargs = arguments(1.0, *shape)
            with torch.no_grad(), self.form(context):
                self.captures[key] = capture_call(self.model, kwargs, "timestep")
        return self.captures[key]

    def reference(self, now: Expected, context: str, start: int) -> Reference:
        return Reference(self.captured(now.shape, context), now.plan, start)

    @contextmanager
    def form(self, context: str) -> Iterator[None]:
        """The model as it is for calls in this context."""
        if context != "hooked":
            yield
            return
        registry = HookRegistry.check_if_exists_or_initialize(self.model.blocks[0].down)
        registry.register_hook(Louder(), "louder")
        try:
            yield
        finally:
            registry.remove_hook("louder")

    @property
    def adapters(self) -> list[Any]:
        return [module for module in self.model.modules() if hasattr(module, "lora_A")]

    @property
    def scale(self) -> float:
        return next((layer.scaling["default"] for layer in self.adapters), 1.0)

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
        """One evaluation: every context makes its calls, each result is compared."""
        now = self.now[session]
        assert now is not None
        for context in contexts:
            for window in range(self.windows):
                self.compare(session, now, context, window)

    def compare(self, session: int, now: Expected, context: str, window: int) -> None:
        kwargs = now.call(self.noise(*now.shape, 4), context)
        reference, last = now.branches.get((context, window), (None, -2))
        missed = reference is not None and last + 1 != now.step
        if reference is None or missed:
            reference = self.reference(now, context, now.step)
        reference.goes_on_with(self.captured(now.shape, context))
        result = self.within(session, lambda: self.call(context, kwargs))
        assert_same(result, reference(runner_tensors(self.cached, kwargs)))
        now.branches[context, window] = (reference, now.step)
        assert not missed or self.said.ever(f"missed one or more steps before step {now.step}")

    def call(self, context: str, kwargs: dict[str, Any]) -> Any:
        with self.form(context):
            if not context:
                return self.cached(**kwargs)
            with self.cached.cache_context(context):
                return self.cached(**kwargs)

    def advance(self, session: int) -> None:
        now = self.now[session]
        assert now is not None
        if now.step > now.start and not now.repeats:
            now.singles += 1
        now.step += 1
        now.time = 1 - (now.step - now.start) / (now.plan.steps - now.start) if now.step > now.start else 1.0
        now.repeats = 0

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """The next evaluation of a generation, or the first of another when that one is over."""
        self.counts["step"] += 1
        session = data.draw(st.integers(0, len(self.ways) - 1))
        contexts = data.draw(st.lists(st.sampled_from(CONTEXTS), unique=True, min_size=1))
        now = self.now[session]
        if now is None or now.step + 1 >= now.plan.steps:
            self.begin(session, data.draw(st.sampled_from(SHAPES)))
        self.advance(session)
        self.evaluate(session, contexts)

    @rule(data=st.data())
    def whole_steps(self, data: st.DataObject) -> None:
        """Several evaluations in a row, as a sampler makes them."""
        session = data.draw(st.integers(0, len(self.ways) - 1))
        contexts = data.draw(st.sampled_from([[""], ["cond", "uncond"], ["cond", "uncond", "hooked"]]))
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
        session = data.draw(st.integers(0, len(self.ways) - 1))
        now = self.now[session]
        if now is None or now.repeats or now.step in (-1, now.start) or now.step + 1 >= now.plan.steps:
            return
        self.counts["second evaluation"] += 1
        contexts = now.contexts
        if now.singles:
            kwargs = now.call(self.noise(*now.shape, 4), contexts[0])
            with pytest.raises(StateError, match="at one timestep"):
                self.within(session, lambda: self.call(contexts[0], kwargs))
            self.after_refusal(session)
            return
        now.step += 1
        now.repeats += 1
        self.evaluate(session, contexts)

    def after_refusal(self, session: int) -> None:
        """An exception that leaves a session's `with` ends its generation; else that goes on."""
        if session and self.ways[session].kind != "generator":
            self.now[session] = None

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """A generation is given up; after a reset the next may begin anywhere and have any length."""
        self.counts["reset"] += 1
        session = data.draw(st.integers(0, len(self.ways) - 1))
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
        session = data.draw(st.integers(0, len(self.ways) - 1))
        self.counts["begin again"] += 1
        before = self.now[session]
        if before is None:
            return
        lost = before.start < before.step < before.plan.steps - 1
        self.said.clear()
        self.begin(session, data.draw(st.sampled_from(SHAPES)))
        self.advance(session)
        self.evaluate(session, [data.draw(st.sampled_from(CONTEXTS))])
        assert not lost or self.said.has("was given up at step")

    @rule(data=st.data(), error=st.sampled_from([RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError]))
    def accident(self, data: st.DataObject, error: type[BaseException]) -> None:
        """Something fails in the middle of a step: nothing is held, the next generation is right."""
        self.counts["accident"] += 1
        session = data.draw(st.integers(0, len(self.ways) - 1))
        if error is KeyboardInterrupt and session and self.ways[session].kind == "task":
            error = RuntimeError  # an event loop takes the other for its own end
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
        session = data.draw(st.integers(0, len(self.ways) - 1))
        now = self.now[session]
        if now is None or now.step + 1 >= now.plan.steps or not now.contexts:
            return
        kind = data.draw(st.sampled_from(["thread", "dtype", "missing", "second call", "window"]))
        context = now.contexts[0]
        if (kind == "thread" and session) or (kind == "window" and now.step > now.start):
            return
        self.counts[f"refused: {kind}"] += 1
        kwargs = now.call(self.noise(*now.shape, 4), context)
        if kind == "second call":
            kwargs["text"] = kwargs["text"].clone()
        elif kind != "window":
            kwargs["timestep"] = kwargs["timestep"] - 0.01
        if kind == "dtype":
            kwargs["x"] = kwargs["x"].double()
        if kind == "missing":
            del kwargs["text"]

        def call() -> Any:
            return self.within(session, lambda: self.call(context, kwargs))

        with pytest.raises(TypeError if kind == "missing" else StateError):
            in_thread(call) if kind == "thread" else call()
        self.after_refusal(session)

    @rule(data=st.data())
    def plainly(self, data: st.DataObject) -> None:
        """Disabled, the model runs as the original; the log says that a generation in progress ends there."""
        self.counts["disabled"] += 1
        session = data.draw(st.integers(0, len(self.ways) - 1))
        kwargs = arguments(0.5, *data.draw(st.sampled_from(SHAPES)))

        def run() -> Any:
            with self.cached.disabled():
                return self.cached(**kwargs)

        now = self.now[session]
        self.said.clear()
        assert_same(self.within(session, run), self.within(0, lambda: self.model(**kwargs)))
        lost = now is not None and now.branches and now.step + 1 < now.plan.steps
        assert not lost or self.said.has("a call outside of the plan ends the generation")
        self.now[session] = None

    @precondition(lambda self: len(self.ways) < 5)
    @rule(kind=st.sampled_from(["executor", "generator", "task"]))
    def open_session(self, kind: str) -> None:
        self.counts[f"session: {kind}"] += 1
        self.ways.append(Way(self.cached.session(), kind, self.pools))
        self.now[len(self.ways) - 1] = None
        self.steps[len(self.ways) - 1] = self.plan.steps

    @rule(data=st.data())
    def in_another_thread(self, data: st.DataObject) -> None:
        """A whole generation beside those in progress, in a session of its own."""
        self.counts["thread"] += 1
        shape = data.draw(st.sampled_from(SHAPES))

        def generation() -> None:
            now = Expected(self.plan, 0, shape, {"": self.noise(shape[0], 4)})
            references = [self.reference(now, "", 0) for _ in range(self.windows)]
            with torch.no_grad(), self.cached.session():
                for step in range(self.plan.steps):
                    now.time = 1 - step / self.plan.steps
                    for reference in references:
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
                block.qkv = nn.Linear(4, 12)
        if kind != "values":
            self.captures.clear()
        for session in range(len(self.ways)):
            self.within(session, self.cached.reset)
            self.now[session] = None

    @precondition(lambda self: self.adapters)
    @rule(scale=st.sampled_from([0.5, 1.0, 2.0]))
    def fade(self, scale: float) -> None:
        """A callback fades an adapter between two steps; what was cached is still read."""
        self.counts["fade"] += 1
        for layer in self.adapters:
            layer.scaling["default"] = scale

    @rule(pickled=st.booleans())
    def travel(self, pickled: bool) -> None:
        """A copy goes on alone, with weights of its own and empty caches."""
        self.counts["copy"] += 1
        for way in self.ways[1:]:
            way.close()
        self.cached = pickle.loads(pickle.dumps(self.cached)) if pickled else copy.deepcopy(self.cached)
        self.model = graphcache.restore(self.cached)
        self.begin_anew()


class Said(logging.Handler):
    """What the log has said."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.all: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self.all.append(record.getMessage())

    def ever(self, text: str) -> bool:
        """Whether it was said since the model was made; some things are said once."""
        return any(text in said for said in self.all)

    def has(self, text: str) -> bool:
        return any(text in said for said in self.texts)

    def clear(self) -> None:
        self.texts.clear()


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
