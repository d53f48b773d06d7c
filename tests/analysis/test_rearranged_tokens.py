"""Token budgets of branches that rearrange their values: each is computed rightly, or refused."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import Plan, PlanError
from graphcache.ir.history import History
from graphcache.ir.schedule import Selection
from graphcache.runtime.selection import SiteTokens
from reference_selection import chosen
from strategies import QUICK

ROWS, TOKENS, CHANNELS, BUDGET = 2, 6, 4, 3
Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rearrangement:
    """Moves from (rows, tokens, channels) to other shapes and, at last, back to that one."""

    names: tuple[str, ...]
    moves: tuple[Move, ...]

    def __call__(self, value: Tensor) -> Tensor:
        shape = value.shape
        for move in self.moves:
            value = move(value)
        return value.reshape(shape)


class Rearranging(nn.Module):
    """A stream to which one branch adds its own tokens, rearranged between two linear layers."""

    def __init__(self, rearrangement: Rearrangement) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.rearrangement = rearrangement

    def branch(self, x: Tensor) -> Tensor:
        return self.last(self.rearrangement(self.first(x)))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.branch(x)


def _numbers(shape: Sequence[int]) -> Tensor:
    return torch.arange(1.0, 1 + math.prod(shape)).view(*shape).sin()


def _twice_a_part(dim: int, at: int, swapped: bool) -> Move:
    def move(value: Tensor) -> Tensor:
        first, second = value.split([at, value.shape[dim] - at], dim)
        return torch.cat([second, 2 * first] if swapped else [2 * first, second], dim)

    return move


def _written(dim: int, at: int) -> Move:
    def move(value: Tensor) -> Tensor:
        made = value.clone()
        made.narrow(dim, at, value.shape[dim] - at).copy_(-value.narrow(dim, at, value.shape[dim] - at))
        return made

    return move


def _repeated(dim: int, inner: bool, last: bool) -> Move:
    def move(value: Tensor) -> Tensor:
        size = value.shape[dim]
        if inner:
            return value.repeat_interleave(2, dim).unflatten(dim, (size, 2)).select(dim + 1, int(last))
        counts = [2 if at == dim else 1 for at in range(value.dim())]
        return value.repeat(counts).narrow(dim, size * last, size)

    return move


def _in_pairs(value: Tensor) -> Tensor:
    pairs = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones(()), torch.ones(()))).flatten(-2)


def _tabled(value: Tensor, kept: Sequence[bool], dropped: int) -> Tensor:
    shape = [size if keep else 1 for size, keep in zip(value.shape, kept, strict=True)]
    return value * _numbers(shape[min(dropped, len(shape) - 1) :])


def _divisors(size: int) -> list[int]:
    return [part for part in range(1, size + 1) if size % part == 0]


@st.composite
def structural(draw: st.DrawFn, shape: Sequence[int]) -> tuple[str, Move, Move]:
    """A move that changes the shape alone, with the one that undoes it."""
    rank = len(shape)
    dims = st.integers(0, rank - 1)
    kind = draw(st.sampled_from(["split", "merge", "permute", "move", "swap", "mT", "insert", "stack"]))
    dim, other = draw(dims), draw(dims)
    if kind == "split" and rank < 6:
        part = draw(st.sampled_from(_divisors(shape[dim])))
        return (
            f"split {dim} {part}",
            lambda v: v.unflatten(dim, (-1, part)),
            lambda v: v.flatten(dim, dim + 1),
        )
    if kind == "merge" and dim + 1 < rank:
        sizes = tuple(shape[dim : dim + 2])
        return f"merge {dim}", lambda v: v.flatten(dim, dim + 1), lambda v: v.unflatten(dim, sizes)
    if kind == "permute":
        order = draw(st.permutations(range(rank)))
        back = [order.index(place) for place in range(rank)]
        return f"permute {order}", lambda v: v.permute(order), lambda v: v.permute(back)
    if kind == "move":
        return f"move {dim} {other}", lambda v: v.movedim(dim, other), lambda v: v.movedim(other, dim)
    if kind == "insert" and rank < 6:
        return f"insert {dim}", lambda v: v.unsqueeze(dim), lambda v: v.squeeze(dim)
    if kind == "stack":
        return (
            f"stack {dim} {other}",
            lambda v: torch.stack(v.unbind(dim), other),
            lambda v: torch.stack(v.unbind(other), dim),
        )
    if kind == "mT" and rank > 1:
        return "mT", lambda v: v.mT, lambda v: v.mT
    return f"swap {dim} {other}", lambda v: v.swapaxes(dim, other), lambda v: v.transpose(dim, other)


@st.composite
def local(draw: st.DrawFn, shape: Sequence[int]) -> tuple[str, Move]:
    """A move that keeps the shape: mostly of each entry's own, sometimes a mixture of several."""
    dim = draw(st.integers(0, len(shape) - 1))
    at, flag = draw(st.integers(0, shape[dim])), draw(st.booleans())
    kept = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    dropped = draw(st.integers(0, 2))
    known: dict[str, Move] = {
        "table": lambda v: _tabled(v, kept, dropped),
        "table of all": lambda v: _tabled(v, [True] * len(shape), 0),
        "part": _twice_a_part(dim, at, False),
        "swapped": _twice_a_part(dim, at, flag),
        "written": _written(dim, at),
        "repeated": _repeated(dim, flag, draw(st.booleans())),
        "expanded": lambda v: v.unsqueeze(dim).expand(*v.shape[:dim], 3, *v.shape[dim:]).select(dim, 1),
        "padded": lambda v: nn.functional.pad(v, (0, 0) * (v.dim() - 1 - dim) + (2, 1)).narrow(
            dim, 2, v.shape[dim]
        ),
        "pairs": _in_pairs if shape[-1] % 2 == 0 else torch.neg,
        "summed": lambda v: torch.stack([v, v.flip(-1)], 0).sum(0),
        "mixed": lambda v: v @ _numbers((shape[-1], shape[-1])),
        "normed": lambda v: v.softmax(dim),
        "mean": lambda v: v + v.mean(dim, keepdim=True),
        "rolled": lambda v: v.roll(1, dim),
        "flipped": lambda v: v.flip(dim),
    }
    name = draw(st.sampled_from(list(known)))
    return f"{name} {dim} {at} {flag} {kept} {dropped}", known[name]


