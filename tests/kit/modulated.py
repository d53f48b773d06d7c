"""Transformers with all that may pose as a residual stream, and with a known number of true branches."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

DIM, TOKENS, TEXT = 8, 5, 3
FORMS = (
    "add", "swapped", "alpha", "addcmul", "in place", "subtracted", "blended", "blended by gate"
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a model adds to what; none of it changes how many branches it has, but `text` and `blocks`."""

    blocks: int = 3
    modulation: str = "vector"
    shared: bool = True
    table: bool = False
    positions: str = "once"
    time: str = "none"
    bias: bool = False
    constant: bool = False
    embedding: str = "none"
    token: str = "none"
    form: str = "add"
    again: bool = False
    first: str = "none"
    text: bool = False

    @property
    def roles(self) -> dict[str, int]:
        kinds = ("self", "cross", "mlp") if self.text else ("self", "mlp")
        return dict.fromkeys(kinds, self.blocks)


recipes = st.builds(
    Recipe,
    blocks=st.integers(2, 3),
    modulation=st.sampled_from(["none", "vector", "expanded", "tokens", "addcmul", "filled", "filled like"]),
    shared=st.booleans(),
    table=st.booleans(),
    positions=st.sampled_from(["none", "once", "each", "normed", "inside"]),
    time=st.sampled_from(["none", "added", "expanded", "full", "normed"]),
    bias=st.booleans(),
    constant=st.booleans(),
    embedding=st.sampled_from(["none", "once", "each", "latent"]),
    token=st.sampled_from(["none", "time", "register"]),
    form=st.sampled_from(FORMS),
    again=st.booleans(),
    first=st.sampled_from(["none", "each", "inside"]),
    text=st.booleans(),
).filter(
    lambda recipe: (
        (recipe.embedding, recipe.first) != ("latent", "inside") or recipe.time not in ("expanded", "full")
    )
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(y), self.v(y)))


class Mlp(nn.Module):
    def __init__(self, inner: int = 2 * DIM) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, inner), nn.Linear(inner, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


@dataclass
class Extras:
    """What blocks share: the embedding, what is made of it, positions, and what the stream began with."""

    embedding: Tensor
    modulation: Tensor
    positions: Tensor
    time: Tensor
    text: Tensor
    first: Tensor


class Block(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.attention, self.mlp = Attention(), Mlp()
        self.cross = Attention() if recipe.text else None
        self.modulation = nn.Linear(DIM, 3 * DIM)
        self.update = Mlp()
        self.table = nn.Parameter(torch.randn(3, DIM))
        self.bias = nn.Parameter(torch.randn(DIM))
        self.constant = nn.Parameter(torch.randn(1, 1, DIM))

    def forward(self, x: Tensor, extras: Extras) -> Tensor:
        recipe = self.recipe
        if recipe.embedding == "each":
            extras.embedding = extras.embedding + self.update(extras.embedding)
        made = extras.modulation if recipe.shared else modulation(recipe, self.modulation, extras, x)
        if recipe.table:
            made = made + self.table.flatten()
        shift, scale, gate = made.chunk(3, dim=-1)
        if recipe.positions == "each":
            x = x + extras.positions
        if recipe.time in ("added", "expanded", "full"):
            x = x + extras.time
        if recipe.constant:
            x = x + gate * self.constant
        if recipe.first == "each":
            x = x + extras.first
        h = self.normed(x, shift, scale, extras)
        x = self.joined(x, gate, self.dressed(self.attention(h, h), extras))
        if self.cross is not None:
            x = x + self.cross(x, extras.text)
        h = self.normed(x, shift, scale, extras)
        return self.joined(x, gate, self.dressed(self.mlp(h), extras))

    def normed(self, x: Tensor, shift: Tensor, scale: Tensor, extras: Extras) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:])
        if self.recipe.modulation == "addcmul":
            h = torch.addcmul(shift, h, 1 + scale)
        elif self.recipe.modulation != "none":
            h = (1 + scale) * h + shift
        if self.recipe.positions == "normed":
            h = extras.positions + h
        if self.recipe.time == "normed":
            h = h + extras.time
        return h

    def dressed(self, branch: Tensor, extras: Extras) -> Tensor:
        """What the branch produced, with what is added to it before the gate."""
        if self.recipe.bias:
            branch = branch + self.bias
        if self.recipe.positions == "inside":
            branch = branch + extras.positions
        if self.recipe.first == "inside":
            branch = branch + extras.first
        return branch

    def joined(self, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        match self.recipe.form:
            case "swapped":
                return gate * branch + x
            case "alpha":
                return torch.add(x, gate * branch, alpha=0.5)
            case "addcmul":
                return torch.addcmul(x, gate.expand_as(branch), branch)
            case "subtracted":
                return x - gate * branch
            case "blended":
                return torch.lerp(x, gate * branch, 0.3)
            case "blended by gate":
                return torch.lerp(x, branch, gate.expand_as(branch))
            case "in place":
                x = x.clone()
                x += gate * branch
                return x
        return x + gate * branch


def modulation(recipe: Recipe, layer: nn.Linear, extras: Extras, x: Tensor) -> Tensor:
    made: Tensor = layer(F.silu(extras.embedding))[:, None]
    match recipe.modulation:
        case "expanded":
            return made.expand(-1, x.shape[1], -1)
        case "tokens":
            return made + extras.positions.repeat(1, 1, 3)
        case "filled":
            return made + torch.zeros(x.shape).repeat(1, 1, 3)
        case "filled like":
            return made + torch.zeros_like(x).repeat(1, 1, 3)
    return made


class Modulated(nn.Module):
    """Tokens (batch, 5, 8), one time a sample and text (batch, 3, 8)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.time = nn.Sequential(nn.Linear(1, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.embed, self.pool, self.unembed = (nn.Linear(DIM, DIM) for _ in range(3))
        self.update = Mlp()
        self.modulation = nn.Linear(DIM, 3 * DIM)
        self.positions = nn.Parameter(torch.randn(1, TOKENS + (recipe.token != "none"), DIM))
        self.register = nn.Parameter(torch.randn(1, 1, DIM))
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.blocks))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        recipe = self.recipe
        embedding = self.time(timestep[:, None])
        if recipe.embedding == "latent":
            embedding = embedding + self.pool(x.mean(dim=1))
        if recipe.embedding in ("once", "latent"):
            embedding = embedding + self.update(embedding)
        x = self.embed(x)
        if recipe.token == "time":
            x = torch.cat([embedding[:, None], x], dim=1)
        elif recipe.token == "register":
            x = torch.cat([self.register.expand(x.shape[0], -1, -1), x], dim=1)
        if recipe.positions != "none":
            x = x + self.positions
        time = embedding[:, None]
        if recipe.time == "expanded":
            time = time.expand(-1, x.shape[1], -1)
        elif recipe.time == "full":
            time = time + self.positions
        extras = Extras(embedding, time, self.positions, time, text, x)
        extras.modulation = modulation(recipe, self.modulation, extras, x)
        for block in self.blocks:
            x = block(x, extras)
        if recipe.again:
            x = x + extras.first
        return self.unembed(F.layer_norm(x, x.shape[-1:]))[:, -TOKENS:]
