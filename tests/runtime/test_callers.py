"""Whose scheduler tells the step: that of the pipeline of which a method calls the model."""

import copy
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.wan.before_denoise import (
    WanPrepareLatentsStep,
    WanSetTimestepsStep,
    WanTextInputStep,
)
from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep
from torch import Tensor, nn

import graphcache
from graphcache import Plan, presets
from pipelines import PIPELINES, TEXT, TEXT_DIM
from reference import assert_same
from tiny import arguments, tiny
from zoo.case import noise

PLAN = Plan.parse("plan steps=6 preset=none\n@self ##.#..\n@mlp #.#..#")


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def sampled(pipe: Any, steps: int) -> Tensor:
    pipe.scheduler.set_timesteps(steps)
    kwargs = arguments()
    for time in pipe.scheduler.timesteps:
        kwargs["timestep"] = (time / 1000).expand(2)
        kwargs["x"] = pipe.scheduler.step(pipe.transformer(**kwargs), time, kwargs["x"])[0]
    return kwargs["x"]


class Sampler:
    """A pipeline that no library knows."""

    def __init__(self, model: Any, shift: float = 1.0) -> None:
        self.transformer = model
        self.scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)

    def sample(self, steps: int) -> Tensor:
        return sampled(self, steps)


class Closing(Sampler):
    """The model is called by a function inside, in which `self` is a variable of its method's."""

    def sample(self, steps: int) -> Tensor:
        def sample() -> Tensor:
            return sampled(SimpleNamespace(scheduler=self.scheduler, transformer=self.transformer), steps)

        return sample()


class Computed(Sampler):
    """Its scheduler is a property."""

    def __init__(self, model: Any, shift: float = 1.0) -> None:
        self.transformer, self.own = model, diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)

    scheduler = property(lambda self: self.own)  # type: ignore[assignment]


class Around(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs)


AROUND: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "inside a module": Around,
}


def alone(steps: int, shift: float = 1.0) -> Tensor:
    """What a sampler gives that names its scheduler."""
    sampler = Sampler(graphcache.transform(tiny(2), PLAN), shift)
    with sampler.transformer.session(scheduler=sampler.scheduler):
        return sampler.sample(steps)


@pytest.mark.parametrize("kind", [Sampler, Closing, Computed])
@pytest.mark.parametrize("around", AROUND)
def test_the_step_is_told_by_whatever_has_the_model_and_a_scheduler(around: str, kind: Any) -> None:
    torch._dynamo.reset()
    model = graphcache.transform(tiny(2), PLAN)
    sampler = kind(AROUND[around](model), 2.0)
    for steps in (6, 4):
        assert_same(sampler.sample(steps), alone(steps, 2.0))
        assert model.summary().branches[0].plan_steps == steps


def test_two_samplers_take_turns_over_one_model() -> None:
    model = graphcache.transform(tiny(2), PLAN)
    samplers = {shift: Sampler(model, shift) for shift in (1.0, 3.0)}
    for steps in (6, 4, 6):
        for shift, sampler in samplers.items():
            assert_same(sampler.sample(steps), alone(steps, shift))


def test_a_loop_that_is_handed_a_copy_goes_by_it() -> None:
    sampler = graphcache.transform(Sampler(tiny(2)), PLAN)
    other = copy.copy(sampler)
    other.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for steps in (6, 4, 6):
        assert_same(sampled(other, steps), alone(steps, 3.0))
        assert_same(sampled(sampler, steps), alone(steps))


def test_a_named_scheduler_drives_whoever_calls() -> None:
    sampler = Sampler(graphcache.transform(tiny(2), PLAN))
    named = diffusers.FlowMatchEulerDiscreteScheduler()
    named.set_timesteps(4)
    with sampler.transformer.session(scheduler=named):
        sampler.sample(1)
        assert sampler.transformer.summary().branches[0].plan_steps == 4


def test_in_a_session_a_loop_goes_by_its_timesteps_though_it_was_handed_a_pipeline() -> None:
    pipe = graphcache.transform(SimpleNamespace(transformer=tiny(2), scheduler=None), PLAN)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe.scheduler.set_timesteps(4)

    def loop(pipe: Any, steps: int) -> Tensor:
        kwargs = arguments()
        for step in range(steps):
            kwargs["timestep"] = torch.full((2,), 1 - step / steps)
            kwargs["x"] = kwargs["x"] - pipe.transformer(**kwargs) / steps
        return kwargs["x"]

    with pipe.transformer.session():
        result = loop(pipe, 6)
        assert pipe.transformer.summary().branches[0].plan_steps == 6
    bare = SimpleNamespace(transformer=graphcache.transform(tiny(2), PLAN))
    assert_same(result, loop(bare, 6))


class Trainer:
    """What a scheduler is to it has nothing to do with sampling."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), 0.1), 2)

    def preview(self, pipe: Any, steps: int) -> Tensor:
        return sampled(pipe, steps)


def test_a_schedule_of_learning_rates_drives_nothing() -> None:
    sampler = graphcache.transform(Sampler(tiny(2)), PLAN)
    assert_same(Trainer(sampler.transformer).preview(sampler, 4), alone(4))


class Holding(Sampler):
    """Asks whether something that its method has let go is free, when the model was called since."""

    def sample(self, steps: int) -> Tensor:
        large = torch.empty(8)
        gone, kept = weakref.ref(large), locals()
        self.transformer(**arguments())
        assert kept["steps"] == steps
        del kept, large
        result: Tensor = self.transformer(**arguments())
        assert gone() is None
        return result


def test_looking_for_the_pipeline_keeps_nothing_alive() -> None:
    Holding(graphcache.transform(tiny(2), presets.compute(1))).sample(1)


def modular(transformer: Any) -> Any:
    blocks = {
        "input": WanTextInputStep(),
        "timesteps": WanSetTimestepsStep(),
        "latents": WanPrepareLatentsStep(),
        "denoise": WanDenoiseStep(),
    }
    pipe = SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe.update_components(transformer=transformer, scheduler=scheduler, guider=guider)
    return pipe


def generated(pipe: Any, steps: int) -> Tensor:
    latents, prompts = noise(1, 4, 2, 8, 8, seed=6), [noise(1, TEXT, TEXT_DIM, seed=seed) for seed in (1, 2)]
    result: Tensor = pipe(
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        latents=latents,
        num_inference_steps=steps,
        output="latents",
    )
    return result


def test_a_modular_pipeline_drives_the_model_in_its_blocks() -> None:
    model = PIPELINES["wan"].make().transformer
    whole = graphcache.transform(modular(model), presets.fora(6))
    put = modular(graphcache.transform(model, presets.fora(6)))
    other = copy.copy(whole)
    other.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    for steps in (4, 6):
        expected = generated(whole, steps)
        assert not torch.equal(generated(other, steps), expected)
        assert_same(generated(whole, steps), expected)
        assert_same(generated(put, steps), expected)
        assert sum(step.reused for step in put.transformer.summary().branches[0].steps) > 0
