"""What a package says of itself: JSON, of which nothing is executed."""

import importlib.metadata
from collections.abc import Iterable
from typing import Any

import msgspec
import torch

from graphcache.ir.data import TensorLine
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.graph import (
    Branch,
    CacheRead,
    CacheWrite,
    Chosen,
    Coefficients,
    Hoisted,
    InPort,
    Input,
    OutPort,
    Output,
    Table,
)
from graphcache.ir.schedule import Guided, Memory, Phase
from graphcache.packaging.machine import Machine

FORMAT = 2
_PORTS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (Input, Hoisted, CacheRead, Coefficients, Table, Chosen, CacheWrite, Output)
}


class PortLine(msgspec.Struct):
    """A port, and the tensor that goes through it."""

    kind: str
    fields: dict[str, Any]
    tensor: TensorLine

    @staticmethod
    def of(port: InPort | OutPort, tensor: torch.Tensor) -> "PortLine":
        return PortLine(type(port).__name__, msgspec.to_builtins(port), TensorLine.of(tensor))

    def port(self) -> Any:
        return msgspec.convert(self.fields, _PORTS[self.kind], strict=False)


class CodeLine(msgspec.Struct):
    """Native code: its files, and the layouts of what it is fed beside weights."""

    files: list[str]
    inputs: list[TensorLine]


class PartLine(msgspec.Struct):
    """A part of a graph: its code, among all of a package; the weights by their names in it; and the places
    in a table of values that it reads and writes.
    """

    code: int
    weights: dict[str, str]
    inputs: list[int]
    results: list[int]


class GraphLine(msgspec.Struct):
    """A compiled graph: its parts in their order, what it is fed, which values come first in the table, and
    what it returns, at the places of `results`.
    """

    parts: list[PartLine]
    results: list[int]
    inputs: list[PortLine]
    outputs: list[PortLine]
    flops: int


class PhaseLine(msgspec.Struct):
    """A phase of plans, and its code."""

    phase: Phase
    ranges: list[tuple[str, int, int]]
    guided: Guided | None
    memories: list[Memory]
    graph: GraphLine


class HalfLine(msgspec.Struct):
    """The conditional half of a doubled batch; see `guidance_half.Half`."""

    strides: list[list[int]]
    carriers: list[int]
    first: bool
    hoisted: list[str]
    shared: list[str]


class SizeLine(msgspec.Struct):
    """A call and everything that was compiled for calls like it."""

    call: Any
    leaves: list[TensorLine]
    numbers: list[int]
    strides: list[list[int]]
    result: Any
    count: int
    taken: Any
    branches: list[Branch]
    fingerprint: str
    flops: int
    prologue: GraphLine | None
    phases: list[PhaseLine]
    half: HalfLine | None
    memories: list[Memory]
    tokens: dict[str, tuple[int, int]]


class ParameterLine(msgspec.Struct):
    """An argument of forward: its name, its kind as Python numbers them, and whether it has a default."""

    name: str
    kind: int
    optional: bool


class WeightLine(msgspec.Struct):
    """A weight: the tensor in the file that holds it, and whether it is a parameter, a buffer or neither."""

    stored: str
    tensor: TensorLine
    kind: str


class Manifest(msgspec.Struct):
    """Everything about a package but its code and weights."""

    format: int
    graphcache: str
    torch: str
    machine: Machine
    model: str
    plan: str
    parameters: list[ParameterLine]
    timestep: str | None
    latents: list[str]
    calls: int | None
    waits: bool
    modes: Any
    attributes: dict[str, Any]
    config: Any
    weights: dict[str, WeightLine]
    codes: list[CodeLine]
    sizes: list[SizeLine]
    files: dict[str, str]

    @property
    def needed(self) -> Iterable[GraphLine]:
        """All compiled graphs."""
        for size in self.sizes:
            yield from [size.prologue] if size.prologue else []
            yield from (phase.graph for phase in size.phases)


class _Versioned(msgspec.Struct):
    format: int


def encode(manifest: Manifest) -> bytes:
    return msgspec.json.encode(manifest)


def decode(data: bytes, where: str) -> Manifest:
    """Read a manifest.

    Raises:
        GraphCacheError: it is none, or of another format.
    """
    try:
        found = msgspec.json.decode(data, type=_Versioned).format
        if found != FORMAT:
            raise GraphCacheError(
                f"{where}: a package of format {found}, and this graphcache reads format {FORMAT}; package "
                "the model again"
            )
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise GraphCacheError(f"{where}: its manifest cannot be read: {error}") from error


def own_version() -> str:
    """graphcache's."""
    try:
        return importlib.metadata.version("graphcache-dit")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return ""
