"""The smallest diffusion transformer worth a test: its whole graph can be read, and captured in no time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TinyBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 2 * dim, bias=False)
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        q, k, v = self.qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, dim=-1)
        x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.down(F.gelu(self.up(x)))


class TinyDiT(nn.Module):
    """Tokens (batch, any number, dim), one time per sample and one text vector per sample."""

    def __init__(self, depth: int = 1, dim: int = 4) -> None:
        super().__init__()
        self.time = nn.Linear(1, dim, bias=False)
        self.text = nn.Linear(dim, dim, bias=False)
        self.blocks = nn.ModuleList(TinyBlock(dim) for _ in range(depth))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        gate = (self.time(timestep[:, None]) + self.text(text))[:, None]
        for block in self.blocks:
            x = block(x, gate)
        return x


def tiny(depth: int = 1, kind: type[TinyDiT] = TinyDiT) -> TinyDiT:
    """A model with fixed weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(depth)
        return kind(depth).eval()


def arguments(t: float = 1.0, batch: int = 2, tokens: int = 3) -> dict[str, Any]:
    """One call's arguments, newly built, the same for the same shapes."""
    made = torch.Generator().manual_seed(batch)
    return {
        "x": torch.randn(batch, tokens, 4, generator=made),
        "timestep": torch.full((batch,), t),
        "text": torch.randn(batch, 4, generator=made),
    }
