"""A text stream whose rows are put together of a part of itself and another layer of the text encoder."""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference import capture_call

DIM = 4


class Joint(nn.Module):
    """Text and image attend to each other, and each has an MLP of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM)) for _ in range(2)
        )

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(F.layer_norm(torch.cat([text, x], dim=1), (DIM,))).chunk(3, dim=-1)
        mixed = self.out(F.scaled_dot_product_attention(q, k, v))
        text, x = text + mixed[:, : text.shape[1]], x + mixed[:, text.shape[1] :]
        return x + self.mlps[0](x), text + self.mlps[1](text)


class Layered(nn.Module):
    """Before each block one half of the text's channels is taken from the next layer of its encoder."""

    def __init__(self, newest: bool) -> None:
        super().__init__()
        self.newest = newest
        self.time = nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(Joint() for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, layers: list[Tensor]) -> Tensor:
        stream = x + self.time(timestep[:, None])[:, None]
        for block, layer in zip(self.blocks, layers, strict=True):
            half = stream[:, : text.shape[1], : DIM // 2] if self.newest else layer
            text = torch.cat([text[..., : DIM // 2], half], dim=-1)
            stream, text = block(stream, text)
        return stream + text.mean(1, keepdim=True)


def roles(newest: bool) -> Counter[str]:
    model = Layered(newest).eval()
    call: dict[str, Any] = {
        "x": torch.randn(2, 5, DIM),
        "timestep": torch.ones(2),
        "text": torch.randn(2, 3, DIM),
        "layers": [torch.randn(2, 3, DIM // 2) for _ in range(3)],
    }
    branches = capture_call(model, call, "timestep").step.branches
    return Counter(branch.role + ".context" * branch.context for branch in branches)


def test_rows_of_text_alone_are_text() -> None:
    assert roles(newest=False) == {"joint": 3, "joint.context": 3, "mlp": 3, "mlp.context": 3}


def test_rows_into_which_the_latents_are_put_are_none() -> None:
    found = roles(newest=True)
    assert found["joint.context"] < 3
    assert found["mlp.context"] < 3