@st.composite
def rearrangements(draw: st.DrawFn) -> Rearrangement:
    names, moves, undone = list[str](), list[Move](), list[Move]()
    value = torch.zeros(ROWS, TOKENS, CHANNELS)
    for _ in range(draw(st.integers(1, 5))):
        name, move, back = draw(structural(tuple(value.shape)))
        names.append(name)
        moves.append(move)
        undone.insert(0, back)
        value = move(value)
        if draw(st.booleans()):
            name, move = draw(local(tuple(value.shape)))
            names.append(name)
            moves.append(move)
    if draw(st.integers(0, 3)):
        moves += undone
    else:
        names.append("left as it is")
    return Rearrangement(tuple(names), tuple(moves))


def owners(model: Rearranging, x: Tensor) -> Tensor | None:
    """Of each entry of the branch the token that it is made of, -1 for none; None where several are."""
    whole = model.branch(x)
    found = torch.full(whole.shape, -1)
    for token in range(ROWS * TOKENS):
        other = x.clone().view(ROWS * TOKENS, CHANNELS)
        other[token] += torch.linspace(0.5, 1.5, CHANNELS)
        changed = model.branch(other.view_as(x)) != whole
        if bool((found[changed] >= 0).any()):
            return None
        found[changed] = token
    return found


def places(letter: str) -> Tensor:
    """The tokens that step 1 computes, row by row."""
    plan = Plan.parse(f"plan steps=2\n{letter}\n* #a")
    selection = Selection(History("x"), ((1, plan.letters[0]),), 2)
    tokens = SiteTokens(ROWS, TOKENS, torch.device("cpu"))
    return chosen(selection, tokens, 0, 0, torch.empty(0))[1].places


def check(rearrangement: Rearrangement) -> bool:
    """Whether the budget was taken; what it computed is compared with what each entry is made of."""
    torch.manual_seed(0)
    model = Rearranging(rearrangement).eval()
    x, later = torch.randn(2, ROWS, TOKENS, CHANNELS)
    letter = f"a = tokens {BUDGET} by random multiple=1"
    planned = graphcache.transform(model, Plan.parse(f"plan steps=2\n{letter}\n* #a"))
    try:
        planned(x=x, timestep=torch.tensor(1.0))
    except PlanError:
        return False
    ours = planned(x=later, timestep=torch.tensor(0.5))
    whole = owners(model, x)
    assert whole is not None, f"tokens are mixed by {rearrangement.names}"
    chosen_ones = torch.zeros(ROWS, TOKENS, dtype=torch.bool).scatter(1, places(letter), True).flatten()
    fresh = chosen_ones[whole.clamp(min=0)] & (whole >= 0)
    expected = later + torch.where(fresh, model.branch(later), model.branch(x))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6, msg=str(rearrangement.names))
    return True


def test_random_rearrangements_are_followed_rightly_or_refused() -> None:
    taken = list[bool]()

    @settings(QUICK, max_examples=20)
    @given(rearrangements())
    def run(rearrangement: Rearrangement) -> None:
        taken.append(check(rearrangement))

    with torch.no_grad():
        run()
    assert sum(taken) >= 5
