"""Sessions as servers need them: steps in turn, in any thread, task or generator; nothing lost in silence."""

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcache
from graphcache import Plan, StateError, presets
from pipelines import PIPELINES
from reference import assert_same
from tiny import tiny

STEPS = 6
PLAN = Plan.parse("plan steps=6 preset=none\nt = taylorseer order=1\n@self #.#t.#\n@mlp #.##..")
REUSED = [0, 4, 0, 0, 4, 2]


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def cached() -> Any:
    return graphcache.transform(tiny(2), PLAN)


class Request:
    """One picture, a step at a time."""

    def __init__(self, seed: int, steps: int = STEPS) -> None:
        numbers = torch.Generator().manual_seed(seed)
        self.x, self.text = torch.randn(1, 3, 4, generator=numbers), torch.randn(1, 4, generator=numbers)
        self.step, self.steps = 0, steps

    def advance(self, model: Any) -> Tensor:
        # made anew, as requests of a server are
        with torch.no_grad():
            time = torch.full((1,), 1 - self.step * 0.9 / self.steps)
            self.x = self.x - 0.1 * model(x=self.x, timestep=time, text=self.text)
        self.step += 1
        return self.x

    def whole(self, model: Any) -> Tensor:
        while self.step < self.steps:
            self.advance(model)
        return self.x


def expected(seeds: int) -> list[Tensor]:
    model = tiny(2)
    return [Request(seed).whole(graphcache.transform(model, PLAN)) for seed in range(seeds)]


def reused(cached: Any) -> list[int]:
    return [step.reused for step in cached.summary().branches[0].steps]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_executor_runs_one_step_of_each_request_in_turn(cached: Any, threads: int) -> None:
    requests, sessions = [Request(seed) for seed in range(3)], [cached.session() for _ in range(3)]

    def step(k: int) -> Tensor:
        with sessions[k]:
            return requests[k].advance(cached)

    pools = [ThreadPoolExecutor(1) for _ in range(threads)]
    for turn in range(STEPS):
        futures = [pools[(turn + k) % threads].submit(step, k) for k in range(3)]
        results = [future.result() for future in futures]
    assert_same(results, expected(3))
    for session in sessions:
        with session:
            assert reused(cached) == REUSED
        session.close()


def stream(cached: Any, seed: int) -> Iterator[Tensor]:
    request = Request(seed)
    with cached.session():
        for _ in range(STEPS):
            yield request.advance(cached)
        assert reused(cached) == REUSED


@pytest.mark.parametrize("threads", [1, 4])
def test_generators_that_stream_previews_are_resumed_by_whatever_thread_is_free(
    cached: Any, threads: int
) -> None:
    streams, previews = [stream(cached, seed) for seed in range(3)], [[], [], []]
    pools = [ThreadPoolExecutor(1) for _ in range(threads)]
    for turn in range(STEPS + 1):
        for k, one in enumerate(streams):
            preview = pools[(turn * 3 + k) % threads].submit(next, one, None).result()
            previews[k] += [] if preview is None else [preview]
    assert_same([each[-1] for each in previews], expected(3))
    assert cached.summary().branches == ()


def test_what_a_generator_enters_does_not_hold_for_who_resumes_it(cached: Any) -> None:
    ours, streamed = Request(1), stream(cached, 0)
    for _ in range(STEPS):
        preview = next(streamed)
        mine = ours.advance(cached)
    streamed.close()
    assert_same([preview, mine], expected(2))
    assert reused(cached) == REUSED


def test_contexts_within_a_generators_session(cached: Any) -> None:
    """A generator's session holds around contexts that its steps enter, and inside of those it stands in."""

    def guided(seed: int) -> Iterator[Tensor]:
        cond, uncond = Request(seed), Request(seed + 1)
        with cached.session():
            for _ in range(STEPS):
                with cached.cache_context("cond"):
                    cond.advance(cached)
                    yield cond.x
                with cached.cache_context("uncond"):
                    uncond.advance(cached)
            assert {branch.branch for branch in cached.summary().branches} == {"cond", "uncond"}
            yield cond.x
            yield uncond.x

    def nested(step: Callable[[], Tensor | None]) -> Tensor | None:
        with cached.cache_context("around"):
            return step()

    one, two = guided(0), guided(2)
    results: list[list[Any]] = [[], []]
    for _ in range(STEPS + 2):
        for k, each in enumerate((one, two)):
            results[k].append(nested(lambda each=each: next(each)))
    assert_same([results[0][-2:], results[1][-2:]], [expected(4)[:2], expected(4)[2:]])


def test_a_context_manager_written_as_a_generator_holds_for_its_body(cached: Any) -> None:
    @contextlib.contextmanager
    def request() -> Iterator[None]:
        with cached.session():
            yield

    results = []
    for seed in range(2):
        with request(), contextlib.ExitStack() as stack:
            stack.enter_context(cached.cache_context("named"))
            results.append(Request(seed).whole(cached))
            assert [branch.branch for branch in cached.summary().branches] == ["named"]
    assert_same(results, expected(2))
    assert cached.summary().branches == ()


