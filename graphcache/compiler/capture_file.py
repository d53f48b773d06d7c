"""The file of a capture: its checksum, the graph as JSON, and the tensors that belong to no model."""

import hashlib
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from graphcache.ir.data import TensorLine
from graphcache.ir.graph import as_bytes
from graphcache.ir.graph_data import GraphData

_MARK = b"graphcache capture 2\n"
_CHECKSUM = 32


class _Content(msgspec.Struct):
    graph: GraphData
    stored: list[TensorLine]
    shapes: list[list[tuple[int, ...]]]


class Content(NamedTuple):
    """A capture in a file.

    Attributes:
        graph: the step.
        stored: tensors that it reads and that are none of the model's.
        shapes: of calls that a graph with symbols is for: those of the traced one come first.
    """

    graph: GraphData
    stored: list[Tensor]
    shapes: list[list[tuple[int, ...]]]


def encoded(content: Content) -> bytes:
    """What a file holds of a capture."""
    graph, stored, shapes = content
    text = msgspec.json.encode(_Content(graph, [*map(TensorLine.of, stored)], shapes))
    body = b"".join([len(text).to_bytes(8, "little"), text, *map(as_bytes, stored)])
    return _MARK + hashlib.sha256(body).digest() + body


def decoded(blob: bytes) -> Content:
    """The capture of a file.

    Raises:
        ValueError: the file is damaged, or none of these.
    """
    begins = len(_MARK) + _CHECKSUM
    body = memoryview(blob)[begins:]
    if not blob.startswith(_MARK) or hashlib.sha256(body).digest() != blob[len(_MARK) : begins]:
        raise ValueError("the file was changed or cut off")
    begins = 8 + int.from_bytes(body[:8], "little")
    content = msgspec.json.decode(body[8:begins], type=_Content)
    stored = []
    for line in content.stored:
        made = line.empty()
        size = made.numel() * made.element_size()
        if size:
            values = torch.frombuffer(bytearray(body[begins : begins + size]), dtype=made.dtype)
            made.copy_(values.view(made.shape))
        stored.append(made)
        begins += size
    return Content(content.graph, stored, content.shapes)
