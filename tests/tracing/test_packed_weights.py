"""Weights that are packed in tensors of a class of their own: what unpacks them is called as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, presets
from graphcache.ir.graph import value_of
from inside import only_program
from reference import Reference, assert_same, capture_call, runner_tensors
from seeding import numbers_of
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


def written(model: nn.Module, path: Path, kind: Any) -> None:
    """A GGUF file with the model's weights, those of linear layers packed."""
    import gguf

    writer = gguf.GGUFWriter(path, "tiny")
    for name, weight in model.state_dict().items():
        if weight.dim() == 2 and weight.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_in_gguf(tmp_path: Path) -> None:
    """Results are the loaded model's; sites, work and what is hoisted those of one with plain weights."""
    gguf = pytest.importorskip("gguf")
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    with numbers_of("gguf"):
        plain = FluxTransformer2DModel(
            patch_size=1,
            in_channels=32,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ).eval()
        fixed = {
            "encoder_hidden_states": torch.randn(1, 3, 32),
            "pooled_projections": torch.randn(1, 32),
            "img_ids": torch.zeros(6, 3),
            "txt_ids": torch.zeros(3, 3),
            "return_dict": False,
        }
        latents = [torch.randn(1, 6, 32) for _ in range(4)]
    written(plain, tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q4_0)
    plain.save_config(tmp_path)
    model = FluxTransformer2DModel.from_single_file(
        tmp_path / "model.gguf",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(tmp_path),
    ).eval()
    cached = graphcache.transform(model, FORA)
    given = [{"hidden_states": x, "timestep": torch.tensor([1 - i / 8])} for i, x in enumerate(latents)]
    with torch.no_grad():
        results = [cached(**kwargs, **fixed)[0] for kwargs in given]
        assert_same(results[::2], [model(**kwargs, **fixed)[0] for kwargs in given[::2]])
        program = only_program(cached)
        run = Reference(program.captured, FORA)
        expected = [run(runner_tensors(model, {**kwargs, **fixed}))[0] for kwargs in given]
        assert_same(results, expected)
    assert len(program.step.opaque) == 28
    ours, theirs = (graphcache.inspect(item, {**given[0], **fixed}) for item in (model, plain))
    assert ours.sites == theirs.sites
    assert (ours.flops, ours.hoisted_flops) == (theirs.flops, theirs.hoisted_flops)
    hoisted = [value_of(node).shape for node in program.prologue.step.results()]
    assert (1, 3, 32) in hoisted
    matrices = {weight.shape for weight in plain.parameters() if weight.dim() == 2}
    assert matrices.isdisjoint(hoisted), "weights stay packed"
