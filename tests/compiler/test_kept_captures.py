"""Captures kept on disk: another process traces nothing, and no file makes a result wrong or runs code."""

import gc
import hashlib
import logging
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from unittest.mock import patch

import diffusers.models.attention_dispatch  # noqa: F401  (it is a mode around calls, once it is there)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphcache
from counted import traces
from graphcache import CaptureError, Plan, presets
from graphcache.compiler import kept_captures
from graphcache.compiler.capture_file import decoded, encoded
from graphcache.ir.graph import layout
from graphcache.ir.graph_data import GraphData
from graphcache.ir.operations import operation
from graphcache.ir.text import render
from graphcache.libraries.exclusive import COMPILING
from inside import only_program
from other_process import printed
from reference import assert_same, subject
from seeding import Run
from tiny import TinyDiT, arguments, tiny
from zoo import CASES
from zoo.classes import KINDS

PLAN = presets.taylorseer(4, interval=2)


@pytest.fixture(autouse=True)
def _alone(captured_anew: None) -> Iterator[None]:
    with torch.no_grad():
        yield


def run(model: nn.Module, folder: Path, call: Any = None, plan: Plan = PLAN) -> tuple[int, Any]:
    """How often a model was traced for its first step, whose bits are its own, and the transformed one."""
    call = arguments() if call is None else call
    made: Any = graphcache.transform(model, plan, captures=folder)
    with traces() as count:
        found = made(**call)
    assert_same(found, model(**call))
    return count.fixed + count.any, made


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.capture"))


@pytest.mark.parametrize("number", range(3))
def test_a_second_model_is_not_traced(number: int, tmp_path: Path) -> None:
    name = random.Random(Run.seed).sample(sorted(set(CASES) - {"mochi"}), 3)[number]
    on, other = subject(name), CASES[name].make()
    call = on.case.kwargs()
    assert run(on.model, tmp_path, call)[0] == 1
    count, made = run(other, tmp_path, call)
    assert count == 0
    step = only_program(made).captured.step
    assert render(step) == render(on.captured.step)
    assert step.passes == on.captured.step.passes
    weights = {id(weight) for weight in other.parameters()}
    assert weights >= {id(weight) for weight in step.root.parameters()}
    assert "graphs built of a capture from disk" in str(made.summary())


@pytest.mark.parametrize("plan", [PLAN, presets.toca(4)], ids=["taylorseer", "toca"])
def test_generations_are_those_of_a_traced_model(plan: Plan, tmp_path: Path) -> None:
    calls = [arguments(1 - step / 4, tokens=32) for step in range(4)]
    run(tiny(2), tmp_path, calls[0], plan)
    expected = graphcache.transform(tiny(2), plan)
    found: Any = graphcache.transform(tiny(2), plan, captures=tmp_path)
    with traces() as count:
        for call in calls:
            assert_same(found(**call), expected(**call))
    assert count.fixed == 1  # the expected one
    assert found.summary().branches[0].from_disk
    ours, theirs = (only_program(made).captured.step for made in (found, expected))
    assert [*map(told, ours.graph.nodes)] == [*map(told, theirs.graph.nodes)]


def told(node: fx.Node) -> Any:
    """On which code that is found in PyTorch's cache depends."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return node.name, str(node.target), str(node.args), str(node.kwargs)
    more = value.requires_grad, value.storage_offset(), isinstance(value, nn.Parameter)
    return node.name, str(node.target), str(node.args), str(node.kwargs), layout(value), more


def test_half_a_batch_is_found_too(tmp_path: Path) -> None:
    plan = Plan.parse("plan steps=4 conditional=last\nguidance #.#.")
    call = arguments()
    call["x"] = call["x"][:1].repeat(2, 1, 1)
    assert run(tiny(), tmp_path, call, plan)[0] == len(files(tmp_path)) == 2
    assert run(tiny(), tmp_path, call, plan)[0] == 0


def test_another_process_traces_nothing(tmp_path: Path) -> None:
    run(tiny(), tmp_path)
    text = """
import sys, torch, graphcache, diffusers.models.attention_dispatch
from tiny import arguments, tiny
torch.export.export = None
model = graphcache.transform(tiny(), graphcache.presets.taylorseer(4, interval=2), captures=sys.argv[1])
with torch.no_grad():
    assert torch.equal(model(**arguments()), tiny()(**arguments()))
