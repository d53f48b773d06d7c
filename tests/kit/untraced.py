"""A small diffusion transformer with any module in the place of its MLPs, such as one that is not traced."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcache import Plan
from inside import programs_of
from reference import Reference
from seeding import numbers_of

DIM = 8


class Experts(nn.Module):
    """Each token goes through two experts, which its gate chooses: how many each has depends on values."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, count, bias=False)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.gate(rows).softmax(-1).topk(2)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, rank = torch.nonzero(chosen == number, as_tuple=True)
            if row.numel():
                total = total.index_add(0, row, expert(rows[row]).tanh() * weights[row, rank, None])
        return total.view_as(x)


class Asking(nn.Module):
    """An MLP; `asks` makes it look at values, to no effect."""

    def __init__(self, asks: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        if self.asks and bool(x.isnan().any()):
            return torch.zeros_like(x)
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class Largest(nn.Module):
    """Says a number that depends on values, and so cannot be called by itself."""

    def forward(self, x: Tensor) -> float:
        return x.abs().max().item() if x.isfinite().all() else 1.0


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.inner = inner

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v))
        return x + gate * self.inner(self.norm(x))


class Transformer(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], depth: int) -> None:
        super().__init__()
        self.time = nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(Block(make()) for _ in range(depth))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        gate = self.time(timestep[:, None])[:, None].tanh()
        for block in self.blocks:
            x = block(x, gate)
        return x


def holding(make: Callable[[], nn.Module] = Experts, depth: int = 2) -> Transformer:
    """A model with the same weights every time, in eval mode."""
    with numbers_of(f"untraced {depth}"):
        return Transformer(make, depth).eval()


def arguments(step: int = 0, tokens: int = 5) -> dict[str, Any]:
    """One call's arguments, newly built, others at every step and for other numbers of tokens."""
    made = torch.Generator().manual_seed(100 * tokens + step)
    return {"x": torch.randn(2, tokens, DIM, generator=made), "timestep": torch.full((2,), 1 - step / 8)}


def generation(model: Any, steps: int = 4, tokens: int = 5) -> list[Tensor]:
    return [model(**arguments(step, tokens)) for step in range(steps)]


def by_reference(cached: Any, plan: Plan, tokens: int = 5) -> Sequence[Tensor]:
    """What the reference interpreter makes of a generation, with the capture that was made or used last."""
    run = Reference(programs_of(cached)[-1].captured, plan)
    return [run([*arguments(step, tokens).values()]) for step in range(plan.steps)]
