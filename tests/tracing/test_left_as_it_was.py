"""Models whose forward keeps things: a capture leaves none of its own there, and no random number is drawn.

The oracle is a model of the same seed that was never transformed.
"""

import functools
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, presets
from graphcache.tracing.belongings import Belongings

pytestmark = pytest.mark.usefixtures("captured_anew")

WIDTH = 8


def angles(count: int) -> Tensor:
    return torch.outer(torch.arange(count, dtype=torch.float32), torch.arange(1.0, WIDTH + 1)).cos()


class Network(nn.Module):
    """Adds a table of as many rows as there are tokens to its stream; where it keeps that is its kind's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x * timestep[:, None, None] + self.table(x.shape[1])
        for layer in self.layers:
            x = x + layer(torch.tanh(x))
        return x

    def table(self, count: int) -> Tensor:
        raise NotImplementedError


class Helper:
    """No module, and so nothing that PyTorch looks after."""

    def __init__(self) -> None:
        self.tables: list[Tensor] | None = None
        self.by_size: dict[int, Tensor] = {}
        self.entries: list[Tensor] = []
        self.recent: deque[Tensor] = deque(maxlen=1)
        self.ordered: OrderedDict[int, Tensor] = OrderedDict()

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def remembered(self, count: int) -> Tensor:
        return angles(count)


class Slotted:
    __slots__ = ("table",)


class WithHelper(Network):
    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper()


class InAttributeOfObject(WithHelper):
    def table(self, count: int) -> Tensor:
        if self.helper.tables is None or len(self.helper.tables[0]) < count:
            self.helper.tables = [angles(count)]
        return self.helper.tables[0][:count]


class InDictOfObject(WithHelper):
    def table(self, count: int) -> Tensor:
        if count not in self.helper.by_size:
            self.helper.by_size[count] = angles(count)
        return self.helper.by_size[count]


class InListOfObject(WithHelper):
    def table(self, count: int) -> Tensor:
        if not self.helper.entries:
            self.helper.entries.append(angles(64))
        return self.helper.entries[0][:count]


class InDeque(WithHelper):
    def table(self, count: int) -> Tensor:
        if not self.helper.recent or len(self.helper.recent[0]) != count:
            self.helper.recent.append(angles(count))
        return self.helper.recent[0]


class InOrderedDict(WithHelper):
    def table(self, count: int) -> Tensor:
        kept = self.helper.ordered
        if count not in kept:
            kept[count] = angles(count)
        kept.move_to_end(count)
        return kept[count]


class StandsIn:
    """Has no attributes of its own, and fails when it is asked for one."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} yet")


STANDS_IN = StandsIn()


class BesideWhatStandsIn(InDictOfObject):
    """Among what holds the table is an object that does not let itself be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.helper.other = [StandsIn()]

    def table(self, count: int) -> Tensor:
        assert STANDS_IN is not None
        return super().table(count)


class InSlot(Network):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Slotted()

    def table(self, count: int) -> Tensor:
        if not hasattr(self.holder, "table") or len(self.holder.table) != count:
            self.holder.table = angles(count)
        made: Tensor = self.holder.table
        return made


class InMemoOfMethod(WithHelper):
    def table(self, count: int) -> Tensor:
        return self.helper.remembered(count)


@functools.cache
def remembered(count: int) -> Tensor:
    return angles(count)


class InMemoOfFunction(Network):
    def table(self, count: int) -> Tensor:
        return remembered(count)


class InClassAttribute(Network):
    shared: ClassVar[dict[int, Tensor]] = {}
    newest: ClassVar[Tensor | None] = None

    def table(self, count: int) -> Tensor:
        if count not in self.shared:
            self.shared[count] = angles(count)
        type(self).newest = self.shared[count]
        return self.shared[count]


TABLES: dict[int, Tensor] = {}
newest: Tensor | None = None


class InGlobalDict(Network):
    def table(self, count: int) -> Tensor:
        if count not in TABLES:
            TABLES[count] = angles(count)
        return TABLES[count]


class InGlobalName(Network):
    def table(self, count: int) -> Tensor:
        global newest
        if newest is None or len(newest) != count:
            newest = angles(count)
        return newest


def memoised(function: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    results: dict[int, Tensor] = {}

    def call(count: int) -> Tensor:
        if count not in results:
            results[count] = function(count)
        return results[count]

    return call


class InClosure(Network):
    def __init__(self) -> None:
        super().__init__()
        self.made = memoised(angles)

    def table(self, count: int) -> Tensor:
        return self.made(count)


class InFunctionAttribute(Network):
    def table(self, count: int) -> Tensor:
        kept = vars(angles).setdefault("kept", {})
        if count not in kept:
            kept[count] = angles(count)
        made: Tensor = kept[count]
        return made


class InModuleAttribute(Network):
    kept: Tensor | None = None

    def table(self, count: int) -> Tensor:
        if self.kept is None or len(self.kept) != count:
            self.kept = angles(count)
        return self.kept


class InModuleDict(Network):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {"tables": {}}

    def table(self, count: int) -> Tensor:
        tables: dict[int, Tensor] = self.kept["tables"]
        if count not in tables:
            tables[count] = angles(count)
        return tables[count]


class InLateBuffer(Network):
    def table(self, count: int) -> Tensor:
        if "late" not in self._buffers or len(self.late) < count:
            self.register_buffer("late", angles(count), persistent=False)
        return self.late[:count]


class InCachedProperty(Network):
    @functools.cached_property
    def whole(self) -> Tensor:
        return angles(64)

    def table(self, count: int) -> Tensor:
        return self.whole[:count]


class InBufferOnce(Network):
    """Writes into a buffer in its first call; a graph could not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("whole", torch.zeros(64, WIDTH))
        self.is_filled = False

    def table(self, count: int) -> Tensor:
        if not self.is_filled:
            self.whole.copy_(angles(64))
            self.is_filled = True
        return self.whole[:count]