print(model.summary().branches[0].from_disk)
"""
    assert printed(text, str(tmp_path)) == ["True"]


def test_processes_agree_on_published_models() -> None:
    names = random.Random(Run.seed).sample(sorted(KINDS), 8)
    text = """
import sys, diffusers.models.attention_dispatch
from graphcache.tracing.model_digest import ModelDigest
from zoo.classes import KINDS
print(*(ModelDigest(KINDS[name].make(), 0) for name in sys.argv[1:]))
"""
    ours, theirs = (printed(text, *names, seed=seed) for seed in (1, 2))
    assert ours == theirs
    assert len({*ours}) == len(names)


class Helped(TinyDiT):
    """Calls functions, and reads numbers, that are found in different ways."""

    table: ClassVar[list[float]] = [1.0]

    def __init__(self, depth: int = 1, dim: int = 4) -> None:
        super().__init__(depth, dim)
        self.factor = 2.0
        self.bias = torch.full((4,), 0.5)
        self.further = {"each": [0.25]}
        self.shift: Callable[[Tensor], Tensor] = shifted

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = helper(x) * self.factor + self.bias + self.further["each"][0] * math.pi
        return super().forward(self.shift(self.scaled(x)), timestep, text) + torch.tensor(Helped.table)

    def scaled(self, x: Tensor) -> Tensor:
        from zoo.case import unit

        return x * LIMIT + unit(0.5, 1)


LIMIT = 3.0


def helper(x: Tensor) -> Tensor:
    return x.sin()


def shifted(x: Tensor, by: float = 0.1) -> Tensor:
    return x + by


def other_helper(monkeypatch: pytest.MonkeyPatch, _: Any) -> None:
    monkeypatch.setitem(globals(), "helper", lambda x: x.cos())


def other_method(monkeypatch: pytest.MonkeyPatch, _: Any) -> None:
    monkeypatch.setattr(Helped, "scaled", lambda self, x: x * 2 * LIMIT)


def other_forward(monkeypatch: pytest.MonkeyPatch, _: Any) -> None:
    source = "def forward(self, x, timestep, text):\n    return plain(self, x * 7, timestep, text)\n"
    made: dict[str, Any] = {"plain": TinyDiT.forward}
    exec(source, made)
    monkeypatch.setattr(Helped, "forward", made["forward"])


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Any], Any]] = {
    "attribute": lambda _, model: setattr(model, "factor", 3.0),
    "tensor": lambda _, model: model.bias.add_(1),
    "in a list": lambda _, model: model.further["each"].append(1.0),
    "another type": lambda _, model: setattr(model, "factor", 2),
    "a function's default": lambda _, model: setattr(model, "shift", lambda x, by=0.2: shifted(x, by)),
    "layout": lambda _, model: setattr(model.text, "weight", nn.Parameter(torch.randn(4, 4).t())),
    "need of gradients": lambda _, model: model.text.weight.requires_grad_(False),
    "a further part": lambda _, model: model.blocks.append(tiny(1).blocks[0]),
    "global": lambda patch, _: patch.setitem(globals(), "LIMIT", 4.0),
    "imported within": lambda patch, _: patch.setattr("zoo.case.unit", lambda t, _: torch.tensor(t * 3)),
    "class attribute": lambda patch, _: patch.setattr(Helped, "table", [2.0]),
    "function": other_helper,
    "method": other_method,
    "forward": other_forward,
    "graphcache": lambda patch, _: patch.setattr(kept_captures, "_versions", lambda: ("another",)),
    "pytorch": lambda patch, _: patch.setattr(torch, "__version__", "2.99"),
}


@pytest.fixture
def versions_anew() -> Iterator[None]:
    known = kept_captures._versions
    known.cache_clear()
    yield
    known.cache_clear()


@pytest.mark.usefixtures("versions_anew")
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_traced_anew(
    change: str, monkeypatch: pytest.MonkeyPatch, helped: Path, tmp_path: Path
) -> None:
    (tmp_path / helped.name).write_bytes(helped.read_bytes())
    model = tiny(1, Helped)
    CHANGES[change](monkeypatch, model)
    assert run(model, tmp_path)[0] == 1
    assert len(files(tmp_path)) == 2


class Hidden(TinyDiT):
    """Reads a number by ways that nobody can follow, and which has no effect on small values."""

    way = "class"

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x.clamp(max=getattr(self, "by_" + self.way)()), timestep, text)

    def by_class(self) -> float:
        return Limited().limit

    def by_name(self) -> float:
        return float(globals()["_LIM" + "IT"])


class Limited:
    def __init__(self) -> None:
        self.limit = _LIMIT


_LIMIT = 100.0


@pytest.mark.parametrize("way", ["class", "name"])
def test_a_number_that_the_call_at_hand_does_not_show_is_seen(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny(1, Hidden)
    model.way = way
    assert run(model, tmp_path)[0] == 1
    assert run(model, tmp_path)[0] == 0
    monkeypatch.setitem(globals(), "_LIMIT", 10.0)
    count, made = run(model, tmp_path)
    assert count == 1
    call = arguments()
    call["x"] *= 100
    made.reset()
    assert_same(made(**call), model(**call))


@pytest.fixture(scope="module")
def helped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an unchanged one."""
    folder = tmp_path_factory.mktemp("helped")
    with torch.no_grad():
        graphcache.transform(tiny(1, Helped), PLAN, captures=folder)(**arguments())
    return files(folder)[0]


