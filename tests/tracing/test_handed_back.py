"""What forward gives its caller besides tensors, and what it does to what the caller gave it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, presets

pytestmark = pytest.mark.usefixtures("captured_anew")

WIDTH = 4
Give = Callable[[Tensor, Tensor], Any]


class Network(nn.Module):
    """Gives its result and its keys in the form that it was made with; adds what it is given."""

    def __init__(self, give: Give) -> None:
        super().__init__()
        self.give = give
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, timestep: Tensor, kept: Any = None) -> Any:
        x = x * timestep[:, None, None]
        keys = self.layer(torch.tanh(x))
        x = x + keys
        if kept is not None:
            x = x + self.read(kept)
        return self.give(x, keys)

    def read(self, kept: Any) -> Tensor:
        result: Tensor = kept
        return result


def made(give: Give, kind: type[Network] = Network) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(give).eval()


def arguments(time: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(2, 3, WIDTH, generator=generator), "timestep": torch.full((2,), time)}


class Kept:
    """Keys as an object keeps them of which nobody can say what it holds."""

    __slots__ = ("keys",)

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


@dataclasses.dataclass
class Record:
    keys: Tensor
    length: int = 3


class Pair(NamedTuple):
    sample: Tensor
    keys: Tensor


@dataclasses.dataclass
class Output(BaseOutput):  # type: ignore[misc]
    sample: Tensor
    features: Tensor | None = None


def attempt(model: nn.Module, **changes: Any) -> Any:
    with torch.no_grad():
        return graphcache.transform(model, presets.compute(2))(**arguments(), **changes)


@pytest.mark.parametrize(
    ("give", "place"),
    [
        (lambda x, keys: (x, Kept(keys)), r"result\[1\] is a Kept"),
        (lambda x, keys: {"sample": x, "caches": [Kept(keys)]}, r"result\['caches'\]\[0\] is a Kept"),
        (lambda x, keys: Output(x, Kept(keys)), r"result\.features is a Kept"),  # type: ignore[arg-type]
        (lambda x, keys: (x, lambda: keys), r"result\[1\] is a function"),
    ],
)
def test_an_object_in_the_result_is_refused_at_the_first_call(give: Give, place: str) -> None:
    with pytest.raises(CaptureError, match=rf"{place}.*switch off the cache .*use_cache=False.*dataclasses"):
        attempt(made(give))


PLAIN: list[Give] = [
    lambda x, keys: x,
    lambda x, keys: (x, None, 3, "text", torch.float32, torch.device("cpu")),
    lambda x, keys: [x, {"keys": keys, "sizes": keys.shape}],
    lambda x, keys: Pair(x, keys),
    lambda x, keys: Record(x),
    lambda x, keys: Output(x, keys),
    lambda x, keys: (x, Output(keys)),
    lambda x, keys: {"sample": x, 3: (keys, [keys])},
]


@torch.no_grad()
@pytest.mark.parametrize("give", PLAIN)
def test_results_of_plain_things_are_as_the_model_gives_them(give: Give) -> None:
    model = made(give)
    cached = graphcache.transform(model, presets.compute(2))
    for time in (1.0, 0.5):
        got, wanted = cached(**arguments(time)), model(**arguments(time))
        assert type(got) is type(wanted)
        assert is_same(got, wanted)


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if dataclasses.is_dataclass(one):
        return is_same(vars(one), vars(other))
    return bool(one == other)


class FillsDict(Network):
    def read(self, kept: Any) -> Tensor:
        return kept.setdefault("keys", self.layer.bias)  # type: ignore[no-any-return]


class FillsList(Network):
    def read(self, kept: Any) -> Tensor:
        kept["layers"].append(self.layer.bias)
        return self.layer.bias


class Replaces(Network):
    def read(self, kept: Any) -> Tensor:
        kept[0] = kept[0] + 1
        return kept[0]  # type: ignore[no-any-return]


class Counts(Network):
    def read(self, kept: Any) -> Tensor:
        kept["calls"] += 1
        return self.layer.bias * kept["calls"]


class SetsAttribute(Network):
    def read(self, kept: Any) -> Tensor:
        kept.keys = kept.keys + self.layer.bias
        return kept.keys  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (FillsDict, {}),
        (FillsList, {"layers": []}),
        (Replaces, [torch.ones(WIDTH)]),
        (Counts, {"calls": 1}),
        (SetsAttribute, Record(torch.ones(WIDTH))),
    ],
)
def test_an_argument_that_forward_fills_is_refused_at_the_first_call(kind: type[Network], kept: Any) -> None:
    model, before = made(lambda x, keys: x, kind), repr(kept)
    with pytest.raises(CaptureError, match=r"forward changes its argument kept.*use_cache=False"):
        attempt(model, kept=kept)
    assert repr(kept) == before


def test_an_object_among_the_arguments_is_refused_with_what_to_do() -> None:
    with pytest.raises(CaptureError, match=r"argument kept is a Kept.*pass tensors.*use_cache=False"):
        attempt(made(lambda x, keys: x), kept=Kept(torch.ones(WIDTH)))


class ReadsRecord(Network):
    def read(self, kept: Any) -> Tensor:
        return kept.keys * kept.length  # type: ignore[no-any-return]


class ReadsOutput(Network):
    def read(self, kept: Any) -> Tensor:
        return kept.sample if kept.features is None else kept.features  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "give", "kept"),
    [
        (ReadsRecord, lambda x, keys: (x, Record(keys)), Record(torch.ones(2, 3, WIDTH), 2)),
        (ReadsOutput, lambda x, keys: (x, Output(x, keys)), Output(torch.ones(2, 3, WIDTH))),
    ],
)
def test_a_dataclass_of_tensors_goes_out_and_in_again(kind: type[Network], give: Give, kept: Any) -> None:
    model = made(give, kind)
    cached = graphcache.transform(model, presets.compute(3))
    got = wanted = kept
    for time in (1.0, 0.5, 0.25):
        one, got = cached(**arguments(time), kept=got)
        other, wanted = model(**arguments(time), kept=wanted)
        assert torch.equal(one, other)
        assert type(got) is type(wanted)
        assert is_same(got, wanted)


@torch.no_grad()
def test_a_number_in_a_dataclass_counts() -> None:
    model = made(lambda x, keys: x, ReadsRecord)
    cached = graphcache.transform(model, presets.compute(1))
    for length in (3, 5):
        kept = Record(torch.ones(WIDTH), length)
        assert torch.equal(cached(**arguments(), kept=kept), model(**arguments(), kept=kept))