class InNumbers(Network):
    """Makes its table of numbers that cannot be read of fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.limit: float | None = None

    def table(self, count: int) -> Tensor:
        if self.limit is None:
            self.limit = angles(64).abs().max().item()
        return angles(count) / self.limit


KINDS = [
    InAttributeOfObject,
    InDictOfObject,
    InListOfObject,
    InDeque,
    InOrderedDict,
    BesideWhatStandsIn,
    InSlot,
    InMemoOfMethod,
    InMemoOfFunction,
    InClassAttribute,
    InGlobalDict,
    InGlobalName,
    InClosure,
    InFunctionAttribute,
    InModuleAttribute,
    InModuleDict,
    InLateBuffer,
    InCachedProperty,
    InBufferOnce,
    InNumbers,
]


def network(kind: type[nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def call(count: int, time: float = 0.5) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(count)
    return torch.randn(2, count, WIDTH, generator=made), torch.full((2,), time)


@torch.no_grad()
def expected(kind: type[nn.Module], *arguments: Tensor) -> Tensor:
    """Of a model of its own, which finds no table that another one filled."""
    remembered.cache_clear()
    TABLES.clear()
    InClassAttribute.shared.clear()
    vars(angles).pop("kept", None)
    result: Tensor = network(kind)(*arguments)
    return result


@torch.no_grad()
@pytest.mark.few(24)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [False, True], ids=["at once", "after a call"])
def test_what_forward_fills_is_right_in_model_and_graph_at_several_sizes(
    kind: type[nn.Module], used: bool
) -> None:
    wanted = {count: expected(kind, *call(count)) for count in (4, 16, 6)}
    model = network(kind)
    if used:
        model(*call(5))
    cached = graphcache.transform(model, presets.compute(2))
    for count in (4, 16, 6, 4):
        for time in (1.0, 0.5):
            result = cached(*call(count, time))
        assert torch.equal(result, wanted[count])
        assert torch.equal(model(*call(count)), wanted[count])
        with cached.disabled():
            assert torch.equal(cached(*call(count)), wanted[count])


class Asserting(InDictOfObject):
    """pytest rewrites the assert, and puts names of its own into the function."""

    def table(self, count: int) -> Tensor:
        assert count > 0
        return super().table(count)


def test_an_assert_in_a_test_leads_nowhere() -> None:
    with_assert, without = (Belongings(network(kind)).keepers for kind in (Asserting, InDictOfObject))
    assert len(with_assert) < len(without) + 10


@torch.no_grad()
@pytest.mark.parametrize("kind", [InAttributeOfObject, InModuleDict, InClosure, InLateBuffer, InOrderedDict])
def test_switching_between_sizes_captures_each_of_them_once(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: (made.append(1), export(*a, **k))[1])
    cached = graphcache.transform(network(kind), presets.compute(1))
    for count in (4, 8) * 3:
        cached(*call(count))
    assert len(made) == 2


class Growing(Network):
    """Its state is another one after every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[Tensor] = []
        self.register_buffer("scale", torch.ones(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        self.last = x
        self.scale = self.scale * 1
        return super().forward(x, timestep)

    def table(self, count: int) -> Tensor:
        return angles(count) * self.calls


@torch.no_grad()
def test_a_model_that_changes_with_every_call_is_as_it_was() -> None:
    model = network(Growing)
    model(*call(4))
    seen, buffers, before = model.seen, model._buffers, dict(vars(model))
    scale, first = model.scale, model.seen[0]
    cached = graphcache.transform(model, presets.compute(1))
    for count in (4, 8, 4, 8):
        cached(*call(count))
        assert dict(vars(model)) == before
        assert model.seen is seen
        assert [id(item) for item in seen] == [id(first)]
        assert model._buffers is buffers
        assert model.scale is scale


class Accumulating(Network):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(4, WIDTH))

    def table(self, count: int) -> Tensor:
        self.sum[1:] += 1
        return self.sum[:count]


@torch.no_grad()
def test_what_is_refused_has_changed_neither_model_nor_arguments() -> None:
    model = network(Accumulating)
    with pytest.raises(CaptureError, match=r"changes the buffer 'model\.sum' in place"):
        graphcache.transform(model, presets.compute(1))(*call(4))
    assert not model.sum.any()


class Scaling(Network):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x[:, 1:].mul_(timestep[:, None, None])


@torch.no_grad()
def test_an_argument_that_forward_overwrites_keeps_its_values() -> None:
    x, timestep = call(4)
    kept = x.clone()
    with pytest.raises(CaptureError, match="changes the input"):
        graphcache.transform(network(Scaling), presets.compute(1))(x, timestep)
    assert torch.equal(x, kept)


class Failing(Network):
    def table(self, count: int) -> Tensor:
        if count > 4:
            raise ValueError(f"{count} tokens are too many")
        return angles(count)


@torch.no_grad()
def test_a_call_that_the_model_itself_refuses() -> None:
    cached = graphcache.transform(network(Failing), presets.compute(1))
    with pytest.raises(CaptureError, match=r"itself fails on this call because of .*ValueError: 5 tokens"):
        cached(*call(5))
    assert torch.equal(cached(*call(4)), expected(Failing, *call(4)))


class Starving(Network):
    def table(self, count: int) -> Tensor:
        raise torch.OutOfMemoryError


@torch.no_grad()
def test_lack_of_memory_is_raised_as_it_is() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        graphcache.transform(network(Starving), presets.compute(1))(*call(4))


class Drawing(Network):
    """Draws a number in its first call, and again whenever it is called with more tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def table(self, count: int) -> Tensor:
        if count > self.largest:
            self.largest = count
            random.random()
            torch.rand(2)
        return angles(count)


@torch.no_grad()
def test_random_states_are_as_they_were() -> None:
    cached = graphcache.transform(network(Drawing), presets.compute(1))
    torch.manual_seed(3), random.seed(3)
    numbers = torch.rand(1), random.random()
    for count in (4, 8):
        torch.manual_seed(3), random.seed(3)
        cached(*call(count))
        assert (torch.rand(1), random.random()) == numbers


class Embedding(WithHelper):
    """Embeds its text once, until somebody takes the embedding away."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        if self.helper.tables is None:
            self.helper.tables = [self.layers[0](text)]
        return super().forward(x + self.helper.tables[0][:, None], timestep)

    def table(self, count: int) -> Tensor:
        return angles(count)


@torch.no_grad()
def test_a_text_that_is_embedded_once_until_it_is_taken_away() -> None:
    model = network(Embedding)
    cached = graphcache.transform(model, presets.compute(1))
    for seed in (0, 1):
        text = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
        model.helper.tables = None
        assert torch.equal(cached(*call(4), text), expected(Embedding, *call(4), text))


@torch.no_grad()
def test_a_model_on_the_device_that_has_no_values() -> None:
    with torch.device("meta"):
        model = InAttributeOfObject().eval()
        inputs = {name: tensor.to("meta") for name, tensor in zip(("x", "timestep"), call(4), strict=True)}
        cached = graphcache.transform(model, presets.compute(1), example_inputs=inputs)
    assert cached.helper.tables is None
