"""A package is written whole or not at all, and one that was changed or made elsewhere is refused."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import graphcache
from graphcache import CaptureError, GraphCacheError, PlanError, presets
from graphcache.ir.data import described, tree
from graphcache.packaging import archive, machine
from graphcache.packaging.machine import Machine
from tiny import TinyDiT, arguments, tiny
from unbuilt import unbuilt

PLAN = presets.fora(4, interval=2)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad(), unbuilt():
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "tiny.graphcache"
    graphcache.package(tiny(), made, PLAN, [arguments(), arguments(batch=3)])
    return made


def test_a_stranger_is_not_trusted(path: Path) -> None:
    with pytest.raises(GraphCacheError, match=r"native code.*trust=True"):
        graphcache.load(path)


def rewritten(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """The archive with another content of one member."""
    with zipfile.ZipFile(path) as old:
        held = {item.filename: old.read(item) for item in old.infolist()}
    (found,) = (key for key in held if key.endswith(name))
    held[found] = change(held[found])
    with zipfile.ZipFile(path, "w") as new:
        for key, data in held.items():
            new.writestr(key, data)


@pytest.mark.parametrize("name", ["0/graph.so", archive.WEIGHTS])
def test_a_changed_member_is_refused(path: Path, name: str) -> None:
    rewritten(path, name, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(GraphCacheError, match=rf"{name} is not what was packaged"):
        graphcache.load(path, trust=True)


@pytest.mark.parametrize("kept", [0, 10, 2000, -1])
def test_a_file_cut_off_is_refused(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(GraphCacheError, match="cannot be read as a package"):
        graphcache.load(path, trust=True)


def test_flipped_bits_are_never_loaded(path: Path) -> None:
    data = path.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 50)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        try:
            model = graphcache.load(path, trust=True)
        except GraphCacheError:
            continue
        path.write_bytes(data)  # a byte that says nothing, such as padding
        expected = graphcache.load(path, trust=True)(**arguments())
        torch.testing.assert_close(model(**arguments()), expected, rtol=0, atol=0)


def other(path: Path, **changes: Any) -> None:
    def change(data: bytes) -> bytes:
        return msgspec.json.encode(msgspec.json.decode(data) | changes)

    rewritten(path, archive.MANIFEST, change)


def test_other_versions_and_machines_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Machine.here("cpu")
    elsewhere = msgspec.structs.replace(here, instructions=[*here.instructions, "avx4096"])
    for made, version, message in (
        (here, "1.0", rf"compiled for PyTorch 1\.0, and this is PyTorch {torch.__version__[:4]}"),
        (elsewhere, torch.__version__, "a processor with avx4096"),
        (msgspec.structs.replace(here, processor="pdp11"), torch.__version__, "on pdp11"),
    ):
        with pytest.raises(GraphCacheError, match=message):
            machine.refuse_other(made, str(version), "cpu")
    gpu = msgspec.structs.replace(here, arch="sm_90")
    with pytest.raises(GraphCacheError, match=r"GPU of sm_90"):
        machine.refuse_other(gpu, str(torch.__version__), "cpu")
    other(path, torch="2.99.0")
    with pytest.raises(GraphCacheError, match=r"compiled for PyTorch 2\.99\.0"):
        graphcache.load(path, trust=True)
    other(path, format=99)
    with pytest.raises(GraphCacheError, match="format 99"):
        graphcache.load(path, trust=True)


def test_an_older_pytorch_names_the_processors_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(Machine.here("cpu").instructions) > 1
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert Machine.here("cpu").instructions == [torch.backends.cpu.get_cpu_capability()]


def test_a_file_is_written_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive.os, "replace", fail)
    with pytest.raises(GraphCacheError, match="cannot be written: No space left"):
        graphcache.package(tiny(), path, PLAN, [arguments()])
    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path], "no temporary file is left"


def test_weights_are_stored_once_and_readable_by_others(path: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(path) as opened:
        opened.extract(archive.WEIGHTS, tmp_path)
        info = opened.getinfo(archive.WEIGHTS)
        assert info.compress_type == zipfile.ZIP_STORED
    with safe_open(tmp_path / archive.WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        for name, value in tiny().state_dict().items():
            torch.testing.assert_close(file.get_tensor(name), value, rtol=0, atol=0)
    held = archive.Archive(path).manifest
    assert names == held.weights.keys() == tiny().state_dict().keys()
    read = [part.weights for graph in held.needed for part in graph.parts]
    assert sum(map(len, read)) > len(names), "graphs share them"


class Tied(TinyDiT):
    """Two names of one weight, and a constant that no name of the model's has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].out.weight = self.text.weight
        self.constant = [torch.ones(4)]

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, timestep, text) * self.constant[0]


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    graphcache.package(Tied().eval(), tmp_path / "tied", PLAN, [arguments()])
    model = graphcache.load(tmp_path / "tied", trust=True)
    assert model.text.weight.data_ptr() == model.get_parameter("blocks.0.out.weight").data_ptr()
    model(**arguments())


def test_what_a_package_cannot_hold_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "made"

    class Record:
        def __init__(self) -> None:
            self.x = torch.zeros(2, 4)

    class WithRecord(TinyDiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Any) -> Tensor:
            return super().forward(x, timestep, text.x)

    with pytest.raises(CaptureError, match=r"the call\.text is a Record, which a package cannot hold"):
        graphcache.package(tiny(kind=WithRecord), target, PLAN, [arguments() | {"text": Record()}])
    streamed = graphcache.transform(tiny(), PLAN, offload=True)
    with pytest.raises(GraphCacheError, match="caches and weights on the device"):
        graphcache.package(streamed, target, sizes=[arguments()])
    with pytest.raises(CaptureError, match=r"time\.weight is kept elsewhere.*take offloading off"):
        graphcache.package(tiny().to("meta"), target, PLAN, [arguments()])
    with pytest.raises(GraphCacheError, match="sizes= is empty"):
        graphcache.package(tiny(), target, PLAN)
    with pytest.raises(PlanError, match="plan= is missing"):
        graphcache.package(tiny(), target, sizes=[arguments()])
    with pytest.raises(GraphCacheError, match="part='x' names a module of a pipeline"):
        graphcache.package(tiny(), target, PLAN, [arguments()], part="x")
    assert not target.exists()


def test_trees_are_data_and_come_back() -> None:
    value = {
        "a": (None, True, 3, 1.5, float("inf"), "text", torch.bfloat16, torch.device("cpu")),
        2: [{}, (), [0.1]],
    }
    data = msgspec.json.decode(msgspec.json.encode(described(value, "value")))
    assert repr(tree(data)) == repr(value)
    with pytest.raises(CaptureError, match=r"value\[0\] is a object"):
        described([object()], "value")