def test_what_a_helper_enters_for_a_generator_is_the_generators(cached: Any) -> None:
    class Entered:
        def __enter__(self) -> None:
            self.session = cached.session()
            self.session.__enter__()

        def __exit__(self, *error: object) -> None:
            self.session.__exit__(*error)

    @contextlib.contextmanager
    def helped() -> Iterator[None]:
        with cached.session():
            yield

    @contextlib.contextmanager
    def twice() -> Iterator[None]:
        with helped():
            yield

    def streamed(seed: int, enter: Callable[[], Any]) -> Iterator[Tensor]:
        request = Request(seed)
        with enter():
            while request.step < STEPS:
                yield request.advance(cached)

    for enter in (helped, twice, Entered):
        ours, streams = Request(2), [streamed(seed, enter) for seed in range(2)]
        next(streams[0])  # out of phase
        for _ in range(STEPS - 1):
            last = [next(each) for each in streams] + [ours.advance(cached)]
        last[1], last[2] = next(streams[1]), ours.advance(cached)
        assert_same(last, expected(3))


def test_a_loop_within_a_callback_has_a_session_without_the_pipelines_scheduler(cached: Any) -> None:
    """A session follows the pipelines that call inside of its `with`."""
    tiny_pipe = PIPELINES["flux"]
    pipe = graphcache.transform(tiny_pipe.make(), presets.fora(STEPS))
    calls: list[dict[str, Any]] = []
    plain = tiny_pipe.make()
    plain.transformer.register_forward_pre_hook(lambda _, args, kw: calls.append(kw), with_kwargs=True)
    tiny_pipe.generate(plain, STEPS, guided=False)
    want, found = tiny_pipe.generate(pipe, STEPS), []

    def inner(outer: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 2:
            with pipe.transformer.session():
                for call in calls:
                    pipe.transformer(**call)
                found.append([item.step for item in pipe.transformer.summary().branches[0].steps])
        return {}

    assert_same(tiny_pipe.generate(pipe, STEPS, callback=inner), want)
    assert found == [list(range(STEPS))]


@pytest.mark.parametrize("fields", [{"step_index": "0"}, {"step_index": 0.5}])
def test_step_fields_that_are_no_whole_numbers_are_refused(cached: Any, fields: dict[str, Any]) -> None:
    context = cached.cache_context("named", num_inference_steps=STEPS, **fields)
    with context, pytest.raises(StateError, match="whole numbers"):
        Request(0).advance(cached)
    with cached.cache_context("named", num_inference_steps=None, step_index=None):
        Request(0).advance(cached)


def test_asynchronous_generators_take_turns(cached: Any) -> None:
    async def streamed(seed: int) -> AsyncIterator[Tensor]:
        request = Request(seed)
        with cached.session():
            while request.step < STEPS:
                yield request.advance(cached)

    async def serve() -> list[Tensor]:
        streams = [streamed(seed) for seed in range(3)]
        for _ in range(STEPS):
            last = [await anext(each) for each in streams]
        for each in streams:
            await each.aclose()
        return last

    assert_same(asyncio.run(serve()), expected(3))


def test_tasks_that_run_their_steps_in_a_pool(cached: Any) -> None:
    async def request(seed: int) -> Tensor:
        one = Request(seed)
        with cached.session():
            for _ in range(STEPS):
                await asyncio.to_thread(one.advance, cached)
            assert reused(cached) == REUSED
        return one.x

    async def serve() -> list[Tensor]:
        return await asyncio.gather(*map(request, range(4)))

    assert_same(asyncio.run(serve()), expected(4))


def test_two_tasks_in_one_session_are_refused_and_the_first_goes_on(cached: Any) -> None:
    async def steps(seed: int) -> Tensor:
        one = Request(seed)
        for _ in range(STEPS):
            one.advance(cached)
            await asyncio.sleep(0)
        return one.x

    async def serve() -> list[Any]:
        with cached.session():
            return await asyncio.gather(steps(0), steps(1), return_exceptions=True)

    first, second = asyncio.run(serve())
    assert_same(first, expected(1)[0])
    assert isinstance(second, StateError)


def test_one_thread_at_a_time_is_inside_a_session(cached: Any) -> None:
    session = cached.session()
    with ThreadPoolExecutor(1) as pool, session:

        def enter() -> None:
            with session:
                pass

        with pytest.raises(StateError, match="entered this session and not left it"):
            pool.submit(enter).result()
        with session:  # once more by the same
            assert_same(Request(0).whole(cached), expected(1)[0])


def test_a_closed_session_makes_no_steps(cached: Any) -> None:
    session, request = cached.session(), Request(0)
    with session:
        request.advance(cached)
        session.close()
        with pytest.raises(StateError, match="was closed"):
            request.advance(cached)
    with pytest.raises(StateError, match="was closed"), session:
        pass


def test_an_exception_that_leaves_a_session_ends_its_generation(cached: Any) -> None:
    session = cached.session()
    with contextlib.suppress(KeyError), session:
        Request(0).advance(cached)
        raise KeyError
    with session:
        assert cached.summary().branches == ()
        assert_same(Request(1).whole(cached), expected(2)[1])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.usefixtures("own_garbage")
def test_what_a_session_loses_is_said(cached: Any, caplog: pytest.LogCaptureFixture) -> None:
    with cached.session():
        Request(0).whole(cached)
    gc.collect()
    assert not warnings(caplog)
    with cached.session():
        Request(0).advance(cached)
    gc.collect()
    assert warnings(caplog) == ["a session was given up at step 0 of 6; what it had cached is gone"]


@pytest.mark.parametrize("how", ["disabled", "another", "thread"])
def test_what_a_generation_loses_is_said(cached: Any, caplog: pytest.LogCaptureFixture, how: str) -> None:
    request = Request(0)
    begun = threading.Thread(target=lambda: [request.advance(cached) for _ in range(3)])
    if how == "thread":
        begun.start()
        begun.join()
    else:
        begun.run()
    if how == "disabled":
        with cached.disabled():
            request.advance(cached)
    else:
        assert_same(Request(1).whole(cached), expected(2)[1])
    (said,) = warnings(caplog)
    assert "step 2 of 6" in said


def test_requests_named_by_contexts_with_step_fields_keep_their_caches(cached: Any) -> None:
    """Neither begins nor ends the others' generations, whatever steps they are at and how many they have."""
    requests = [Request(seed) for seed in range(3)]
    order = [0, 0, 1, 0, 2, 1, 1, 2, 0, 2, 1, 0, 2, 1, 0, 2, 1, 2]
    for k in order:
        with cached.cache_context(f"request {k}", step_index=requests[k].step, num_inference_steps=STEPS):
            requests[k].advance(cached)
    assert_same([request.x for request in requests], expected(3))
    last = Request(3)
    while last.step < STEPS:
        with cached.cache_context("request 3", step_index=last.step, num_inference_steps=STEPS):
            last.advance(cached)
    assert [branch.branch for branch in cached.summary().branches] == ["request 3"]
    assert reused(cached) == REUSED


def served(pipe: Any, callback: Any = None) -> Any:
    return PIPELINES["wan"].generate(pipe, STEPS, callback=callback)


def cancel(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    pipe._interrupt = step >= 2
    return {}


def fail(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    if step == 2:
        raise KeyError("the client has gone")
    return {}


def end_unguided(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    pipe._guidance_scale = 4.0 if step < STEPS - 2 else 1.0
    return {}


@pytest.mark.parametrize("callback", [None, cancel, fail, end_unguided])
def test_the_next_request_in_another_thread_of_a_pool(callback: Any) -> None:
    pipe = graphcache.transform(PIPELINES["wan"].make(), presets.fora(STEPS, interval=3))
    want = served(pipe)
    pipe.transformer.reset()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        for pool in (one, two, one):
            with contextlib.suppress(KeyError):
                pool.submit(served, pipe, callback).result()
            other = two if pool is one else one
            assert_same(other.submit(served, pipe).result(), want)
    assert [step.reused > 0 for step in pipe.transformer.summary().branches[0].steps] == [
        step % 3 > 0 for step in range(STEPS)
    ]


def test_a_thread_in_the_middle_of_a_pipelines_generation_is_not_disturbed() -> None:
    """Another pipeline over the same model, in another thread, has to have a session."""
    tiny_pipe = PIPELINES["flux"]
    pipe = graphcache.transform(tiny_pipe.make(), presets.fora(STEPS))
    want, other = tiny_pipe.generate(pipe, STEPS), tiny_pipe.make()
    other.transformer = pipe.transformer
    refused: list[BaseException] = []

    def intrude(*_: Any) -> dict[str, Any]:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(tiny_pipe.generate, other, STEPS)
            refused.append(future.exception())  # type: ignore[arg-type]
        return {}

    assert_same(tiny_pipe.generate(pipe, STEPS, callback=intrude), want)
    assert {type(error) for error in refused[:-1]} == {StateError}


def test_two_pipelines_in_turn_in_one_thread_are_told_to_have_sessions() -> None:
    """Each step of one would find the caches of the other."""
    tiny_pipe = PIPELINES["flux"]
    pipe = graphcache.transform(tiny_pipe.make(), presets.fora(STEPS))
    other = tiny_pipe.make()
    other.transformer = pipe.transformer

    def intrude(outer: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            tiny_pipe.generate(other, STEPS)
        return {}

    with pytest.raises(StateError, match=r"goes on at step 2.*model\.session\(\)"):
        tiny_pipe.generate(pipe, STEPS, callback=intrude)
