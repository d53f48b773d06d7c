"""What was compiled for one model serves every other that computes the same with weights of its own."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import graphcache
from graphcache import presets
from graphcache.compiler.code import takes_weights
from graphcache.compiler.compilations import EVERYONES
from inside import only_program
from pipelines import PIPELINES
from reference import assert_same
from tiny import arguments, tiny

STEPS = 4
PLAN = presets.fora(STEPS, interval=2)
PHASES = 2
OPTIONS: dict[str, dict[str, Any]] = {
    "aot_eager": {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe},
    "inductor": {"epilogue_fusion": False},
}


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    with torch.no_grad():
        yield


def model(seed: int = 0, depth: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return tiny(depth)


def generation(call: Any) -> list[Tensor]:
    kwargs = arguments()
    return [call(**{**kwargs, "timestep": torch.full((2,), 1 - 0.2 * step)}) for step in range(STEPS)]


def right(given: nn.Module, backend: Any = "aot_eager") -> tuple[Any, int]:
    """A transformed model that computes what the plan computes eagerly, and what that compiled."""
    cached = graphcache.transform(given, PLAN, backend=backend)
    expected = generation(graphcache.transform(given, PLAN))
    before = counters["stats"]["unique_graphs"]
    found = generation(cached)
    if "inductor" in str(backend):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    else:
        assert_same(found, expected)
    return cached, counters["stats"]["unique_graphs"] - before


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_second_model_of_the_same_kind_compiles_nothing(backend: str) -> None:
    first, compiled = right(model(0), backend)
    assert compiled == PHASES
    assert right(model(1), backend)[1] == 0
    assert right(model(2), {"backend": backend})[1] == 0
    assert right(model(3), {"backend": backend, "options": OPTIONS[backend]})[1] == PHASES
    assert first.plan == PLAN


def test_weights_are_looked_up_at_every_call() -> None:
    one, other = model(0), model(1)
    first, _ = right(one)
    second, _ = right(other)
    for parameter in other.parameters():
        parameter.mul_(1.5)
    for _ in range(2):
        assert_same(generation(second), generation(graphcache.transform(other, PLAN)))
        assert_same(generation(first), generation(graphcache.transform(one, PLAN)))


def replaced(given: nn.Module, made: Callable[[Tensor], Tensor]) -> nn.Module:
    linear = given.blocks[0].up
    linear.weight = nn.Parameter(made(linear.weight.detach()), linear.weight.requires_grad)
    return given


OTHERS: dict[str, tuple[Callable[[nn.Module], nn.Module], int]] = {
    "strides": (lambda given: replaced(given, lambda weight: weight.t().contiguous().t()), 1),
    "a tie": (lambda given: setattr(given.blocks[1].up, "weight", given.blocks[0].up.weight) or given, 1),
    "no gradients": (lambda given: given.requires_grad_(False), PHASES),
}


@pytest.mark.few(2)
@pytest.mark.parametrize(("change", "phases"), OTHERS.values(), ids=OTHERS)
def test_other_kinds_of_weights_are_compiled_for(
    change: Callable[[nn.Module], nn.Module], phases: int
) -> None:
    """Once; a phase that reads none of them is compiled no more."""
    kept = [right(model(0)), right(change(model(1)))]
    assert kept[1][1] == phases
    assert right(change(model(2)))[1] == 0


def test_a_change_of_one_weight_captures_and_compiles_no_phase_anew() -> None:
    given = model(0)
    cached, _ = right(given)
    before = counters["stats"]["unique_graphs"]
    replaced(given, lambda weight: weight * 2)
    assert_same(generation(cached), generation(graphcache.transform(given, PLAN)))
    assert counters["stats"]["unique_graphs"] == before


def adapted(given: nn.Module, name: str, scale: int) -> nn.Module:
    config = LoraConfig(r=1, lora_alpha=scale, init_lora_weights=False, target_modules=["out", "up"])
    inject_adapter_in_model(config, given, name)
    for layer in given.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(name)
    return given.eval()


def test_another_adapter_of_the_same_shapes_compiles_nothing() -> None:
    given = adapted(model(0), "one", 1)
    cached, _ = right(given)
    for name, scale, phases in (("two", 1, 0), ("three", 2, 1)):
        adapted(given, name, scale)
        before = counters["stats"]["unique_graphs"]
        assert_same(generation(cached), generation(graphcache.transform(given, PLAN)))
        assert counters["stats"]["unique_graphs"] == before + phases


def test_two_transformers_of_a_pipeline_compile_what_one_would() -> None:
    tiny_pipeline, steps = PIPELINES["wan_two_transformers"], 6
    pipe = graphcache.transform(tiny_pipeline.make(), presets.fora(steps), backend="aot_eager")
    expected = tiny_pipeline.generate(graphcache.transform(tiny_pipeline.make(), presets.fora(steps)), steps)
    before = counters["stats"]["unique_graphs"]
    assert_same(tiny_pipeline.generate(pipe, steps), expected)
    first, second = (getattr(pipe, name).summary().branches[0] for name in ("transformer", "transformer_2"))
    assert counters["stats"]["unique_graphs"] - before == 2, "one phase that computes, one that reuses"
    assert first.steps
    assert second.steps


def test_a_copy_and_a_second_session_compile_nothing() -> None:
    cached, _ = right(model(0))
    before = counters["stats"]["unique_graphs"]
    other = copy.deepcopy(cached)
    for parameter in other.parameters():
        parameter.add_(0.1)
    assert_same(generation(other), generation(graphcache.transform(graphcache.restore(other), PLAN)))
    with cached.session():
        generation(cached)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.usefixtures("own_garbage")
def test_code_holds_no_weights(captured_anew: None) -> None:
    given = model(0)
    cached, _ = right(given, "inductor")
    weights = [weakref.ref(parameter) for parameter in given.parameters()]
    other, _ = right(model(1), "inductor")
    del given, cached
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert right(model(2), "inductor")[1] == 0
    del other
    gc.collect()
    assert not EVERYONES, "code that no model keeps is gone"


class Packed(nn.Parameter):
    """Weights of a class of their own, whose contents code may depend on."""


def with_packed_weight(given: nn.Module) -> nn.Module:
    linear = given.blocks[0].up
    linear.weight = linear.weight.detach().as_subclass(Packed)
    return given


BACKENDS: dict[str, Any] = {
    "eagerly": None,
    "CUDA graphs": {"mode": "reduce-overhead"},
    "frozen": {"options": {"freezing": True}},
    "someone's compiler": CompileCounter(),
}


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_code_that_depends_on_weights_is_of_one_model(backend: Any) -> None:
    cached = graphcache.transform(model(0), PLAN)
    generation(cached)
    step = only_program(cached).step
    assert takes_weights(step, "inductor")
    assert not takes_weights(step, backend)


def test_code_for_packed_weights_is_of_one_model() -> None:
    cached = graphcache.transform(with_packed_weight(model(0)), PLAN)
    generation(cached)
    assert not takes_weights(only_program(cached).step, "inductor")
