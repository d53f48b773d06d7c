"""What changes between two calls of one generation: hooks, adapters, processors, parts of the model."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import AutoGuidance, ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import HookRegistry, LayerSkipConfig, ModelHook
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, Plan, presets
from inside import programs_of
from reference import assert_same
from tiny import tiny
from zoo import CASES
from zoo.case import randomise

STEPS = 6
PLAN = Plan.parse("plan steps=6 preset=none\nt = taylorseer order=1\n@self #.#t.#\n@mlp #.##..")


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


class Louder(ModelHook):
    """Changes what a module hands out, and keeps nothing."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * self.factor


@contextmanager
def hooked(model: nn.Module, *hooks: ModelHook, part: str = "blocks.0.out") -> Iterator[None]:
    """As guiders do: on for one call, and off again."""
    registry = HookRegistry.check_if_exists_or_initialize(model.get_submodule(part))
    for number, hook in enumerate(hooks):
        registry.register_hook(hook, f"hook {number}")
    try:
        yield
    finally:
        for number in range(len(hooks)):
            registry.remove_hook(f"hook {number}", recurse=False)


def loop(call: Callable[..., Tensor], seed: int = 0) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    x, text = torch.randn(1, 3, 4, generator=numbers), torch.randn(1, 4, generator=numbers)
    for step in range(STEPS):
        x = x - 0.1 * call(step, x=x, timestep=torch.full((1,), 1 - 0.15 * step), text=text)
    return x


def plainly(model: Any) -> Callable[..., Tensor]:
    return lambda step, **kwargs: model(**kwargs)


