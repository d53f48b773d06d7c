"""The native code of a package, in a process that compiles nothing and does not know the model."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, GraphCacheError, presets
from graphcache.compiler import code
from graphcache.compiler.ahead import Ahead, at_hand, compile_ahead
from graphcache.compiler.flat import weights_of
from graphcache.compiler.native import Native, Part, Unpacked
from graphcache.ir.data import TensorLine
from graphcache.ir.graph import StepGraph
from graphcache.packaging import writing
from graphcache.packaging.archive import WEIGHTS, Archive
from reference import assert_same
from tiny import TinyDiT, arguments, tiny
from untraced import arguments as untraced_arguments
from untraced import holding

STEPS = 4
PLAN = presets.taylorseer(STEPS, interval=2)

ELSEWHERE = """
import json, sys
import torch
import graphcache

path, values, found = sys.argv[1:]
model = graphcache.load(path, trust=True)
made = torch.load(values)
results = []
with torch.no_grad(), model.session():
    for step in range({steps}):
        made["timestep"] = torch.full((2,), 1 - step / {steps})
        results.append(model(**made))
        made["x"] = made["x"] - results[-1] / {steps}
    said = str(model.summary())
torch.save(results, found)
names = ("torch._dynamo", "torch._inductor", "sympy", "networkx", "diffusers", "tiny")
print(json.dumps([said, [name for name in names if name in sys.modules]]))
"""


class Short(TinyDiT):
    """Nothing in it holds for a generation, so that there is a graph less to compile.

    Its blocks repeat, and differ in weights that are small or uniform, which a compiler writes into code.
    """

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.scales = nn.ParameterList(torch.tensor(0.5 + i) for i in range(depth))
        self.shifts = nn.ParameterList(torch.full((4,), 1.0 + i) for i in range(depth))
        self.gains = nn.ParameterList(torch.full((1,), 2.0 - 0.5 * i) for i in range(depth))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        gate = self.time(timestep[:, None])[:, None]
        for block, scale, shift, gain in zip(self.blocks, self.scales, self.shifts, self.gains, strict=True):
            x = block(x * gain, gate * scale + shift)
        return x


def short_arguments(t: float = 1.0) -> dict[str, Any]:
    return {name: value for name, value in arguments(t).items() if name != "text"}


def short() -> Short:
    model = tiny(4, Short)
    assert isinstance(model, Short)
    return model


@torch.no_grad()
def test_native_code(tmp_path: Path) -> None:
    """All on one package, since compiling it takes a while."""
    path = tmp_path / "short.graphcache"
    made: list[tuple[StepGraph, Ahead]] = []

    def recorded(step: StepGraph, *given: Any) -> Ahead:
        made.append((step, compile_ahead(step, *given)))
        return made[-1][1]

    with patch.object(writing, "compile_ahead", recorded):
        graphcache.package(short(), path, PLAN, [short_arguments()], regions=True)
    assert len(made) == 2
    has_a_checksum_of_everything(path)
    runs_in_a_process_without_compilers(path, tmp_path)
    reads_weights_where_they_are(path)
    follows_the_weights_of_a_model_at_hand(*made[0])


def has_a_checksum_of_everything(path: Path) -> None:
    held = Archive(path).manifest
    files = {name for code in held.codes for name in code.files}
    assert held.files.keys() == files | {WEIGHTS}
    assert len(held.codes) <= sum(len(graph.parts) for graph in held.needed) / 2, "blocks share code"


def runs_in_a_process_without_compilers(path: Path, tmp_path: Path) -> None:
    torch.save(short_arguments(), tmp_path / "values.pt")
    done = subprocess.run(
        [
            sys.executable, "-c", ELSEWHERE.format(steps=STEPS), str(path),
            str(tmp_path / "values.pt"), str(tmp_path / "found.pt"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    said, imported = json.loads(done.stdout)
    assert imported == []
    model, expected, made = graphcache.transform(short(), PLAN), [], short_arguments()
    for step in range(STEPS):
        made["timestep"] = torch.full((2,), 1 - step / STEPS)
        expected.append(model(**made))
        made["x"] = made["x"] - expected[-1] / STEPS
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), expected, rtol=1e-5, atol=1e-5)
    assert said.splitlines()[2:] == str(model.summary()).splitlines()[2:]


def reads_weights_where_they_are(path: Path) -> None:
    model, other = graphcache.load(path, trust=True), short()
    for weight in other.parameters():
        weight.mul_(1.5)
    model.load_weights(other.state_dict())
    is_close_at_first(model, other)
    model.reset()
    model.load_state_dict(short().state_dict(), assign=True)
    is_close_at_first(model, short())


def is_close_at_first(model: Any, other: Short) -> None:
    expected = other(**short_arguments())
    torch.testing.assert_close(model(**short_arguments()), expected, rtol=1e-5, atol=1e-5)


def follows_the_weights_of_a_model_at_hand(step: StepGraph, made: Ahead) -> None:
    model = at_hand(step, made)
    inputs = [torch.randn(node.meta["val"].shape) for node in step.placeholders()]
    for factor in (1.0, 1.5):
        for weight in weights_of(step).values():
            weight.data = weight.data * factor
        torch.testing.assert_close(model(*inputs), [*step.module(*inputs)], rtol=1e-5, atol=1e-5)


def test_code_that_cannot_be_loaded_is_told() -> None:
    with pytest.raises(GraphCacheError, match="code cannot be loaded"):
        Unpacked({"code/0/broken.so": b"no library"}).code("cpu")


class Recorded:
    """Code that keeps what it was given, and returns the sum turned: strides that nobody asked for."""

    def __init__(self) -> None:
        self.given: list[Sequence[Tensor]] = []

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        self.given.append(tensors)
        return [sum(tensors, torch.zeros(())).t().contiguous().t()]


def line(*stride: int, shape: Sequence[int] = (2, 3), dtype: str = "float32") -> TensorLine:
    return TensorLine(dtype, [*shape], [*stride], "cpu")


def test_what_arrives_is_laid_out_as_the_code_was_compiled_for() -> None:
    codes, wanted = [Recorded(), Recorded()], line(3, 1)
    parts = [Part(codes[0], [wanted], [0], [1]), Part(codes[1], [wanted] * 2, [0, 1], [2])]  # type: ignore[arg-type]
    native = Native(parts, [2, 0], [wanted, wanted])
    plain = torch.arange(6.0).view(2, 3)
    turned = plain.t().contiguous().t()
    for given in (turned, plain, plain + 1, turned, turned + 1, plain):
        made, same = native(given)
        assert_same([made, same], [given * 2, given])
        assert (made.stride(), same.stride()) == ((3, 1), (3, 1))
    arrived = [tensor for code in codes for tensors in code.given for tensor in tensors]
    assert len(arrived) == 6 + 12
    assert {tensor.stride() for tensor in arrived} == {(3, 1)}, "copied in every call"
    assert native(plain)[1] is plain, "what fits is not copied"
    whole = Native(parts[:1], [1], [wanted])
    for given in (turned, turned, plain):
        assert_same(whole(given), [given])
    assert {tensors[0].stride() for tensors in codes[0].given} == {(3, 1)}


@pytest.mark.parametrize("wanted", [line(4, 1, shape=(2, 4)), line(3, 1, dtype="float64")])
def test_other_shapes_and_dtypes_never_reach_the_code(wanted: TensorLine) -> None:
    code = Recorded()
    native = Native([Part(code, [wanted], [0], [1])], [1], [line(3, 1)])  # type: ignore[arg-type]
    with pytest.raises(GraphCacheError, match=r"native code for float\d\d.* was given float32\(2, 3\)"):
        native(torch.zeros(2, 3))
    assert not code.given


@torch.no_grad()
def test_the_backend_compiles_phases() -> None:
    made = []

    def compiled(step: StepGraph, *given: Any) -> Any:
        made.append(given)
        return step.module.forward

    options = {"max_autotune": False}
    backend = {"backend": "aot", "options": options}
    with patch.object(code, "following", compiled):
        cached: Any = graphcache.transform(tiny(), PLAN, backend=backend, regions=True)
        cached.warmup(arguments(), progress=False)
        torch.testing.assert_close(cached(**arguments()), tiny()(**arguments()))
    assert made == [(options, True)] * 2


def test_what_the_backend_cannot_do_is_refused() -> None:
    cached = graphcache.transform(tiny(), PLAN, backend="aot")
    with pytest.raises(CaptureError, match="computes no gradients"):
        cached(**arguments())
    opaque: Any = graphcache.transform(holding(), PLAN, backend="aot")
    with torch.no_grad(), pytest.raises(CaptureError, match="calls back into Python"):
        opaque(**untraced_arguments())
    with torch.no_grad(), pytest.raises(CaptureError, match=r"inner.* is called as it is.*transform"):
        graphcache.package(holding(), "nowhere", PLAN, [untraced_arguments()])
