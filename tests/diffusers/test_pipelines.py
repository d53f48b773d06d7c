"""Real diffusers pipelines around transformed models, beside the same pipelines with an untouched one.

What a cached generation must give is written here with module hooks, so that no part of the library is used
twice: a hook on the module that ends each branch hands out an output of an earlier step.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, Plan
from pipelines import PIPELINES
from reference import assert_same
from reference_pipeline import transformed, untouched

STEPS = 6
FORA = graphcache.presets.fora(STEPS, interval=3)
COMPUTED = "#..#.."
NAMES = ("dit", "pixart", "flux")


@functools.cache
def with_fora(name: str) -> Any:
    """One transformed pipeline for many tests: generations are independent of each other."""
    return transformed(PIPELINES[name], FORA)


@contextmanager
def outputs_stored(model: nn.Module, modules: str, branches: int, actions: str) -> Iterator[None]:
    """Let matching modules return what they returned at the latest step of `#`, for one generation."""
    calls: Counter[nn.Module] = Counter()
    stored: dict[tuple[nn.Module, int], Any] = {}

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        step, branch = divmod(calls[module], branches)
        calls[module] += 1
        if actions[step] == "#":
            stored[module, branch] = output
        return stored[module, branch]

    matching = [module for name, module in model.named_modules() if re.fullmatch(modules, name)]
    hooks = [module.register_forward_hook(replace) for module in matching]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cached_by_hand(name: str, actions: str = COMPUTED, batch: int = 1, guided: bool = True) -> Tensor:
    """A generation of the untouched pipeline in which branches compute at `#` and are reused elsewhere."""
    tiny = PIPELINES[name]
    pipe = untouched(tiny)
    branches = tiny.branches if guided else 1
    with outputs_stored(pipe.transformer, tiny.branch_modules, branches, actions):
        return tiny.generate(pipe, len(actions), batch, guided)


@pytest.mark.parametrize("plan", [graphcache.presets.compute(STEPS), Plan.parse("plan steps=6\n* ######")])
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_that_only_computes_changes_no_bit(name: str, plan: Plan) -> None:
    tiny = PIPELINES[name]
    assert_same(tiny.generate(transformed(tiny, plan), STEPS), tiny.generate(untouched(tiny), STEPS))


@pytest.mark.parametrize("name", [*NAMES, "wan"])
def test_fora_hands_out_the_branch_outputs_of_every_third_step(name: str) -> None:
    tiny = PIPELINES[name]
    result = tiny.generate(with_fora(name), STEPS)
    assert_same(result, cached_by_hand(name))
    assert not torch.equal(result, tiny.generate(untouched(tiny), STEPS))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_generation_equals_the_first(name: str) -> None:
    first, second = (PIPELINES[name].generate(with_fora(name), STEPS) for _ in range(2))
    assert_same(second, first)


@pytest.mark.parametrize("name", NAMES)
def test_guidance_and_batch_size_may_change_between_generations(name: str) -> None:
    for batch, guided in ((1, True), (1, False), (2, True), (1, True)):
        result = PIPELINES[name].generate(with_fora(name), STEPS, batch, guided)
        assert_same(result, cached_by_hand(name, batch=batch, guided=guided))


def test_each_guidance_branch_keeps_its_own_cache() -> None:
    pipe = with_fora("flux")
    PIPELINES["flux"].generate(pipe, STEPS)
    branches = pipe.transformer.summary().branches
    assert [branch.branch for branch in branches] == ["cond", "uncond"]
    assert [len(branch.steps) for branch in branches] == [STEPS, STEPS]


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_generation_leaves_nothing_behind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = with_fora(name)
    step, calls = pipe.scheduler.step, iter(range(2))

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            PIPELINES[name].generate(pipe, STEPS)
    assert_same(PIPELINES[name].generate(pipe, STEPS), cached_by_hand(name))


def test_a_second_order_solver_takes_two_plan_steps_at_a_timestep() -> None:
    tiny = PIPELINES["pixart"]
    actions = "#..#..#"
    evaluations = len(actions)
    plain, cached = tiny.make(), tiny.make()
    for pipe in (plain, cached):
        pipe.scheduler = diffusers.HeunDiscreteScheduler()
    graphcache.transform(cached, graphcache.presets.fora(evaluations, interval=3))
    with outputs_stored(plain.transformer, tiny.branch_modules, 1, actions):
        expected = tiny.generate(plain, (evaluations + 1) // 2)
    for _ in range(2):
        assert_same(tiny.generate(cached, (evaluations + 1) // 2), expected)


def test_transforming_again_replaces_the_plan() -> None:
    tiny = PIPELINES["pixart"]
    pipe = transformed(tiny, FORA)
    compute = graphcache.presets.compute(STEPS)
    assert graphcache.transform(pipe, compute) is pipe
    assert pipe.transformer.plan == compute
    assert type(pipe.transformer).__mro__[2] is diffusers.PixArtTransformer2DModel
    assert_same(tiny.generate(pipe, STEPS), tiny.generate(untouched(tiny), STEPS))


@pytest.mark.parametrize("name", NAMES)
def test_the_original_model_goes_on_computing_every_step(name: str) -> None:
    tiny, pipe = PIPELINES[name], PIPELINES[name].make()
    original = pipe.transformer
    graphcache.transform(pipe, FORA)
    assert pipe.transformer is not original
    pipe.transformer = original
    assert_same(tiny.generate(pipe, STEPS), tiny.generate(untouched(tiny), STEPS))


def test_original_and_transformed_model_run_in_turn() -> None:
    tiny, pipe = PIPELINES["dit"], PIPELINES["dit"].make()
    original = pipe.transformer
    cached = graphcache.transform(pipe, FORA).transformer
    for _ in range(2):
        pipe.transformer = original
        assert_same(tiny.generate(pipe, STEPS), tiny.generate(untouched(tiny), STEPS))
        pipe.transformer = cached
        assert_same(tiny.generate(pipe, STEPS), cached_by_hand("dit"))


@pytest.mark.parametrize("name", [*NAMES, "wan"])
def test_the_transformed_model_looks_like_the_original(name: str) -> None:
    pipe = PIPELINES[name].make()
    original = pipe.transformer
    assert graphcache.transform(pipe, FORA) is pipe
    model = pipe.transformer
    assert isinstance(model, type(original))
    assert type(model).__name__ == type(original).__name__
    assert model.config == original.config
    assert (model.dtype, model.device) == (original.dtype, original.device)
    assert model.state_dict().keys() == original.state_dict().keys()
    weights = zip(model.parameters(), original.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in weights)


def test_moving_the_pipeline_to_another_dtype_moves_the_cached_model() -> None:
    tiny = PIPELINES["dit"]
    plain, cached = tiny.make(), graphcache.transform(tiny.make(), FORA)
    tiny.generate(cached, STEPS)
    for pipe in (plain, cached):
        pipe.to(torch.bfloat16)
    with outputs_stored(plain.transformer, tiny.branch_modules, 1, COMPUTED):
        expected = tiny.generate(plain, STEPS)
    assert expected.dtype is torch.bfloat16
    assert_same(tiny.generate(cached, STEPS), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_loads_as_the_original_class_with_equal_weights(name: str, tmp_path: Path) -> None:
    kind = type(untouched(PIPELINES[name]).transformer)
    model = transformed(PIPELINES[name], FORA).transformer
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert type(loaded) is kind
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_saved_pipeline_loads_with_an_untransformed_model(tmp_path: Path) -> None:
    tiny = PIPELINES["dit"]
    transformed(tiny, FORA).save_pretrained(tmp_path)
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is diffusers.DiTTransformer2DModel
    assert_same(tiny.generate(loaded, STEPS), tiny.generate(untouched(tiny), STEPS))


def test_a_diffusers_cache_on_top_is_refused() -> None:
    pipe = graphcache.transform(PIPELINES["flux"].make(), FORA)
    pipe.transformer.enable_cache(diffusers.TaylorSeerCacheConfig())
    with pytest.raises(CaptureError, match=r"transformer_blocks.*disable_cache"):
        PIPELINES["flux"].generate(pipe, STEPS)


def test_a_model_whose_diffusers_cache_was_disabled_is_as_good_as_new() -> None:
    """Disabling leaves each hooked module with a `forward` of its own that is the class's, bound."""
    pipe = PIPELINES["flux"].make()
    pipe.transformer.enable_cache(diffusers.TaylorSeerCacheConfig())
    pipe.transformer.disable_cache()
    graphcache.transform(pipe, FORA)
    assert_same(PIPELINES["flux"].generate(pipe, STEPS), cached_by_hand("flux"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_set_on_the_original_cannot_bypass_the_plan(when: str) -> None:
    """Accelerate's hooks and diffusers' hooks on a whole model wrap `forward` on the instance."""
    pipe = PIPELINES["dit"].make()
    original = pipe.transformer

    def wrap() -> None:
        forward = original.forward
        original.forward = lambda *args, **kwargs: forward(*args, **kwargs)

    def run() -> None:
        if when == "before":
            wrap()
        graphcache.transform(pipe, FORA)
        if when == "after":
            wrap()
        PIPELINES["dit"].generate(pipe, STEPS)

    with pytest.raises(CaptureError, match="forward of its own"):
        run()
