"""Transformed pipelines are copied, sent, saved and taken apart as untouched ones are, and keep their plan.

What is compared with is a pipeline of the wanted kind that was transformed itself.
"""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import presets
from pipelines import PIPELINES, TinyPipeline, generated_by
from processes import together
from reference import assert_same
from reference_pipeline import transformed, untouched

STEPS = 6
FORA = presets.fora(STEPS)
IMAGE = PIPELINES["flux_img2img"]
TEXT = TinyPipeline(
    lambda: diffusers.FluxPipeline.from_pipe(IMAGE.build()), PIPELINES["flux"].arguments, branches=2
)
Change = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def scheduler(shift: float) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)


def generated(tiny: TinyPipeline, pipe: Any, steps: int = STEPS) -> Tensor:
    """A result in which something came from the cache."""
    pipe.set_progress_bar_config(disable=True)
    result = tiny.generate(pipe, steps)
    for branch in pipe.transformer.summary().branches:
        assert sum(step.reused for step in branch.steps) > 0
    return result


@functools.cache
def expected(tiny: TinyPipeline, steps: int = STEPS, shift: float | None = None) -> Tensor:
    """What a pipeline of this kind gives that was transformed itself."""
    pipe = transformed(tiny, FORA)
    if shift is not None:
        pipe.scheduler = scheduler(shift)
    return generated(tiny, pipe, steps)


def compiled(pipe: Any) -> Any:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    return pipe


def with_transformed_part(pipe: Any) -> Any:
    pipe.transformer = graphcache.transform(pipe.transformer, FORA)
    return pipe


PREPARED: dict[str, Change] = {
    "transformed": lambda pipe: graphcache.transform(pipe, FORA),
    "transformed twice": lambda pipe: graphcache.transform(
        graphcache.transform(pipe, presets.compute(4)), FORA
    ),
    "compiled, then transformed": lambda pipe: graphcache.transform(compiled(pipe), FORA),
    "transformed, then compiled": lambda pipe: compiled(graphcache.transform(pipe, FORA)),
    "a transformed part": with_transformed_part,
}
MADE: dict[str, Change] = {
    "from_pipe": diffusers.FluxImg2ImgPipeline.from_pipe,
    "from_pipe of from_pipe": lambda pipe: diffusers.FluxImg2ImgPipeline.from_pipe(
        diffusers.FluxInpaintPipeline.from_pipe(pipe)
    ),
    "automatic": diffusers.AutoPipelineForImage2Image.from_pipe,
    "there and back": lambda pipe: diffusers.AutoPipelineForImage2Image.from_pipe(
        diffusers.AutoPipelineForText2Image.from_pipe(diffusers.FluxImg2ImgPipeline.from_pipe(pipe))
    ),
    "components": lambda pipe: diffusers.FluxImg2ImgPipeline(**pipe.components),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("prepared", PREPARED)
def test_a_pipeline_made_from_another_runs_under_its_plan(prepared: str) -> None:
    torch._dynamo.reset()
    pipe = PREPARED[prepared](TEXT.make())
    made = diffusers.FluxImg2ImgPipeline.from_pipe(pipe, scheduler=scheduler(2.0))
    assert made.transformer is pipe.transformer
    assert_same(generated(IMAGE, made, 4), expected(IMAGE, 4, shift=2.0))
    assert_same(generated(TEXT, pipe, 4), expected(TEXT, 4))


@pytest.mark.few(3)
@pytest.mark.parametrize("way", MADE)
def test_pipelines_around_one_model_are_restored_one_by_one(way: str) -> None:
    pipe = TEXT.make()
    original = pipe.transformer
    graphcache.transform(pipe, FORA)
    made = MADE[way](pipe)
    assert made.transformer is pipe.transformer
    assert_same(generated(IMAGE, made), expected(IMAGE))
    assert_same(generated(TEXT, pipe), expected(TEXT))
    graphcache.restore(made)
    assert made.transformer is original
    assert_same(IMAGE.generate(made, STEPS), IMAGE.generate(untouched(IMAGE), STEPS))
    assert_same(generated(TEXT, pipe), expected(TEXT))
    assert graphcache.restore(pipe).transformer is original


@pytest.mark.parametrize("when", ["before the first run", "after it"])
def test_a_copy_goes_by_a_scheduler_of_its_own(when: str) -> None:
    pipe = transformed(TEXT, FORA)
    if when == "after it":
        generated(TEXT, pipe)
    other = copy.copy(pipe)
    other.scheduler = scheduler(2.0)
    for steps in (STEPS, 4, STEPS):
        assert_same(generated(TEXT, other, steps), expected(TEXT, steps, shift=2.0))
        assert_same(generated(TEXT, pipe, steps), expected(TEXT, steps))


def test_a_copy_in_another_thread_needs_no_more_than_a_session() -> None:
    pipe = transformed(TEXT, FORA)
    other = copy.copy(pipe)
    other.scheduler = scheduler(2.0)

    def serve(which: Any, steps: int) -> list[Tensor]:
        with torch.no_grad():
            results = []
            for _ in range(3):
                with which.transformer.session():
                    results.append(TEXT.generate(which, steps))
            return results

    with ThreadPoolExecutor(2) as pool:
        mine, theirs = pool.submit(serve, pipe, STEPS), pool.submit(serve, other, 4)
        assert_same(mine.result(), [expected(TEXT)] * 3)
        assert_same(theirs.result(), [expected(TEXT, 4, shift=2.0)] * 3)


def saved(pipe: Any) -> Any:
    file = io.BytesIO()
    torch.save(pipe, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


SENT: dict[str, Change] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe)),
    "torch.save": saved,
}


