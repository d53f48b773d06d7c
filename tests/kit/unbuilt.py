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

from graphcache.compiler import ahead, native

GRAPHS: dict[str, fx.GraphModule] = {}
"""By what stands in their files."""
_NUMBERS = itertools.count()


class Kept:
    """A graph in the place of native code: it reads the weights that it was given, wherever they are.

    As native code reads every input as if it were laid out as at compilation, it takes no other.
    """

    def __init__(self, files: Sequence[Path], device: str, owner: object = None) -> None:
        (file,) = files
        self.graph = GRAPHS[file.read_text()]
        self.names = [name for name, _ in self.graph.named_buffers()]
        self.weights: dict[str, Tensor] = {}

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        nodes = self.graph.graph.find_nodes(op="placeholder")
        for tensor, node in zip(tensors, nodes, strict=True):
            expected = node.meta["val"]
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
            assert strides(tensor) == strides(expected)
        with torch.no_grad():
            results: Any = torch.func.functional_call(self.graph, self.weights, tensors)
        return list(results)


def strides(tensor: Tensor) -> list[int]:
    """Those that count."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _kept(folder: str, module: fx.GraphModule, *_: Any) -> tuple[list[Path], list[str]]:
    text = f"graph {next(_NUMBERS)}"
    GRAPHS[text] = module
    file = Path(folder, text, "graph.so")
    file.parent.mkdir()
    file.write_text(text)
    return [file], Kept([file], "cpu").names


@contextmanager
def unbuilt() -> Iterator[None]:
    """Within it packages are written and loaded without a compiler."""
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(ahead, "native_code", functools.partial(_kept, folder)),
        patch.object(native, "Code", Kept),
    ):
        yield