def test_what_does_not_count_is_not_traced_anew(helped: Path) -> None:
    model = tiny(1, Helped)
    for weight in model.parameters():
        weight.mul_(2)
    assert run(model, helped.parent)[0] == 0
    assert run(model.to(torch.float64), helped.parent, cast_to(torch.float64))[0] == 1


def cast_to(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in arguments().items()}


def test_other_calls_and_modes_have_captures_of_their_own(tmp_path: Path) -> None:
    assert run(tiny(), tmp_path)[0] == 1
    assert run(tiny(), tmp_path, arguments(tokens=5))[0] == 1
    with torch.autocast("cpu", torch.bfloat16):
        made: Any = graphcache.transform(tiny(), PLAN, captures=tmp_path)
        with traces() as count:
            made(**arguments())
    assert (count.fixed, len(files(tmp_path))) == (1, 3)
    assert run(tiny(), tmp_path, arguments(tokens=5))[0] == 0


def test_a_models_own_tensors_stay_its_own(helped: Path) -> None:
    model = tiny(1, Helped)
    count, made = run(model, helped.parent)
    assert count == 0
    model.bias.add_(1)
    made.reset()
    assert_same(made(**arguments()), model(**arguments()))


@cache
def kept() -> tuple[str, bytes]:
    """The file of a tiny model, and its name."""
    with TemporaryDirectory() as name, torch.no_grad():
        graphcache.transform(tiny(), PLAN, captures=name)(**arguments())
        (file,) = files(Path(name))
        return file.name, file.read_bytes()


def right_with(blob: bytes) -> int:
    """How often a model was traced whose file is this one; it is right anyhow, and so is the next one."""
    with TemporaryDirectory() as name:
        Path(name, kept()[0]).write_bytes(blob)
        count = run(tiny(), Path(name))[0]
        assert Path(name, kept()[0]).read_bytes() == kept()[1] or not count
        return count


def sealed(body: bytes) -> bytes:
    """A file with the right checksum."""
    mark = kept()[1][: kept()[1].index(b"\n") + 1]
    return mark + hashlib.sha256(body).digest() + body


def forged(change: Callable[[GraphData], Any]) -> bytes:
    content = decoded(kept()[1])
    change(content.graph)
    return encoded(content)


@settings(max_examples=8)
@given(st.data())
def test_a_changed_byte_changes_no_result(data: st.DataObject) -> None:
    whole = bytearray(kept()[1])
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    assert right_with(bytes(whole)) == 1


@settings(max_examples=12)
@given(st.data())
def test_a_changed_byte_with_another_checksum_changes_no_result(data: st.DataObject) -> None:
    body = bytearray(kept()[1][kept()[1].index(b"\n") + 33 :])
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] = data.draw(st.sampled_from([*b'0123456789"[]{},.-_aeiou\x00\xff']))
    right_with(sealed(bytes(body)))


@pytest.mark.parametrize("length", [0, 10, 60, -1])
def test_a_half_written_file_is_made_anew(length: int) -> None:
    assert right_with(kept()[1][:length]) == 1


def rename(graph: GraphData, name: str) -> None:
    graph.nodes[-2].name = name


def retarget(graph: GraphData, kind: str, target: str) -> None:
    line = next(line for line in graph.nodes if line.op == kind)
    if kind == "get_attr":
        graph.weights[target] = graph.weights.pop(line.target)
    line.target = target


