"""Models whose weights are quantised by the libraries that diffusers takes, and by its layerwise casting.

Each is held against itself, against the reference interpreter, and against the plain model, whose sites and
work it has.
"""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphcache
from afar import in_groups
from graphcache import CaptureError, GraphCacheError, Plan, PlanError, Profile, presets
from graphcache.compiler.flat import weights_of
from graphcache.compiler.program import Program
from graphcache.ir.graph import value_of
from inside import only_program
from reference import Reference, assert_same, capture_call, runner_tensors
from seeding import own_numbers
from zoo.case import noise, randomise

FORA = presets.fora(4, interval=2)
TOKENS = Plan.parse("plan steps=4 preset=none\na = tokens 0.4 by random multiple=1\n@mlp #a#a\n")
WIDTH = 64


def plain() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=WIDTH,
            sample_size=8,
            patch_size=2,
            caption_channels=WIDTH,
        )
    return randomise(model, 3).requires_grad_(False)


def torchao(config: str, **options: Any) -> Callable[[Any], None]:
    def quantise(model: nn.Module) -> None:
        quantization = pytest.importorskip("torchao.quantization", reason="needs the extra 'quantized'")
        quantization.quantize_(model, getattr(quantization, config)(**options))

    return quantise


def quanto(kind: str) -> Callable[[Any], None]:
    def quantise(model: nn.Module) -> None:
        library = pytest.importorskip("optimum.quanto", reason="needs the extra 'quantized'")
        library.quantize(model, weights=library.qtypes[kind])
        library.freeze(model)

    return quantise


def bitsandbytes(kind: str, **options: Any) -> Callable[[Any], None]:
    def quantise(model: nn.Module) -> None:
        library = pytest.importorskip("bitsandbytes", reason="needs the extra 'quantized'")
        layers = [(path, layer) for path, layer in model.named_modules() if type(layer) is nn.Linear]
        for path, layer in layers:
            if layer.out_features % WIDTH == 0 and layer.in_features % WIDTH == 0:
                made = getattr(library.nn, kind)(layer.in_features, layer.out_features, **options)
                made.load_state_dict(layer.state_dict())
                outer, _, name = path.rpartition(".")
                setattr(model.get_submodule(outer), name, made.to("cpu").requires_grad_(False))

    return quantise


