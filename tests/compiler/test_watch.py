"""What a capture bakes in is watched: whatever changes, the next generation is right or refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import JointAttnProcessor2_0
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import graphcache
from graphcache import CaptureError, presets
from inside import programs_of
from pipelines import PIPELINES
from reference import assert_same, cast
from tiny import TinyDiT, arguments, tiny
from zoo import CASES
from zoo.case import randomise


def one_block() -> nn.Module:
    """What counts is told as well from one block as from two, and captured in half the time."""
    model: Any = CASES["sd3"].make()
    return randomise(type(model).from_config({**model.config, "num_layers": 1}), 3)


CASE = replace(CASES["sd3"], make=one_block)


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def adapter(rank: int = 2, seed: int = 0) -> LoraConfig:
    torch.manual_seed(seed)
    return LoraConfig(r=rank, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])


def fuse(model: Any) -> None:
    model.add_adapter(adapter())
    model.fuse_lora()


def unfuse(model: Any) -> None:
    fuse(model)
    model.unfuse_lora()


def weaken(model: Any) -> None:
    model.add_adapter(adapter())
    model.set_adapters("default", 0.3)


def two_adapters(model: Any) -> None:
    model.add_adapter(adapter(), "one")
    model.add_adapter(adapter(seed=1), "two")
    model.set_adapters(["one", "two"], [0.4, 0.7])


def switch(model: Any) -> None:
    two_adapters(model)
    model.set_adapter("one")


def delete(model: Any) -> None:
    two_adapters(model)
    model.delete_adapters("two")


def disable(model: Any) -> None:
    model.add_adapter(adapter())
    model.disable_adapters()


def other_module(model: Any) -> None:
    torch.manual_seed(3)
    model.transformer_blocks[0].ff = nn.Sequential(nn.Linear(32, 32), nn.GELU())


def other_parameter(model: Any) -> None:
    attn = model.transformer_blocks[0].attn
    attn.to_q.weight = nn.Parameter(attn.to_q.weight.detach() * 2)


class Doubled(JointAttnProcessor2_0):
    """Its own kind of attention, with an attribute to change."""

    factor = 2.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(item * self.factor for item in super().__call__(*args, **kwargs))


CHANGES: list[Callable[[Any], None]] = [
    lambda model: model.add_adapter(adapter()),
    weaken,
    two_adapters,
    switch,
    delete,
    disable,
    fuse,
    unfuse,
    other_module,
    other_parameter,
    lambda model: model.fuse_qkv_projections(),
    lambda model: model.set_attn_processor(Doubled()),
    lambda model: model.to(torch.float64),
    lambda model: setattr(model.transformer_blocks[0], "norm2", nn.Identity()),
    lambda model: setattr(model.transformer_blocks[0].norm2, "eps", 0.5),
]


def generation(model: Any) -> list[Any]:
    """Three steps; inputs follow the model's dtype."""
    static, results = CASE.static(2), []
    static = cast(static, model.dtype)
    for time in (1.0, 0.6, 0.3):
        results.append(model(**CASE.call(static, CASE.latents(2).to(model.dtype), time)))
    return results


def cases() -> list[Any]:
    names = "add weaken two switch delete disable fuse unfuse module parameter qkv processor dtype child eps"
    return [pytest.param(change, id=name) for change, name in zip(CHANGES, names.split(), strict=True)]


@pytest.mark.parametrize("on_result", [True, False])
@pytest.mark.parametrize("change", cases())
def test_a_changed_model_is_captured_again(change: Callable[[Any], None], on_result: bool) -> None:
    model = CASE.make()
    cached = graphcache.transform(model, presets.compute(3))
    before = generation(cached)
    torch.manual_seed(0)
    change(cached if on_result else model)
    expected = generation(model)
    assert_same(generation(cached), expected)
    assert_same(generation(cached), expected)
    program = programs_of(cached)[0]
    generation(cached)
    assert programs_of(cached)[0] is program
    if change not in (unfuse, disable, CHANGES[10]):
        assert not all(map(torch.equal, map(CASE.prediction, before), map(CASE.prediction, expected)))


