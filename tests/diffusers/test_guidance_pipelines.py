"""FasterCache in real diffusers pipelines, beside the same pipelines with a reference for each branch."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from graphcache.ir.call import Binder
from graphcache.ir.plan import Plan
from graphcache.presets import fastercache
from graphcache.tracing.capture import forward_parameters
from pipelines import PIPELINES
from reference import assert_same, capture_call
from reference_guidance import GuidedReference
from reference_pipeline import StandIn, laid, reference, transformed, untouched

STEPS = 10
GRID = (3, 8, 8)
"""Frames, height and width of the tokens that LTX returns packed."""


@dataclass
class GuidedStandIn(StandIn):
    """Answers both branches from two reference interpreters, however the pipeline calls them.

    A call of two equal halves is a doubled batch; of single calls a step's first is the conditional one.
    """

    guided: GuidedReference | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        binder = Binder(forward_parameters(self.model))
        bound = binder.bind(args, kwargs)
        _, tensors = binder.signature(bound)
        plan = self.plan_for(self.progress.steps)
        if tensors[0].shape[0] % 2 == 0 and torch.equal(*tensors[0].chunk(2)):
            return self._doubled(plan, bound, tensors)
        captured = capture_call(self.model, bound, "timestep")
        inputs = [laid(*pair) for pair in zip(tensors, captured.strides, strict=True)]
        now = self.progress.step
        self.calls[now] += 1
        self.guided = self.guided or self._reference(plan, captured, tensors[0])
        answer = self.guided.first if self.calls[now] == 1 else self.guided.second
        return captured.output.build([answer(inputs)])

    def _doubled(self, plan: Plan, bound: dict[str, Any], tensors: Sequence[Tensor]) -> Any:
        rows = tensors[0].shape[0]
        first = plan.conditional == "first"

        def half(leaf: Any, of_first: bool) -> Any:
            if not isinstance(leaf, Tensor) or leaf.shape[:1] != (rows,):
                return leaf
            return leaf.chunk(2)[0 if of_first else 1]

        calls = [
            torch.utils._pytree.tree_map(functools.partial(half, of_first=side), bound)
            for side in (first, not first)
        ]
        captured = capture_call(self.model, calls[0], "timestep")
        binder = Binder(forward_parameters(self.model))
        inputs = [
            [laid(*pair) for pair in zip(binder.signature(call)[1], captured.strides, strict=True)]
            for call in calls
        ]
        self.guided = self.guided or self._reference(plan, captured, tensors[0])
        both = self.guided(*inputs)
        return captured.output.build([torch.cat(both if first else both[::-1])])

    def _reference(self, plan: Plan, captured: Any, latents: Tensor) -> GuidedReference:
        (shape,) = (node.meta["val"].shape for node in captured.step.results())
        dim = next((d for d in range(1, len(shape)) if shape[d] == 2 * latents.shape[d]), 1)
        channels = shape[dim] // 2 if shape[dim] == 2 * latents.shape[dim] else shape[dim]
        options: dict[str, Any] = {"channel_dim": dim}
        if len(shape) == 3:
            options["frames"] = lambda tokens: tokens.unflatten(1, GRID).permute(0, 1, 4, 2, 3)
            options["tokens"] = lambda frames: frames.permute(0, 1, 3, 4, 2).flatten(1, 3)
        return GuidedReference.of(captured, plan, channels, **options)


PLANS = {
    "latte": fastercache("latte", STEPS),
    "cogvideox": fastercache("cogvideox", STEPS),
    "cogvideox_i2v": fastercache("cogvideox", STEPS),
    "mochi": fastercache("mochi", STEPS),
    "allegro": fastercache("open-sora-plan-1.1", STEPS),
    "pixart_sigma": fastercache(STEPS),
    "dit": fastercache(STEPS, conditional="first"),
    "sana": fastercache(STEPS),
    "ltx": fastercache(STEPS, grid=GRID),
    "wan": fastercache(STEPS),
    "wan_i2v": fastercache("vchitect-2.0", STEPS),
}


@functools.cache
def cached(name: str) -> Any:
    return transformed(PIPELINES[name], PLANS[name])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """As near as a whole batch and its halves are in fp32."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3 * scale)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", PLANS)
def test_a_pipeline_gives_what_its_references_give(name: str) -> None:
    tiny = PIPELINES[name]
    result = tiny.generate(cached(name), STEPS)
    assert_close(result, reference(tiny, lambda steps: PLANS[name], STEPS, GuidedStandIn))
    assert not torch.equal(result, tiny.generate(untouched(tiny), STEPS))
    assert_same(tiny.generate(cached(name), STEPS), result)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", PLANS)
def test_one_branch_steps_run_one_branch(name: str) -> None:
    pipe = cached(name)
    PIPELINES[name].generate(pipe, STEPS)
    branches = pipe.transformer.summary().branches
    (guidance,) = (row.actions for row in PLANS[name].rows if row.selector.is_guidance)
    runs = [sum(branch.steps[step].branches for branch in branches) for step in range(STEPS)]
    assert runs == [2 if action == "#" else 1 for action in guidance]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["latte", "cogvideox", "pixart_sigma", "wan"])
def test_two_prompts_and_no_guidance(name: str) -> None:
    """Several prompts keep their own rows; without guidance only features are reused."""
    tiny, pipe = PIPELINES[name], cached(name)
    both = tiny.generate(pipe, STEPS, batch=2)
    assert_close(both, reference(tiny, lambda steps: PLANS[name], STEPS, GuidedStandIn, batch=2))
    rows = tuple(row for row in PLANS[name].rows if not row.selector.is_guidance)
    alone = replace(PLANS[name], rows=rows, preset=None)
    unguided = transformed(tiny, alone)
    expected = tiny.generate(unguided, STEPS, batch=2, guided=False)
    assert_same(tiny.generate(pipe, STEPS, batch=2, guided=False), expected)


def test_a_distilled_model_has_feature_reuse_alone() -> None:
    """HunyuanVideo takes the scale as an input and is called once a step."""
    tiny = PIPELINES["hunyuan_video"]
    plan = fastercache(STEPS, guidance=False)
    pipe = transformed(tiny, plan)
    expected = reference(tiny, lambda steps: plan, STEPS, guided=False)
    assert_same(tiny.generate(pipe, STEPS, guided=False), expected)


def test_another_guidance_scale_needs_no_other_graph() -> None:
    """The scale is the sampler's: what is cached does not depend on it."""
    tiny, pipe = PIPELINES["latte"], cached("latte")
    tiny.generate(pipe, STEPS)
    before = pipe.transformer.summary().branches[0].graphs
    arguments = tiny.arguments
    changed = replace(tiny, arguments=lambda *call: {**arguments(*call), "guidance_scale": 2.5})
    result = changed.generate(pipe, STEPS)
    assert_close(result, reference(changed, lambda steps: PLANS["latte"], STEPS, GuidedStandIn))
    assert pipe.transformer.summary().branches[0].graphs == before
