"""Packages whose graphs are not compiled but kept in this process: what stands around the code is as ever."""

import functools
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx

from graphcache.compiler.ahead import Ahead
from graphcache.compiler.flat import flattened
from graphcache.ir.graph import StepGraph
from graphcache.packaging import loading, writing

GRAPHS: dict[str, fx.GraphModule] = {}
"""By what stands in their files."""
_NUMBERS = itertools.count()


class Kept:
    """A graph in the place of native code: it reads the weights that it was given, wherever they are."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.weights: dict[str, Tensor] = {}

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            results: Any = torch.func.functional_call(self.graph, self.weights, tensors)
        return list(results)


def _kept(folder: str, step: StepGraph, what: str) -> Ahead:
    module = flattened(step, {})
    text = f"graph {next(_NUMBERS)}"
    GRAPHS[text] = module
    file = Path(folder, text, "graph.so")
    file.parent.mkdir()
    file.write_text(text)
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return Ahead([file], weights)


def _found(files: Mapping[str, bytes], device: str) -> Kept:
    (data,) = files.values()
    return Kept(GRAPHS[data.decode()])


@contextmanager
def unbuilt() -> Iterator[None]:
    """Within it packages are written and loaded without a compiler."""
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(writing, "compile_ahead", functools.partial(_kept, folder)),
        patch.object(loading, "unpacked", _found),
    ):
        yield