RUNS = "__import__('pathlib').Path('ran').touch()"
FORGERIES: dict[str, Callable[[GraphData], Any]] = {
    "a name that is code": lambda graph: rename(graph, f"x = {RUNS}\n    y"),
    "an input that is code": lambda graph: retarget(graph, "placeholder", f"x={RUNS}"),
    "a weight that is code": lambda graph: retarget(graph, "get_attr", f'a", {RUNS}) + getattr(self, "b'),
    "os.system": lambda graph: retarget(graph, "call_function", "os.system"),
    "a file": lambda graph: retarget(graph, "call_function", "aten.from_file.default"),
    "in place": lambda graph: retarget(graph, "call_function", "aten.mul_.Tensor"),
    "a module's call": lambda graph: setattr(graph.nodes[-2], "op", "call_module"),
    "another kind": lambda graph: setattr(graph.nodes[-2], "op", "call_method"),
    "a later node": lambda graph: graph.nodes.insert(0, graph.nodes.pop(-2)),
    "another dtype": lambda graph: setattr(
        graph.nodes[-2], "kwargs", {"dict": [["dtype", {"dtype": "load"}]]}
    ),
    "a weight that is not there": lambda graph: graph.weights.update(dict.fromkeys(graph.weights, 10**6)),
    "a branch that is not there": lambda graph: graph.branches.append(
        replace(graph.branches[0], name="further", value="nothing")
    ),
    "other results": lambda graph: setattr(graph, "outputs", 2),
    "another weight": lambda graph: graph.weights.update(dict.fromkeys(graph.weights, 1)),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_file_is_refused_and_runs_nothing(
    forgery: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert right_with(forged(FORGERIES[forgery])) == 1
    assert "made anew" in caplog.text
    assert not any(tmp_path.iterdir())


def test_a_graph_that_computes_something_else_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    def negate(graph: GraphData) -> None:
        line = next(line for line in graph.nodes if line.target == "aten.gelu.default")
        line.target = "aten.relu.default"

    assert right_with(forged(negate)) == 1
    assert "it does not compute what the model does" in caplog.text


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "aten.from_file.default", "aten.add_.Tensor", "aten.save.default", "aten"],
)
def test_operations_of_files_are_looked_up_in_a_list(name: str) -> None:
    with pytest.raises(CaptureError, match="none of the operations"):
        operation(name)


def test_operations_are_known_by_their_whole_names() -> None:
    for name in (
        "graphcache.opaque.default",
        "aten.__class__.mro",
        "aten.linear.out",
        "aten.linear.default.x",
    ):
        with pytest.raises(CaptureError, match="none of the operations"):
            operation(name)
    assert operation("aten.linear.default") is torch.ops.aten.linear.default


def test_what_cannot_be_kept_is_traced_in_each_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Asks(TinyDiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return super().forward(x if text.sum() > 1e6 else x * 2, timestep, text)

    class Holds(TinyDiT):
        def __init__(self, depth: int = 1, dim: int = 4) -> None:
            super().__init__(depth, dim)
            self.generator = torch.Generator()

    with caplog.at_level(logging.INFO, "graphcache"):
        for kind, said in ((Asks, "forward asks for values"), (Holds, "it holds a torch._C.Generator")):
            for _ in range(2):
                count, made = run(tiny(1, kind), tmp_path)
                assert count
                assert not made.summary().branches[0].from_disk
            assert said in caplog.text
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_written_costs_no_more_than_the_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert run(tiny(), tmp_path / "file")[0] == 1
    assert "the capture is not kept" in caplog.text


def test_two_processes_write_one_file_at_the_same_time(tmp_path: Path) -> None:
    writes, counts = kept_captures.write_bytes, list[int]()

    def write(data: bytes, path: Path) -> None:
        if not counts:
            counts.append(1)
            counts.append(run(tiny(), tmp_path)[0])
        writes(data, path)

    with patch.object(kept_captures, "write_bytes", write):
        run(tiny(), tmp_path)
    assert counts == [1, 1]
    assert [*tmp_path.iterdir()] == files(tmp_path)
    assert run(tiny(), tmp_path)[0] == 0


def test_the_oldest_files_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_captures, "_MOST", 2)
    for tokens in (3, 4, 5):
        run(tiny(), tmp_path, arguments(tokens=tokens))
        for age, file in enumerate(files(tmp_path)):
            os.utime(file, (age, age))
    assert len(files(tmp_path)) == 2


def test_garbage_is_looked_for_as_before() -> None:
    before = gc.get_threshold()
    with COMPILING:
        inside = gc.get_threshold()
        with COMPILING:
            assert gc.get_threshold() == inside
        assert inside >= before
    assert gc.get_threshold() == before
