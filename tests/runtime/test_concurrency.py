"""Several generations at once: a session each over the same graphs, or a plain refusal."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import graphcache
from graphcache import Plan, StateError, presets
from graphcache.ir.graph import CacheRead, Coefficients, fake_mode, value_of
from inside import engine_of, only_program, programs_of, states_of
from pipelines import PIPELINES, TinyPipeline
from reference import assert_same, subject
from tiny import arguments, tiny

PLAN = Plan.parse("plan steps=6 preset=none\nt = taylorseer order=2\n@self ##t#tt\n@mlp #.##.#")
THREADS, GENERATIONS, WARM = 8, 38, 13


def latents(seed: int) -> dict[str, Any]:
    kwargs = arguments(batch=1 + seed % 2)
    shape = kwargs["x"].shape
    return {**kwargs, "x": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


def generation(model: Any, seed: int) -> Tensor:
    """Six Euler steps from a noise of its own."""
    kwargs = latents(seed)
    with torch.no_grad():
        for step in range(6):
            kwargs["timestep"] = torch.full_like(kwargs["timestep"], 1 - step / 6)
            kwargs["x"] = kwargs["x"] - model(**kwargs) / 6
    return kwargs["x"]


def resident() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(params=[None, "aot_eager"])
def cached(request: pytest.FixtureRequest) -> Iterator[Any]:
    torch._dynamo.reset()
    yield graphcache.transform(tiny(2), PLAN, backend=request.param)
    torch._dynamo.reset()


@pytest.mark.few(1)
def test_three_hundred_generations_in_eight_threads(cached: Any) -> None:
    seeds = [[100 * thread + i % 10 for i in range(GENERATIONS)] for thread in range(THREADS)]
    serial = {seed: generation(cached, seed) for seed in sorted({seed for row in seeds for seed in row})}
    graphs = {key: program.graphs for key, program in engine_of(cached).maker.programs.items()}
    barrier = threading.Barrier(THREADS + 1)
    wrong: list[int] = []

    def serve(row: list[int]) -> int:
        done = 0
        for number, seed in enumerate(row):
            if number == WARM:
                barrier.wait()
                barrier.wait()
            with cached.session():
                if not torch.equal(generation(cached, seed), serial[seed]):
                    wrong.append(seed)
            done += 1
        return done

    with ThreadPoolExecutor(THREADS) as pool:
        counts = [pool.submit(serve, row) for row in seeds]
        barrier.wait()
        gc.collect()
        warm = resident()
        barrier.wait()
        assert [count.result() for count in counts] == [GENERATIONS] * THREADS
    gc.collect()
    assert wrong == []
    assert resident() - warm < 5 * 2**20
    assert {key: program.graphs for key, program in engine_of(cached).maker.programs.items()} == graphs


@pytest.mark.usefixtures("captured_anew")
def test_sessions_that_capture_and_compile_at_once(cached: Any) -> None:
    expected = {seed: generation(graphcache.transform(tiny(2), PLAN), seed) for seed in range(4)}

    def serve(seed: int) -> Tensor:
        with cached.session():
            return generation(cached, seed)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(serve, range(4)))
    for seed, result in enumerate(results):
        torch.testing.assert_close(result, expected[seed], rtol=1e-5, atol=1e-6)
    assert len(programs_of(cached)) == 2


def test_two_threads_in_one_state_are_an_error_and_the_first_goes_on() -> None:
    on = subject("chunked_dit")
    model, refused = on.transform(PLAN), []

    def intrude() -> None:
        torch.set_grad_enabled(False)
        try:
            model(**on.case.call(on.static(), on.latents(), 1.0))
        except StateError as error:
            refused.append(str(error))

    def call(**kwargs: Any) -> Any:
        result = model(**kwargs)
        if len(refused) < 5:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()
        return result

    assert_same(on.sample(call, 6), on.sample(on.reference(PLAN), 6))
    assert len(refused) == 5
    assert "another thread or task is at step 0 of 6" in refused[0]
    assert "model.session()" in refused[0]


def test_a_thread_in_the_middle_of_a_call_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphcache.transform(tiny(), presets.compute(1))
    kwargs, inside, go_on = arguments(), threading.Event(), threading.Event()
    model(**kwargs)
    program = only_program(model)
    run = program.captured.output.build

    def wait(tensors: Any) -> Any:
        inside.set()
        assert go_on.wait()
        return run(tensors)

    monkeypatch.setattr(type(program.captured.output), "build", property(lambda _: wait), raising=False)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: model(**kwargs))
        assert inside.wait()
        with pytest.raises(StateError, match="is in a call of this model"):
            model(**kwargs)
        go_on.set()
        assert_same(first.result(), tiny()(**kwargs))


def test_a_generation_given_up_by_a_thread_that_ended_is_over() -> None:
    model = graphcache.transform(tiny(), PLAN)
    thread = threading.Thread(target=lambda: model(**arguments()))
    thread.start()
    thread.join()
    model(**arguments())
    assert model.summary().branches[0].plan_steps == 6


def test_another_thread_may_reset_what_was_given_up() -> None:
    model = graphcache.transform(tiny(), PLAN)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: model(**arguments())).result()
        with pytest.raises(StateError, match=r"model\.reset\(\)"):
            model(**arguments())
        model.reset()
        model(**arguments())


def test_another_thread_takes_over_between_generations() -> None:
    model = graphcache.transform(tiny(), PLAN)
    expected = generation(model, 3)
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            assert_same(pool.submit(generation, model, 3).result(), expected)


async def steps_of(model: Any, seed: int) -> Tensor:
    kwargs = latents(seed)
    for step in range(6):
        kwargs["timestep"] = torch.full_like(kwargs["timestep"], 1 - step / 6)
        with torch.no_grad():
            kwargs["x"] = kwargs["x"] - model(**kwargs) / 6
        await asyncio.sleep(0)
    return kwargs["x"]


def test_asyncio_tasks_have_sessions_of_their_own() -> None:
    model = graphcache.transform(tiny(), PLAN)
    expected = [generation(model, seed) for seed in range(5)]

    async def request(seed: int) -> Tensor:
        with model.session():
            return await steps_of(model, seed)

    async def serve() -> list[Tensor]:
        return await asyncio.gather(*(request(seed) for seed in range(5)))

    assert_same(asyncio.run(serve()), expected)


def test_two_asyncio_tasks_in_one_state_are_an_error_and_the_first_goes_on() -> None:
    model = graphcache.transform(tiny(), PLAN)
    expected = generation(model, 0)

    async def serve() -> list[Any]:
        return await asyncio.gather(steps_of(model, 0), steps_of(model, 1), return_exceptions=True)

    first, second = asyncio.run(serve())
    assert_same(first, expected)
    assert isinstance(second, StateError)


def test_a_session_frees_what_it_held() -> None:
    model = graphcache.transform(tiny(), PLAN)
    with model.session() as session:
        model(**arguments())
        assert model.summary().held_bytes > 0
        held = [weakref.ref(t) for s in states_of(model).values() for t in s.cache.tensors()]
        assert held
    session.close()
    assert [tensor() for tensor in held] == [None] * len(held)
    assert model.summary().branches == ()


def test_pipelines_that_share_a_transformer_run_at_once() -> None:
    """A pipeline per thread, each with a scheduler of its own, over one model and one set of graphs."""
    tiny_pipe, steps = PIPELINES["flux"], 6
    pipe = graphcache.transform(tiny_pipe.make(), presets.fora(steps))
    expected = {count: tiny_pipe.generate(pipe, count) for count in (steps, 4)}

    def serve(count: int) -> list[Tensor]:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        other = diffusers.FluxPipeline(scheduler, None, None, None, None, None, pipe.transformer)
        other.set_progress_bar_config(disable=True)
        results = []
        for _ in range(5):
            with pipe.transformer.session(scheduler=scheduler):
                results.append(tiny_pipe.generate(other, count))
        return results

    with ThreadPoolExecutor(4) as pool:
        for count, results in zip((6, 4, 6, 4), pool.map(serve, (6, 4, 6, 4)), strict=True):
            for result in results:
                assert_same(result, expected[count])


def interrupted(tiny_pipe: TinyPipeline, pipe: Any, steps: int) -> None:
    """A generation that its user gives up at the third step."""
    left, step = iter(range(3)), pipe.scheduler.step

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        if next(left, None) is None:
            raise KeyboardInterrupt
        return result

    pipe.scheduler.step = interrupt
    with pytest.raises(KeyboardInterrupt):
        tiny_pipe.generate(pipe, steps)
    del pipe.scheduler.step


@pytest.fixture(params=["finished", "given up"])
def used(request: pytest.FixtureRequest) -> Any:
    """A transformed pipeline that has made a picture, or begun one."""
    tiny_pipe, steps = PIPELINES["flux"], 6
    pipe = graphcache.transform(tiny_pipe.make(), presets.fora(steps))
    if request.param == "finished":
        tiny_pipe.generate(pipe, steps)
    else:
        interrupted(tiny_pipe, pipe, steps)
    return pipe


def test_another_pipeline_over_the_transformer_goes_by_its_own_scheduler(used: Any) -> None:
    tiny_pipe = PIPELINES["flux"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    other = diffusers.FluxPipeline(scheduler, None, None, None, None, None, used.transformer)
    other.set_progress_bar_config(disable=True)
    alone = graphcache.transform(tiny_pipe.make(), presets.fora(6))
    for steps in (6, 4):
        alone.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
        assert_same(tiny_pipe.generate(other, steps), tiny_pipe.generate(alone, steps))
        alone.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        assert_same(tiny_pipe.generate(used, steps), tiny_pipe.generate(alone, steps))


def calls_of(tiny_pipe: TinyPipeline, steps: int) -> list[dict[str, Any]]:
    """What a generation hands to the transformer."""
    pipe, calls = tiny_pipe.make(), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(pytree.tree_map_only(Tensor, Tensor.clone, kwargs)),
        with_kwargs=True,
    )
    tiny_pipe.generate(pipe, steps, guided=False)
    return calls


def by_hand(model: Any, calls: list[dict[str, Any]]) -> list[Tensor]:
    """What a loop gives that no pipeline makes."""
    return [model(**call)[0] for call in calls]


def test_a_loop_of_ones_own_is_refused_where_the_scheduler_does_not_drive_it(used: Any) -> None:
    calls = calls_of(PIPELINES["flux"], 6)
    with pytest.raises(StateError, match="another"):
        by_hand(used.transformer, calls)
    alone = graphcache.transform(PIPELINES["flux"].make().transformer, presets.fora(6))
    with used.transformer.session():
        assert_same(by_hand(used.transformer, calls), by_hand(alone, calls))
    assert "reused" in str(alone.summary())


def test_where_a_graphs_inputs_lie_is_known_while_another_thread_traces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = graphcache.transform(tiny(2), PLAN, example_inputs=arguments())
    ((_, program),) = engine_of(model).maker.programs.items()
    monkeypatch.setattr(fake_mode(value_of(program.step.placeholders()[0])), "in_kernel_invocation", True)
    made = []
    for runnable in program.phases.values():
        for port in runnable.step.inputs:
            if isinstance(port, Coefficients):
                made.append(runnable.coefficients(port.group, (1.0, 0.5)))
            elif isinstance(port, CacheRead):
                made.append(runnable.blank(port))
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert {tensor.dim() for tensor in made} == {1, 3}
