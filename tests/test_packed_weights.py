"""Weights that are packed in tensors of a class of their own: what unpacks them is called as it is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, presets
from reference import Reference, assert_same, capture_call
from seeding import numbers_of
from tiny import TinyDiT
from untraced import DIM, Transformer, arguments, generation, holding

FORA = presets.fora(4, interval=2)


class Scaled(nn.Parameter):
    """Whole numbers that stand for others: `scale` says for which."""

    scale: Tensor

    @staticmethod
    def of(values: Tensor) -> "Scaled":
        scale = values.abs().max() / 127
        made = torch.Tensor._make_subclass(Scaled, (values / scale).round(), False)
        made.scale = scale
        return made  # type: ignore[return-value]


def unpacked(weight: Tensor) -> Tensor:
    """The weight's values; of a plain tensor these are its own, which is what tracing would take them for."""
    return weight.as_subclass(Tensor) * getattr(weight, "scale", 1)


class ScaledLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = Scaled.of(torch.randn(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x @ unpacked(self.weight)


class Around(nn.Module):
    """Reads its inner module's weight by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ScaledLinear()

    def forward(self, x: Tensor) -> Tensor:
        return x @ unpacked(self.inner.weight)


class AroundMadePlain(Around):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight
        return x @ (torch.Tensor._make_subclass(Tensor, weight) * getattr(weight, "scale", 1))


class Reading(Transformer):
    """Reads a packed weight in its own forward."""

    def __init__(self) -> None:
        super().__init__(nn.Identity, 1)
        self.inner = ScaledLinear()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        weight = self.inner.weight
        return super().forward(x, timestep) @ (weight * getattr(weight, "scale", 1))


@pytest.mark.parametrize("make", [ScaledLinear, Around, AroundMadePlain])
def test_what_a_class_of_tensors_knows_is_not_lost(make: type[nn.Module]) -> None:
    model = holding(make, 1)
    exact = graphcache.transform(model, presets.compute(4))
    with torch.no_grad():
        assert_same(generation(exact), generation(model))
    (call,) = capture_call(model, arguments(), "timestep").step.opaque
    assert call.place == "blocks.0.inner"


def test_a_model_that_unpacks_weights_in_its_own_forward_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"the model reads 'model\.inner\.weight', a Scaled"):
        graphcache.transform(Reading().eval(), FORA)(**arguments())


def packed(model: nn.Module, kind: Any) -> nn.Module:
    """The model with its linear layers as diffusers loads them from a GGUF file."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, nn.Linear) and part.in_features % 32 == 0:
                made = GGUFLinear(
                    part.in_features, part.out_features, part.bias is not None, compute_dtype=torch.float32
                )
                values = torch.from_numpy(gguf.quants.quantize(part.weight.detach().numpy(), kind))
                made.weight, made.bias = GGUFParameter(values, quant_type=kind), part.bias
                setattr(module, name, made)
    return model


def call(step: int, text: Tensor) -> dict[str, Any]:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(step))
    return {"x": x, "timestep": torch.full((2,), 1 - step / 8), "text": text}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_weights_in_gguf(kind: str) -> None:
    """Results, sites, work and what is hoisted are those of a model with plain weights."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("diffusers")
    with numbers_of("gguf"):
        plain, model, text = TinyDiT(1, 32).eval(), TinyDiT(1, 32), torch.randn(2, 32)
    model = packed(model, gguf.GGMLQuantizationType[kind]).eval()
    cached = graphcache.transform(model, FORA)
    with torch.no_grad():
        given = [call(step, text) for step in range(4)]
        results = [cached(**kwargs) for kwargs in given]
        captured = capture_call(model, given[0], "timestep")
        run = Reference(captured, FORA)
        assert_same(results, [run([*kwargs.values()]) for kwargs in given])
        assert_same(results[::2], [model(**kwargs) for kwargs in given[::2]])
    assert len(captured.step.opaque) == 5
    ours, theirs = (graphcache.inspect(item, given[0]) for item in (model, plain))
    assert ours.sites == theirs.sites
    assert (ours.flops, ours.hoisted_flops) == (theirs.flops, theirs.hoisted_flops)
    prologue = next(iter(cached._graphcache.programs.values())).prologue
    assert [node.meta["val"].shape for node in prologue.step.results()] == [(2, 32)], "no unpacked weight"