@pytest.mark.parametrize("named", [True, False])
def test_a_hook_that_is_on_for_one_call_of_each_step(named: bool) -> None:
    """Each of three calls is as if the model were always as it is for that call."""
    model, numbers = tiny(2), torch.Generator().manual_seed(3)
    texts = [torch.randn(1, 4, generator=numbers) for _ in range(2)]
    texts.append(texts[0])
    factors = (1.0, 1.0, 0.25)
    cached: Any = graphcache.transform(model, PLAN, branches=None if named else 3)

    def three(call: Callable[..., Tensor]) -> list[Tensor]:
        found = [torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(4))] * 3
        for step in range(STEPS):
            for k in range(3):
                found[k] = found[k] - 0.1 * call(
                    k, x=found[k], timestep=torch.full((1,), 1 - 0.15 * step), text=texts[k]
                )
        return found

    def guided(k: int, **kwargs: Tensor) -> Tensor:
        with hooked(cached, *([Louder(factors[k])] if k == 2 else [])):
            if not named:
                return cached(**kwargs)  # type: ignore[no-any-return]
            with cached.cache_context(f"call {k}"):
                return cached(**kwargs)  # type: ignore[no-any-return]

    own = [graphcache.transform(tiny(2), PLAN) for _ in range(3)]
    with hooked(own[2], Louder(factors[2])):
        expected = three(lambda k, **kwargs: own[k](**kwargs))
    for _ in range(3):
        assert_same(three(guided), expected)
        steps = [[step.reused for step in branch.steps] for branch in cached.summary().branches]
        assert steps == [[0, 4, 0, 0, 4, 2]] * 3
        assert len(programs_of(cached)) == 2, "a form that returns finds its program"


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_another_strength_of_a_hook_is_another_form(scale: float) -> None:
    cached: Any = graphcache.transform(tiny(2), presets.compute(STEPS))

    def growing(model: Any) -> Callable[..., Tensor]:
        def call(step: int, **kwargs: Tensor) -> Tensor:
            with hooked(model, Louder(1 + scale * (step // 3))):
                return model(**kwargs)  # type: ignore[no-any-return]

        return call

    for _ in range(2):
        assert_same(loop(growing(cached)), loop(growing(tiny(2))))
    assert len(programs_of(cached)) == 2


class Counting(ModelHook):
    _is_stateful = True

    def reset_state(self, module: nn.Module) -> None:
        pass


class Moving(ModelHook):
    """Acts before the forward, as offloading does."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


@pytest.mark.parametrize("hook", [Counting, Moving, "forward hook", "forward"])
def test_what_a_graph_cannot_hold_is_refused_in_the_call_that_it_comes_with(hook: Any) -> None:
    """Once it is gone the generation goes on."""
    model = tiny(2)
    cached: Any = graphcache.transform(model, PLAN)
    part = model.blocks[0].out

    def call(step: int, **kwargs: Tensor) -> Tensor:
        if step == 2:
            if hook == "forward hook":
                handle = part.register_forward_hook(lambda *_: None)
                undo = handle.remove
            elif hook == "forward":
                part.forward = lambda x: x
                undo = lambda: delattr(part, "forward")  # noqa: E731
            else:
                registry = HookRegistry.check_if_exists_or_initialize(part)
                registry.register_hook(hook(), "hook")
                undo = lambda: registry.remove_hook("hook")  # noqa: E731
            with pytest.raises(CaptureError, match=r"blocks\.0\.out has"):
                cached(**kwargs)
            undo()
        return cached(**kwargs)  # type: ignore[no-any-return]

    assert_same(loop(call), loop(plainly(graphcache.transform(tiny(2), PLAN))))


def with_adapters(model: Any) -> Any:
    """Two low-rank adapters on a module of every block."""
    for name in ("one", "two"):
        config = LoraConfig(r=1, lora_alpha=2, init_lora_weights=False, target_modules=["out", "up"])
        model = inject_adapter_in_model(config, model, name)
    for layer in layers(model):
        layer.set_adapter("one")
    return model


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def switch(model: nn.Module, step: int) -> None:
    for layer in layers(model):
        layer.set_adapter("one" if step % 2 else "two")


def fade(model: nn.Module, step: int) -> None:
    for layer in layers(model):
        layer.set_scale("one", 1.0 if step < 3 else 0.25)


def turn_off(model: nn.Module, step: int) -> None:
    for layer in layers(model):
        layer.enable_adapters(step < 2 or step > 4)


@pytest.mark.parametrize("change", [switch, fade, turn_off])
def test_an_adapter_changed_by_a_step_callback_counts_from_that_step_on(change: Callable[..., None]) -> None:
    torch.manual_seed(5)
    model = with_adapters(tiny(2))
    cached: Any = graphcache.transform(model, presets.compute(STEPS))

    def changing(run: Any) -> Callable[..., Tensor]:
        def call(step: int, **kwargs: Tensor) -> Tensor:
            change(model, step)
            return run(**kwargs)  # type: ignore[no-any-return]

        return call

    for seed in range(3):
        assert_same(loop(changing(cached), seed), loop(changing(model), seed))
    assert len(programs_of(cached)) == 2


def test_what_was_cached_before_an_adapter_changed_is_still_read() -> None:
    """The plan goes on: steps that reuse are the same, those that compute do it with the adapter as it is."""
    torch.manual_seed(5)
    model = with_adapters(tiny(2))
    cached: Any = graphcache.transform(model, presets.fora(STEPS, interval=3))
    cached(x=torch.ones(1, 3, 4), timestep=torch.ones(1), text=torch.ones(1, 4))
    kept = {layer: layer.scaling["one"] for layer in layers(model)}
    results = []
    for changed in (False, True):
        cached.reset()
        found = []
        for step in range(STEPS):
            for layer in layers(model):
                layer.scaling["one"] = kept[layer] * (0.5 if changed and step in (1, 2) else 1.0)
            time = torch.full((1,), 0.9 - 0.15 * step)
            found.append(cached(x=torch.ones(1, 3, 4), timestep=time, text=torch.ones(1, 4)))
        results.append(found)
    assert_same(results[0], results[1])
    assert [step.reused for step in cached.summary().branches[0].steps] == [0, 4, 4, 0, 4, 4]


def test_parts_exchanged_within_a_generation_count_at_once_if_everything_is_watched() -> None:
    model = tiny(2)
    cached: Any = graphcache.transform(model, presets.compute(STEPS), watch="everything")
    others = [nn.Linear(4, 4, bias=False) for _ in range(2)]

    def exchanging(run: Any) -> Callable[..., Tensor]:
        def call(step: int, **kwargs: Tensor) -> Tensor:
            model.blocks[1].out = others[step // 3]
            return run(**kwargs)  # type: ignore[no-any-return]

        return call

    assert_same(loop(exchanging(cached)), loop(exchanging(model)))


def test_adapters_loaded_within_a_generation_count_at_once() -> None:
    models = [tiny(2), tiny(2)]
    cached: Any = graphcache.transform(models[0], presets.compute(STEPS))

    def loading(model: nn.Module, run: Any) -> Callable[..., Tensor]:
        def call(step: int, **kwargs: Tensor) -> Tensor:
            if step == 3:
                torch.manual_seed(5)
                with_adapters(model)
            return run(**kwargs)  # type: ignore[no-any-return]

        return call

    assert_same(loop(loading(models[0], cached)), loop(loading(models[1], models[1])))


@pytest.mark.parametrize("everything", [True, False])
def test_other_attributes_count_at_once_if_everything_is_watched(everything: bool) -> None:
    """Else from the next generation on."""
    model: Any = CASES["sd3"].make()
    cached = graphcache.transform(model, presets.compute(2), watch="everything" if everything else "adapters")
    kwargs = [CASES["sd3"].kwargs(t=t) for t in (1.0, 0.5)]
    cached(**kwargs[0])
    norm = model.transformer_blocks[0].norm2
    unchanged, norm.eps = model(**kwargs[1]), 0.5
    assert_same(cached(**kwargs[1]), model(**kwargs[1]) if everything else unchanged)
    assert_same(cached(**kwargs[0]), model(**kwargs[0]))


def test_a_processor_exchanged_within_a_generation_counts_at_once() -> None:
    class Halved(type(CASES["sd3"].make().transformer_blocks[0].attn.processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(item * 0.5 for item in super().__call__(*args, **kwargs))

    model: Any = CASES["sd3"].make()
    cached = graphcache.transform(model, presets.compute(2))
    kwargs = [CASES["sd3"].kwargs(t=t) for t in (1.0, 0.5)]
    cached(**kwargs[0])
    model.transformer_blocks[0].attn.set_processor(Halved())
    assert_same(cached(**kwargs[1]), model(**kwargs[1]))


def test_caches_that_do_not_fit_the_models_new_form_are_dropped_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A model that skips a block has fewer sites."""
    case = CASES["flux"]
    model: Any = case.make()
    cached: Any = graphcache.transform(model, presets.fora(4, interval=2))
    calls = [case.kwargs(t=t) for t in (1.0, 0.75, 0.5, 0.25)]
    cached(**calls[0])
    apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn="single_transformer_blocks"))
    with caplog.at_level(logging.WARNING, "graphcache"):
        assert_same(cached(**calls[1]), model(**calls[1]))
    assert [record for record in caplog.records if "does not fit" in record.getMessage()]
    always: Any = graphcache.transform(model, presets.compute(4))
    assert_same(always(**calls[0]), model(**calls[0]))


SKIPPED = LayerSkipConfig(indices=[1], fqn="blocks")
GUIDERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: ClassifierFreeGuidance(guidance_scale=4.0),
    "skip layers": lambda: SkipLayerGuidance(4.0, 3.0, 0.0, 1.0, skip_layer_config=SKIPPED),
    "auto": lambda: AutoGuidance(4.0, auto_guidance_config=SKIPPED),
}


