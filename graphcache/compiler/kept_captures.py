"""Captures kept on disk: found by a digest of all that tracing looks at, and used once they have computed the
model's own bits.
"""

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from graphcache.compiler.capture_file import Content, decoded, encoded
from graphcache.compiler.captured import Captured, examples_of, strides_of
from graphcache.compiler.modes import ambient
from graphcache.ir.call import CallSpec
from graphcache.ir.errors import CaptureError, GraphCacheError
from graphcache.ir.graph import StepGraph, layout
from graphcache.ir.graph_data import graph_data, run_described, step_of
from graphcache.ir.plantext import write_bytes
from graphcache.libraries.exclusive import COMPILING
from graphcache.tracing.model_digest import ModelDigest
from graphcache.tracing.real_call import really_called
from graphcache.tracing.sized_call import SizedCall
from graphcache.tracing.sized_graph import Shapes, SizedGraph, StoredTrace
from graphcache.tracing.symbolic import Symbolic

log = logging.getLogger("graphcache")

MOST_TRACES = 4
"""Of one kind of calls: a model may fold otherwise at some sizes, as where a batch is 1."""
_ROOMS = ("libraries", "ir", "analysis", "passes", "tracing", "compiler")
"""Whose code has a part in what is kept."""
_MOST = 256
"""Files in a folder; those that were used least recently go when another is written."""


class KeptCaptures:
    """The captures in a folder; without one nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def captured(
        self,
        model: nn.Module,
        call: CallSpec,
        tensors: Sequence[Tensor],
        split: bool,
        trace: Callable[[], Captured],
    ) -> Captured:
        """The capture of a call from the folder, or else traced, and kept if it can be.

        Args:
            model: the original.
            call: how the tensors make up the call.
            tensors: its leaves.
            split: fused branches as two sites.
            trace: captures the call.
        """
        if self._folder is None:
            return trace()
        with COMPILING:  # tracing changes a model for a while
            examples = examples_of(tensors)
            try:
                inputs = [(*layout(tensor), tensor.requires_grad) for tensor in examples]
                digest = ModelDigest(model, _around(call, inputs, split))
            except CaptureError as error:
                return self.left_out(model, error, trace)
            path = self._folder / f"{digest}.capture"
            found = self._read(path, digest, model, call, examples)
            if found is None:
                found = trace()
                if found.conditions is None:
                    self._write(path, digest, found.step)
                else:
                    log.info("the capture is not kept: forward asks for values")
        return replace(found, kept=self)

    def left_out(self, model: nn.Module, why: object, trace: Callable[[], Captured]) -> Captured:
        """A traced capture that is not kept, which the log tells where others are."""
        if self._folder is not None:
            log.info("%s is captured anew in each process: %s", type(model).__name__, why)
        return trace()

    def traces(self, model: nn.Module, call: CallSpec, examples: Sequence[Tensor]) -> list[SizedGraph]:
        """The traces with symbols in the folder for calls that differ from this one in sizes alone."""
        found = list[SizedGraph]()
        if self._folder is None:
            return found
        with contextlib.suppress(CaptureError):
            digest, sized = _of_any_size(model, call, examples)
            now = _shapes(sized, examples)
            for path in filter(os.path.exists, _paths(self._folder, digest)):
                with _reading(path):
                    graph, stored, shapes = decoded(path.read_bytes())
                    step = step_of(graph, sized, digest.tensors, stored)
                    found.append(StoredTrace.of(sized, step, shapes, now))
        return found

    def keep_trace(
        self, model: nn.Module, call: CallSpec, examples: Sequence[Tensor], trace: Symbolic
    ) -> None:
        """Keep a trace with symbols that was made for a call."""
        if self._folder is None:
            return
        if trace.call.sizes != SizedCall.made_of(call).sizes:
            log.info("the trace is not kept: it is for the numbers of one call alone")
            return
        with contextlib.suppress(CaptureError):
            digest, sized = _of_any_size(model, call, examples)
            shapes = [_shapes(sized, examples), *filter(None, map(trace.other_shapes, (False, True)))]
            path = next(itertools.filterfalse(os.path.exists, _paths(self._folder, digest)), None)
            if path:
                self._write(path, digest, trace.step, shapes)

    def _read(
        self, path: Path, digest: ModelDigest, model: nn.Module, call: CallSpec, examples: list[Tensor]
    ) -> Captured | None:
        if not os.path.exists(path):  # pathlib raises where it may not look
            return None
        called = really_called(model, call, examples)
        with _reading(path):
            graph, stored, _ = decoded(path.read_bytes())
            step = step_of(graph, call, digest.tensors, stored)
            if not called.is_that_of(functools.partial(run_described, step)):
                raise ValueError("it does not compute what the model does")
            return Captured(step, call, called.output, strides_of(examples), from_disk=True)
        return None

    def _write(self, path: Path, digest: ModelDigest, step: StepGraph, shapes: Sequence[Shapes] = ()) -> None:
        try:
            places = {id(tensor): place for place, tensor in enumerate(digest.tensors)}
            blob = encoded(Content(*graph_data(step, places, bool(shapes)), [*map(list, shapes)]))
        except CaptureError as error:
            log.info("the capture is not kept: %s", error)
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(blob, path)
        except (OSError, GraphCacheError) as error:
            log.warning("the capture is not kept: %s", error)
            return
        with contextlib.suppress(OSError):  # another process may drop the same ones
            _drop_old(path.parent)


def _paths(folder: Path, digest: ModelDigest) -> list[Path]:
    return [folder / f"{digest}-{place}.capture" for place in range(MOST_TRACES)]


def _shapes(call: SizedCall, examples: Sequence[Tensor]) -> Shapes:
    return [tuple(tensor.shape) for tensor in (*examples, *call.stand_ins())]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Notes that a file is used. Whatever fails with what is in it is told, and the file dropped."""
    try:
        yield
    except Exception as error:
        log.warning("%s is made anew: %s: %s", path, type(error).__name__, error)
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        with contextlib.suppress(OSError):
            os.utime(path)


def _of_any_size(
    model: nn.Module, call: CallSpec, examples: Sequence[Tensor]
) -> tuple[ModelDigest, SizedCall]:
    sized = SizedCall.made_of(call)
    inputs = [(tensor.dtype, tensor.device, tensor.dim(), tensor.requires_grad) for tensor in examples]
    return ModelDigest(model, _around(sized, inputs)), sized


def _around(call: CallSpec, *inputs: Any) -> Any:
    """What a capture depends on beside the model."""
    roles = call.leaf_names, call.latents, call.times, call.numbers, sorted(call.positional_only)
    modes = ambient(), torch.get_default_dtype(), torch.get_default_device()
    return _versions(), modes, call.template, roles, inputs


@functools.cache
def _versions() -> tuple[str, ...]:
    """Of graphcache that is its source."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for room in _ROOMS:
        for file in sorted((package / room).glob("*.py")):
            digest.update(file.read_bytes())
    torch_version = f"{torch.__version__} {torch.version.git_version}"
    return digest.hexdigest(), torch_version, sys.version, np.__version__, msgspec.__version__


def _drop_old(folder: Path) -> None:
    files = sorted(folder.glob("*.capture"), key=lambda file: file.stat().st_mtime)
    for file in files[:-_MOST]:
        file.unlink(missing_ok=True)