def test_weights_changed_in_place_are_right_from_the_next_generation_on() -> None:
    model = CASE.make()
    cached = graphcache.transform(model, presets.compute(3))
    generation(cached)
    programs = programs_of(cached)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    assert_same(generation(cached), generation(model))
    assert programs_of(cached) == programs


@pytest.mark.usefixtures("captured_anew")
def test_another_capture_of_the_same_model_is_no_change() -> None:
    """torch.export replaces tuples, lists and dicts among the modules' attributes by equal ones."""
    model, kwargs = CASES["dit"].make(), CASES["dit"].kwargs(t=1.0)
    cached = graphcache.transform(model, presets.compute(1))
    cached(**kwargs)
    program = programs_of(cached)[0]
    graphcache.transform(model, presets.compute(1), example_inputs=kwargs)
    cached(**kwargs)
    assert programs_of(cached)[0] is program


def test_a_scale_given_with_the_call_is_part_of_the_signature() -> None:
    case = CASES["flux"]
    model: Any = case.make()
    model.add_adapter(adapter())
    cached = graphcache.transform(model, presets.compute(1))
    for scale in (1.0, 0.3, 1.0):
        kwargs = {**case.kwargs(t=1.0), "joint_attention_kwargs": {"scale": scale}}
        assert_same(cached(**kwargs), model(**kwargs))


def test_an_attention_backend_that_chooses_kernels_is_refused() -> None:
    model: Any = CASES["flux"].make()
    cached = graphcache.transform(model, presets.compute(1))
    kwargs = CASES["flux"].kwargs(t=1.0)
    cached(**kwargs)
    cached.set_attention_backend("_native_math")
    try:
        with pytest.raises(CaptureError, match=r"sdpa_kernel.*reset_attention_backend"):
            cached(**kwargs)
    finally:
        cached.reset_attention_backend()
    cached.set_attention_backend("native")
    try:
        assert_same(cached(**kwargs), model(**kwargs))
    finally:
        cached.reset_attention_backend()


def test_a_backend_that_diffusers_dispatches_to_is_part_of_the_signature() -> None:
    model = CASES["flux"].make()
    cached = graphcache.transform(model, presets.compute(1))
    kwargs = CASES["flux"].kwargs(t=1.0)
    cached(**kwargs)
    with attention_backend("_native_math"), pytest.raises(CaptureError, match="sdpa_kernel"):
        cached(**kwargs)
    assert_same(cached(**kwargs), model(**kwargs))


class Restricting(nn.Module):
    """Its attention may only run some of PyTorch's kernels."""

    def __init__(self, kernels: list[SDPBackend]) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.kernels = kernels

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        heads = self.inner(x)[:, None]
        with sdpa_kernel(self.kernels):
            found = F.scaled_dot_product_attention(heads, heads, heads)
        return found[:, 0] * timestep


@pytest.mark.parametrize(
    ("kernels", "changes"),
    [
        ([SDPBackend.FLASH_ATTENTION], False),
        ([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION], False),
        ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], False),
        ([SDPBackend.MATH], True),
        ([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], True),
    ],
)
def test_kernels_chosen_inside_are_refused_where_another_one_runs(
    kernels: list[SDPBackend], changes: bool
) -> None:
    model, x, time = Restricting(kernels).eval(), torch.randn(2, 5, 8), torch.rand(2, 1, 1)
    cached = graphcache.transform(model, presets.compute(1))
    if changes:
        with pytest.raises(CaptureError, match=r"restricts attention.*would run another one"):
            cached(x, time)
    else:
        assert_same(cached(x, time), model(x, time))
    with sdpa_kernel([SDPBackend.MATH]):
        if SDPBackend.MATH in kernels and not changes:
            with pytest.raises(CaptureError, match="restricts attention"):
                cached(x, time)
        elif changes:
            assert_same(cached(x, time), model(x, time))