def modular(guider: Any, plan: Plan | None = None, generations: int = 1) -> tuple[Any, Any]:
    """Latents of a modular pipeline, and its transformer."""
    pipe = WanCoreDenoiseStep().init_pipeline()
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip
    pipe.update_components(transformer=randomise(model.eval(), 3), guider=guider, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    if plan is not None:
        graphcache.transform(pipe, plan)
    numbers = torch.Generator().manual_seed(1)
    width = pipe.transformer.config.text_dim
    cond, uncond = (torch.randn(1, 12, width, generator=numbers) for _ in range(2))
    for _ in range(generations):
        latents = pipe(
            prompt_embeds=cond,
            negative_prompt_embeds=uncond,
            height=64,
            width=64,
            num_frames=5,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output="latents",
        )
    return latents, pipe.transformer


@pytest.mark.parametrize("name", GUIDERS)
def test_a_guider_that_puts_hooks_on_for_some_calls(name: str) -> None:
    want, _ = modular(GUIDERS[name]())
    assert_same(modular(GUIDERS[name](), presets.compute(4), 2)[0], want)
    _, transformer = modular(GUIDERS[name](), presets.fora(4, interval=2), 2)
    reused = [[step.reused > 0 for step in branch.steps] for branch in transformer.summary().branches]
    third = [[False, False, True]] * (name == "skip layers")  # that one begins at the second step
    assert reused == [[False, True, False, True]] * 2 + third


def test_windows_go_on_after_a_fade_beside_a_context_that_wears_hooks() -> None:
    """What another context's calls find the model to be like says nothing about these."""
    torch.manual_seed(5)
    model = with_adapters(tiny(2))
    cached: Any = graphcache.transform(model, PLAN, branches=2)
    own = {(name, k): graphcache.transform(model, PLAN) for name in ("hooked", "cond") for k in range(2)}
    text = torch.randn(1, 4)
    for step in range(STEPS):
        for layer in layers(model):
            layer.set_scale("one", 0.25 if step > 1 else 1.0)
        for (name, _), alone in own.items():
            call = {"x": torch.randn(1, 3, 4), "timestep": torch.full((1,), 1 - 0.15 * step), "text": text}
            with hooked(model, *([Louder(0.5)] if name == "hooked" else [])):
                with cached.cache_context(name):
                    result = cached(**call)
                assert_same(result, alone(**call))
