"""Why a model cannot be captured: the true cause, the line, what to do, and nothing printed beside it."""

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, presets
from graphcache.ir.graph import StepGraph, is_tensor, value_of
from graphcache.libraries.quiet import quiet_tracing
from graphcache.passes.base import run
from reference import capture_call

Compute = Callable[[Tensor, Tensor], Tensor]
BRANCHES = "A step must not branch on tensor values"


class Computing(nn.Module):
    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.compute(self.inner(x), timestep)


@pytest.fixture(autouse=True)
def silence(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing is printed, logged or warned of, whatever is refused."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        yield
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def message(compute: Compute) -> str:
    with pytest.raises(CaptureError) as error:
        graphcache.transform(Computing(compute).eval(), presets.compute(2))(torch.ones(2, 4), torch.ones(2))
    return str(error.value)


def decides(x: Tensor, t: Tensor) -> Tensor:
    if t.max() > 0.5:
        x = x * 2
    return x


def counts(x: Tensor, t: Tensor) -> Tensor:
    chosen = x[:, torch.nonzero(t)[:, 0]]
    return chosen * 2 if chosen.shape[1] > 1 else chosen


def loops(x: Tensor, t: Tensor) -> Tensor:
    while x.sum() < t.sum():
        x = x + 1
    return x


def asks(x: Tensor, t: Tensor) -> Tensor:
    return x if torch.allclose(x, x * 2) else x + 1


def joins(x: Tensor, t: Tensor) -> Tensor:
    found = torch.unique(x)
    return torch.cat([found, found])[:1] + x


def makes_a_set(x: Tensor, t: Tensor) -> Tensor:
    return x if len(set(t.long().tolist())) > 1 else x * 2


@pytest.mark.parametrize(
    "compute", [decides, counts, loops, asks, joins, makes_a_set], ids=lambda f: f.__name__
)
def test_values_that_decide(compute: Compute) -> None:
    said = message(compute)
    assert BRANCHES in said
    assert re.search(rf"because of .*test_explanations\.py:\d+ in {compute.__name__}: `", said)


def misfits(x: Tensor, t: Tensor) -> Tensor:
    return x @ t


def asserts(x: Tensor, t: Tensor) -> Tensor:
    assert x.shape[0] == 3, "three samples"
    return x


def misspells(x: Tensor, t: Tensor) -> Tensor:
    return x.no_such  # type: ignore[no-any-return, attr-defined]


def reads_numbers(x: Tensor, t: Tensor) -> Tensor:
    return x * float(t.numpy()[0])


def reads_memory(x: Tensor, t: Tensor) -> Tensor:
    return x + x.data_ptr() * 0


def looks_at_classes(x: Tensor, t: Tensor) -> Tensor:
    if type(x) is not Tensor:
        raise TypeError("plain tensors only")
    return x


def calls_an_operator(x: Tensor, t: Tensor) -> Tensor:
    return torch.ops.test_explanations.plus_one(x)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", autouse=True)
def operator() -> Iterator[None]:
    with torch.library._scoped_library("test_explanations", "FRAGMENT") as library:
        library.define("plus_one(Tensor x) -> Tensor")
        library.impl("plus_one", lambda x: x + 1, "CPU")
        yield


OTHERS: list[tuple[Compute, str]] = [
    (misfits, "the model itself fails on this call.*RuntimeError: size mismatch"),
    (asserts, "the model itself fails on this call.*AssertionError: three samples"),
    (misspells, "the model itself fails on this call.*AttributeError: 'Tensor' object has no attribute"),
    (
        reads_numbers,
        r"cannot be captured.*\.numpy\(\) is not supported.*Tensors have no values while they are",
    ),
    (reads_memory, r"cannot be captured.*Cannot access data pointer.*custom_op"),
    (looks_at_classes, "cannot be captured.*TypeError: plain tensors only.*not be traced"),
    (calls_an_operator, r"cannot be captured.*test_explanations\.plus_one.*torch\.library\.register_fake"),
]


@pytest.mark.parametrize(("compute", "words"), OTHERS, ids=lambda item: getattr(item, "__name__", ""))
def test_other_causes_are_not_taken_for_branches(compute: Compute, words: str) -> None:
    said = message(compute)
    assert re.search(words, said, re.DOTALL)
    assert re.search(rf"because of .*test_explanations\.py:\d+ in {compute.__name__}: `", said)
    assert BRANCHES not in said


def test_the_innermost_line_outside_of_pytorch_is_named(tmp_path: Path) -> None:
    name = "torch_like_layers"  # begins like PyTorch's own folder
    (tmp_path / f"{name}.py").write_text("def inner(x):\n    return x if x.sum() > 0 else -x\n")
    sys.path.insert(0, str(tmp_path))
    try:
        layers = __import__(name)
        assert f"{name}.py:2 in inner" in message(lambda x, t: layers.inner(x))
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules[name]


KEPT: dict[str, Compute] = {
    "mask": lambda x, t: x * x[x > 0].view(1, -1).sum(),
    "repeated": lambda x, t: torch.repeat_interleave(x, t.long() + 1, dim=0)[:2] + x,
    "range": lambda x, t: torch.arange(t.long().sum().item())[:1].sum() * x,
}


@pytest.mark.parametrize("name", KEPT)
def test_sizes_of_values_that_nobody_compares_are_captured(name: str) -> None:
    model = Computing(KEPT[name]).eval()
    exact = graphcache.transform(model, presets.compute(2))
    for time in (2.0, 1.0):
        x = torch.randn(2, 4)
        assert torch.equal(exact(x, torch.full((2,), time)), model(x, torch.full((2,), time)))


class Measuring:
    """A pass that has to know every size."""

    def __call__(self, step: StepGraph) -> StepGraph:
        sizes = [size for node in step.calls() if is_tensor(node) for size in value_of(node).shape]
        return step if all(size > 1 for size in sizes) else step.rebuilt(step.graph)


def test_sizes_that_a_pass_has_to_know_are_refused() -> None:
    model = Computing(KEPT["mask"]).eval()
    step = capture_call(model, {"x": torch.randn(2, 4), "timestep": torch.ones(2)}, "timestep").step
    with pytest.raises(CaptureError, match="sizes that depend on tensor values, and Measuring has to know"):
        run([Measuring()], step)


def test_what_pytorch_was_asked_to_log_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    with quiet_tracing():
        assert logger.disabled
    assert not logger.disabled
    monkeypatch.setenv("TORCH_LOGS", "dynamic")
    with quiet_tracing():
        assert not logger.disabled