@pytest.mark.parametrize(
    ("way", "name"),
    [*((way, "dit") for way in SENT), ("pickle", "flux_img2img"), ("deepcopy", "wan_two_transformers")],
)
def test_what_arrives_takes_the_same_steps(way: str, name: str) -> None:
    tiny = PIPELINES[name]
    pipe = transformed(tiny, FORA)
    arrived = SENT[way](pipe)
    assert arrived.transformer.plan == FORA
    for steps in (4, STEPS):
        assert_same(generated(tiny, arrived, steps), generated(tiny, pipe, steps))
    weights = zip(arrived.transformer.parameters(), pipe.transformer.parameters(), strict=True)
    assert all(mine is not theirs for mine, theirs in weights)
    graphcache.restore(arrived)
    assert type(arrived.transformer) is type(untouched(tiny).transformer)
    assert_same(tiny.generate(arrived, 4), tiny.generate(untouched(tiny), 4))


def test_another_process_gives_the_same_pixels() -> None:
    pipe = transformed(PIPELINES["dit"], FORA)
    ((result, reused),) = together(1, generated_by, "dit", pipe, 4)
    assert reused > 0
    assert_same(result, generated(PIPELINES["dit"], pipe, 4))


def test_a_saved_pipeline_loads_as_the_plain_one(tmp_path: Path) -> None:
    pipe = diffusers.FluxImg2ImgPipeline.from_pipe(transformed(TEXT, FORA))
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, component in pipe.components.items() if component is None}
    loaded = diffusers.FluxImg2ImgPipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is diffusers.FluxTransformer2DModel
    assert_same(loaded.transformer.state_dict(), pipe.transformer.state_dict())
    for weight in (*loaded.transformer.parameters(), *loaded.vae.parameters()):
        weight.data = weight.data.clone()  # mapped from a file it may lie where kernels round otherwise
    assert_same(IMAGE.generate(loaded, STEPS), IMAGE.generate(untouched(IMAGE), STEPS))


def test_pipelines_around_one_model_change_their_dtype_together() -> None:
    tiny = PIPELINES["dit"]
    pipe, alone = (graphcache.transform(tiny.make(), FORA) for _ in range(2))
    made = diffusers.DiTPipeline(**pipe.components)
    alone.to(torch.bfloat16)
    assert pipe.to(torch.bfloat16).transformer is made.transformer
    for either in (pipe, made):
        assert_same(generated(tiny, either), generated(tiny, alone))


def hand_over(model: nn.Module) -> Any:
    """A pipeline that is given a model after it was made."""
    pipe = TEXT.make()
    pipe.register_modules(transformer=model)
    return pipe


@pytest.mark.parametrize("steps", [STEPS, 4])
def test_a_model_that_was_transformed_alone_goes_by_the_pipeline_it_is_put_into(steps: int) -> None:
    model = graphcache.transform(untouched(TEXT).transformer, FORA)
    assert_same(generated(TEXT, hand_over(model), steps), expected(TEXT, steps))


def test_transforming_a_copy_leaves_the_pipeline_as_it_is() -> None:
    pipe = transformed(TEXT, FORA)
    model = pipe.transformer
    other = graphcache.transform(copy.copy(pipe), presets.compute(STEPS))
    assert_same(TEXT.generate(other, STEPS), TEXT.generate(untouched(TEXT), STEPS))
    assert pipe.transformer is model
    assert_same(generated(TEXT, pipe), expected(TEXT))