def test_kernels_chosen_around_a_generation_hold_inside() -> None:
    model = CASES["flux"].make()
    cached = graphcache.transform(model, presets.compute(1))
    kwargs = CASES["flux"].kwargs(t=1.0)
    for kernels in (list(SDPBackend.__members__.values())[1:], [SDPBackend.MATH]):
        with sdpa_kernel(kernels):
            assert_same(cached(**kwargs), model(**kwargs))


def test_another_attribute_of_a_processor_is_seen() -> None:
    model: Any = CASE.make()
    processor = Doubled()
    model.set_attn_processor(processor)
    cached = graphcache.transform(model, presets.compute(3))
    generation(cached)
    processor.factor = 3.0
    assert_same(generation(cached), generation(model))


def test_autocast_has_programs_of_its_own() -> None:
    model, kwargs = tiny(), arguments()
    cached = graphcache.transform(model, presets.compute(1))
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert_same(cached(**kwargs), model(**kwargs))


def test_training_mode_is_refused_at_the_next_generation() -> None:
    model = tiny()
    cached = graphcache.transform(model, presets.compute(1))
    cached(**arguments())
    model.train()
    with pytest.raises(CaptureError, match="training mode"):
        cached(**arguments())
    model.eval()
    assert_same(cached(**arguments()), model(**arguments()))


def test_a_class_whose_forward_is_replaced_is_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Patched(TinyDiT):
        pass

    model = tiny(kind=Patched)
    cached = graphcache.transform(model, presets.compute(1))
    cached(**arguments())
    monkeypatch.setattr(
        Patched, "forward", lambda self, x, timestep, text: 2 * TinyDiT.forward(self, x, timestep, text)
    )
    assert_same(cached(**arguments()), model(**arguments()))


def test_offloading_may_be_removed_from_the_result_though_enabled_on_the_original() -> None:
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    model = tiny()
    cpu_offload_with_hook(model, execution_device="cpu")
    cached = graphcache.transform(model, presets.compute(1))
    assert_same(cached(**arguments()), tiny()(**arguments()))
    remove_hook_from_module(cached)
    assert_same(cached(**arguments()), tiny()(**arguments()))
    assert "forward" not in vars(graphcache.restore(cached))


def test_a_hook_that_is_no_offloading_on_a_part_is_refused() -> None:
    from accelerate.hooks import LayerwiseCastingHook, add_hook_to_module

    model = tiny()
    cached = graphcache.transform(model, presets.compute(1))
    cached(**arguments())
    add_hook_to_module(model.blocks[0], LayerwiseCastingHook(torch.float16, torch.float32, False))
    with pytest.raises(CaptureError, match=r"blocks\.0 has a forward of its own"):
        cached(**arguments())


def test_a_forward_that_forgets_the_plan_is_refused() -> None:
    model = tiny()
    cached: Any = graphcache.transform(model, presets.compute(1))
    cached.forward = lambda x, timestep, text: x
    with pytest.raises(graphcache.GraphCacheError, match="does not call the one it replaced"):
        cached(**arguments())
    del cached.forward
    assert_same(cached(**arguments()), model(**arguments()))


def test_a_lora_file_loads_into_the_result_and_out_again(tmp_path: Path) -> None:
    tiny_pipe = PIPELINES["flux"]
    donor: Any = tiny_pipe.make().transformer
    donor.add_adapter(adapter())
    donor.save_lora_adapter(tmp_path)
    plain, cached = tiny_pipe.make(), graphcache.transform(tiny_pipe.make(), presets.compute(4))
    without = tiny_pipe.generate(plain, 4)
    assert_same(tiny_pipe.generate(cached, 4), without)
    for pipe in (plain, cached):
        pipe.transformer.load_lora_adapter(
            tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors"
        )
    loaded = tiny_pipe.generate(plain, 4)
    assert_same(tiny_pipe.generate(cached, 4), loaded)
    assert not torch.equal(loaded, without)
    cached.transformer.unload_lora()
    assert_same(tiny_pipe.generate(cached, 4), without)