def layerwise(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


TRACED: dict[str, Callable[[Any], None]] = {
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8 with activations": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "torchao int4": torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "quanto int8": quanto("qint8"),
    "quanto int4": quanto("qint4"),
    "quanto float8": quanto("qfloat8"),
    "layerwise casting": layerwise,
}
CALLED: dict[str, Callable[[Any], None]] = {
    "bitsandbytes int8": bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes nf4": bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
}
LAYERS = 15
"""Linear layers of the model that bitsandbytes replaces."""
ROUNDING = "torchao int8 with activations"


def among(*names: str) -> Callable[[Any], Any]:
    """A test of one way in each run."""
    return lambda test: pytest.mark.few(1)(pytest.mark.parametrize("name", names)(test))


@functools.cache
@own_numbers
def quantised(name: str) -> Any:
    model = plain()
    (TRACED | CALLED)[name](model)
    generation(model.eval())  # bitsandbytes packs in the first call
    return model


def fixed(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    sizes = {"resolution": None, "aspect_ratio": None}
    texts = {"encoder_hidden_states": noise(1, 6, WIDTH).to(dtype), "added_cond_kwargs": sizes}
    return {**texts, "return_dict": False}


def moving(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    time = torch.tensor([999 - 200 * step])
    return {"hidden_states": noise(1, 4, 8, 8, seed=step).to(dtype), "timestep": time}


def generation(model: Any) -> list[Tensor]:
    given = fixed()
    with torch.no_grad():
        return [model(**given, **moving(step))[0] for step in range(4)]


def by_reference(cached: Any, plan: Plan) -> list[Tensor]:
    given, run = fixed(), Reference(only_program(cached).captured, plan)
    with torch.no_grad():
        return [run(runner_tensors(cached, given | moving(step)))[0] for step in range(4)]


@functools.cache
def under_fora(name: str) -> Any:
    """A model under a plan, run once."""
    cached = graphcache.transform(quantised(name) if name else plain(), FORA)
    generation(cached)
    return cached


@among(*TRACED, *CALLED)
def test_results_are_the_quantised_models(name: str) -> None:
    model, cached = quantised(name), under_fora(name)
    results = generation(cached)
    assert_same(results[::2], generation(model)[::2])
    assert_same(results, by_reference(cached, FORA))
    assert len(only_program(cached).step.opaque) == (LAYERS if name in CALLED else 0)


@among(*TRACED, *CALLED)
def test_sites_work_and_fingerprint_are_the_plain_models(name: str) -> None:
    ours, theirs = only_program(under_fora(name)), only_program(under_fora(""))
    assert [(b.name, b.role) for b in ours.step.branches] == [(b.name, b.role) for b in theirs.step.branches]
    assert ours.plain_flops == theirs.plain_flops
    assert ours.fingerprint == theirs.fingerprint


def hoisted_matrices(model: Any) -> list[tuple[int, ...]]:
    """Of what is kept for a generation, the matrices as large as weights, where a model runs in bfloat16."""
    step = capture_call(model, fixed(torch.bfloat16) | moving(0, torch.bfloat16), "timestep")
    prologue = Program(step, None).prologue
    assert prologue is not None
    layers = [layer for layer in plain().modules() if isinstance(layer, nn.Linear)]
    sizes = {layer.weight.numel() for layer in layers} - {6 * WIDTH}  # the text has as many
    shapes = [value_of(node).shape for node in prologue.step.results()]
    return [tuple(shape) for shape in shapes if shape.numel() in sizes]


@among("torchao int8", "quanto int8", "layerwise casting")
def test_weights_stay_packed(name: str) -> None:
    model = plain().to(torch.bfloat16)
    if name == "layerwise casting":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    else:
        TRACED[name](model)
    assert hoisted_matrices(model) == []


def test_casting_leaves_weights_in_eight_bits() -> None:
    cached = under_fora("layerwise casting")
    plan = generation(cached)
    weight = cached.transformer_blocks[0].attn1.to_q.weight
    assert weight.dtype == torch.float8_e4m3fn
    held = {id(value) for value in weights_of(only_program(cached).step).values()}
    assert id(weight) in held
    assert_same(generation(cached), plan)


@among(ROUNDING, "quanto int8")
def test_token_budgets_go_through_quantised_layers(name: str) -> None:
    cached = graphcache.transform(quantised(name), TOKENS)
    torch.testing.assert_close(generation(cached), by_reference(cached, TOKENS), atol=1e-4, rtol=1e-4)


def test_token_budgets_refuse_called_layers() -> None:
    with pytest.raises(PlanError, match=r"calls module 'transformer_blocks\.0\.ff.*not traced"):
        generation(graphcache.transform(quantised("bitsandbytes int8"), TOKENS))


@among("torchao int8", "quanto int8", "layerwise casting", "bitsandbytes nf4")
def test_phases_are_compiled_as_whole_graphs(name: str) -> None:
    cached = graphcache.transform(quantised(name), FORA, backend="aot_eager")
    torch.testing.assert_close(generation(cached), generation(under_fora(name)), atol=1e-4, rtol=1e-4)
    assert only_program(cached).graphs == 2


@among("torchao int8", "quanto int8", "layerwise casting", "bitsandbytes int8")
def test_gradients_are_the_quantised_models(name: str) -> None:
    def gradient(model: Any) -> Tensor:
        given = fixed() | moving(1)
        latents = given["hidden_states"].requires_grad_()
        (found,) = torch.autograd.grad(model(**given)[0].square().sum(), latents)
        return found

    model = quantised(name)
    cached = graphcache.transform(model, presets.compute(1))
    torch.testing.assert_close(gradient(cached), gradient(model), rtol=1e-5, atol=1e-6)


class Sampler:
    """Three steps of Euler's."""

    def __call__(self, model: Any, seed: int, steps: int) -> Tensor:
        given, latents = fixed(), noise(1, 4, 8, 8, seed=seed)
        for step in range(steps):
            time = torch.tensor([999 - 200 * step])
            result = model(hidden_states=latents, timestep=time, **given)[0]
            latents = latents - result[:, :4] / steps
        return latents


def with_values_of(model: Any) -> Any:
    """The plain model with the weights that a quantised one stands for."""
    made = plain()
    for path, weight in made.named_parameters():
        packed = model.get_parameter(path)
        values = packed.dequantize() if hasattr(packed, "__tensor_flatten__") else packed.to(weight.dtype)
        weight.copy_(values.detach())
    return made


@among("torchao int8", "quanto int8", "layerwise casting")
def test_a_profile_is_that_of_the_weights_values(name: str) -> None:
    def profiled(model: Any) -> Profile:
        return graphcache.profile(model, [1], steps=3, sampler=Sampler(), detail="sites", probes=1)

    model = quantised(name)
    ours, theirs = profiled(model), profiled(with_values_of(model))
    np.testing.assert_allclose(ours.gram, theirs.gram, rtol=1e-3)
    scale = np.abs(theirs.effects).max()
    np.testing.assert_allclose(ours.effects, theirs.effects, rtol=1e-3, atol=1e-4 * scale)


def test_plans_are_tuned_on_quantised_weights() -> None:
    plan = graphcache.with_corrections(FORA)
    tuned = graphcache.tune(quantised("torchao int8"), plan, [1], [2], sampler=Sampler(), iterations=2)
    assert tuned.after >= tuned.before


MEASURES: dict[str, Callable[[Any], Any]] = {
    "profile": lambda model: graphcache.profile(model, [1], steps=3, sampler=Sampler()),
    "tune": lambda model: graphcache.tune(
        model, graphcache.with_corrections(FORA), [1], [2], sampler=Sampler(), iterations=1
    ),
}


@among(*MEASURES)
def test_gradients_through_rounded_activations_are_refused(name: str) -> None:
    with pytest.raises(GraphCacheError, match=r"rounds its activations.*before it is quantised"):
        MEASURES[name](quantised(ROUNDING))


@pytest.mark.parametrize("streams", [False, True])
def test_packed_weights_kept_elsewhere_are_refused(streams: bool) -> None:
    model = plain()
    torchao("Int8WeightOnlyConfig")(model)
    if not streams:
        in_groups("leaf_level")(model)
    with pytest.raises(CaptureError, match=r"is offloaded and a Int8Tensor.*offload the whole model"):
        generation(graphcache.transform(model, FORA, stream_weights=streams))


def test_cast_weights_are_kept_elsewhere() -> None:
    model = plain()
    layerwise(model)
    in_groups("leaf_level")(model)
    cached = graphcache.transform(model, FORA)
    assert_same(generation(cached), generation(under_fora("layerwise casting")))
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn


def scaled(weight: Any) -> None:
    weight.scale = weight.scale * 2


CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "quantised": (TRACED["torchao int8"], True),
    "another scale": (lambda model: scaled(model.transformer_blocks[0].ff.net[2].weight), True),
    "cast and back": (lambda model: model.to(torch.bfloat16).to(torch.float32), True),
    "in place": (lambda model: model.transformer_blocks[0].ff.net[2].weight.qdata.neg_(), False),
}


def test_what_is_done_to_weights_afterwards_is_seen() -> None:
    model = plain()
    cached = graphcache.transform(model, presets.compute(4))
    generation(cached)
    for change, is_captured in CHANGES.values():
        before, results = only_program(cached).captured, generation(cached)
        change(model)
        expected = generation(model)
        assert not torch.equal(expected[0], results[0])
        assert_same(generation(cached), expected)
        assert (only_program(cached).captured is not before) == is_captured
