"""Roles of branches with several attentions, and of MLPs that start from the stream before the attention."""

import logging
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AuraFlowTransformer2DModel
from torch import Tensor, nn

import graphcache
from graphcache import Plan, presets
from modulated import DIM, Mlp
from reference import capture_call
from tests.analysis.test_streams import STEPS, calls, captured, replaced
from zoo.case import noise, randomise


class Mixed(nn.Module):
    """A branch that attends to its own stream and to two texts, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.text_k, self.text_v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        made: Tensor = self.out(self.attend(x, text))
        return made

    def attend(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v, text_k, text_v = self.q(x), self.k(x), self.v(x), self.text_k(text), self.text_v(text)
        match self.way:
            case "three":
                return attention(q, k, v) + attention(q, text_k, text_v) + attention(q, text_v, text_k)
            case "written out":
                return written_out(q, k, v) + written_out(q, text_k, text_v)
            case "keys joined":
                return attention(q, torch.cat([text_k, k], dim=1), torch.cat([text_v, v], dim=1))
            case "keys added":
                return attention(q, k + text_k.mean(dim=1, keepdim=True), v)
            case "text first":
                return attention(q, text_k, text_v) + attention(q, k, v)
            case "cross, written out":
                return written_out(q, text_k, text_v)
        return attention(q, text_k, text_v) + attention(q, text_v, text_k)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(1, 2) / DIM**0.5, dim=-1) @ v


class Reader(nn.Module):
    """Two blocks of a mixed branch and an MLP; the text is updated as well where it says so."""

    def __init__(self, way: str, updates: bool = False) -> None:
        super().__init__()
        self.attend = nn.ModuleList(Mixed(way) for _ in range(2))
        self.mlp = nn.ModuleList(Mlp() for _ in range(2))
        self.text = nn.ModuleList(Mixed(way) for _ in range(2)) if updates else None
        self.time = nn.Linear(1, DIM)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = x + self.time(timestep[:, None])[:, None]
        for i, (attend, mlp) in enumerate(zip(self.attend, self.mlp, strict=True)):
            h = x
            x = x + attend(F.layer_norm(h, (DIM,)), text)
            if self.text is not None:
                text = text + self.text[i](text, h)
            x = x + mlp(F.layer_norm(x, (DIM,)))
        return x


def roles(model: nn.Module) -> Counter[str]:
    found = captured(model.eval()).branches
    return Counter(branch.role + ".context" * branch.context for branch in found)


@pytest.mark.parametrize("way", ["three", "written out", "keys joined", "keys added", "text first"])
def test_attention_over_the_own_stream_decides(way: str) -> None:
    assert roles(Reader(way)) == {"self": 2, "mlp": 2}


@pytest.mark.parametrize("way", ["cross", "cross, written out"])
def test_only_a_branch_without_it_is_cross(way: str) -> None:
    assert roles(Reader(way)) == {"cross": 2, "mlp": 2}


def test_keys_joined_with_those_of_a_stream_are_joint() -> None:
    """The last text reaches nothing, so that one text is a site."""
    assert roles(Reader("keys joined", updates=True)) == {"joint": 2, "joint.context": 1, "mlp": 2}


def test_three_attentions_with_a_stream_of_text_are_self() -> None:
    assert roles(Reader("three", updates=True)) == {"self": 2, "self.context": 1, "mlp": 2}


def auraflow() -> Any:
    model = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pos_embed_max_size=16,
    )
    return randomise(model, 1)


def auraflow_calls() -> list[dict[str, Any]]:
    text = noise(2, 6, 24)
    return [
        {
            "hidden_states": noise(2, 4, 8, 8, seed=step),
            "encoder_hidden_states": text,
            "timestep": torch.full((2,), 1 - step / STEPS),
            "return_dict": False,
        }
        for step in range(STEPS)
    ]


def test_mlps_added_to_the_stream_before_the_attention_are_mlps() -> None:
    """Read off the source: `r + ff(norm(r + attention(r)))` in blocks of both kinds."""
    step = capture_call(auraflow(), auraflow_calls()[0], "timestep").step
    assert Counter(branch.role + ".context" * branch.context for branch in step.branches) == {
        "joint": 2,
        "joint.context": 2,
        "self": 2,
        "mlp": 4,
        "mlp.context": 2,
    }
    assert step.blocks == 4


def test_they_are_reused_as_hooks_reuse_them() -> None:
    model = auraflow()
    blocks = [*model.joint_transformer_blocks, *model.single_transformer_blocks]
    names = ("attn", "ff", "ff_context")
    modules = [getattr(block, name) for block in blocks for name in names if hasattr(block, name)]
    plan = presets.fora(STEPS, interval=2)
    with torch.no_grad():
        with replaced(modules, [action == "#" for action in plan.rows[0].actions]):
            expected = [model(**call) for call in auraflow_calls()]
        cached = graphcache.transform(model, plan)
        actual = [cached(**call) for call in auraflow_calls()]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class Widened(nn.Module):
    """Two blocks of which each attends to the text at ten times the width of its self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleList(Mixed("keys joined") for _ in range(2))
        self.q, self.out = nn.Linear(DIM, 10 * DIM), nn.Linear(10 * DIM, DIM)
        self.k, self.v = nn.Linear(DIM, 10 * DIM), nn.Linear(DIM, 10 * DIM)
        self.time = nn.Linear(1, DIM)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = x + self.time(timestep[:, None])[:, None]
        for own in self.own:
            x = x + own(F.layer_norm(x, (DIM,)), text[:, :1])
            x = x + self.out(attention(self.q(x), self.k(text), self.v(text)))
        return x


def warnings(model: nn.Module, plan: Plan, caplog: pytest.LogCaptureFixture) -> list[str]:
    cached = graphcache.transform(model.eval(), plan)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "graphcache"):
        for _ in range(2):
            for call in calls():
                cached(**call)
    return [message for message in caplog.messages if message.startswith("preset ")]


def test_a_preset_that_speaks_of_little_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    seen = graphcache.inspect(Widened().eval(), calls()[0])
    attended = sum(site.flops for site in seen.sites)
    own = sum(site.flops for site in seen.sites if site.role == "self")
    assert own < 0.5 * attended
    (text,) = warnings(Widened(), presets.fastercache(STEPS, guidance=False), caplog)
    assert text.startswith(
        f"preset fastercache speaks of {own / attended:.0%} of this model's attention FLOPs "
        f"({own / 1e6:.2f} of {attended / 1e6:.2f} MFLOPs a step)"
    )


@pytest.mark.parametrize("plan", [presets.fora(6), presets.pab(6), presets.taylorseer(6, lite=True)])
def test_a_preset_that_speaks_of_what_it_is_meant_for_says_nothing(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    """PAB leaves MLPs alone by its definition."""
    assert warnings(Reader("three"), plan, caplog) == []
    assert warnings(Widened(), plan, caplog) == []
