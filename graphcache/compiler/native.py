"""Native code that was compiled ahead of time, run without any compiler."""

import operator
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from graphcache.ir.data import TensorLine
from graphcache.ir.errors import GraphCacheError
from graphcache.libraries.torch_private import aot_runner

_ADDRESS = operator.methodcaller("data_ptr")


class Code:
    """A library with weights of its own; called with tensors of the layouts that it was compiled for, at
    which it does not look.

    It reads its weights where they were when they were bound: what is written there, it sees. `owner`: of the
    files, which is kept as long as the code.
    """

    def __init__(self, files: Sequence[Path], device: str, owner: object = None) -> None:
        library = next(file for file in files if file.suffix == ".so")
        self._owner = owner
        self._runner = aot_runner(device, str(library))
        self.names: list[str] = [*self._runner.get_constant_names_to_original_fqns().values()]
        self._bound: dict[str, torch.Tensor] = {}

    def bind(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give it all its weights, by the names that it has for them."""
        # kept alive, since the code has their addresses
        self._bound = {name: weight.detach() for name, weight in weights.items()}
        if self._bound:
            self._runner.update_constant_buffer(self._bound, False, True, True)

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        results: list[torch.Tensor] = self._runner.run(list(tensors))
        return results


class Unpacked:
    """A library's files in a folder of this user's own, which lies there as long as code of it runs.

    Raises:
        GraphCacheError: they cannot be written.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        folder = tempfile.mkdtemp(prefix="graphcache-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._paths = [Path(folder, Path(name).name) for name in files]
        try:
            for path, data in zip(self._paths, files.values(), strict=True):
                path.write_bytes(data)
        except OSError as error:
            raise GraphCacheError(f"the package's code cannot be unpacked: {error}") from error

    def code(self, device: str) -> Code:
        """The library once more, for weights of its own.

        Raises:
            GraphCacheError: it cannot be loaded here.
        """
        try:
            return Code(self._paths, device, self)
        except (RuntimeError, StopIteration) as error:
            raise GraphCacheError(f"the package's code cannot be loaded: {error}") from error


def last_read(reads: Sequence[Iterable[int]], kept: Iterable[int]) -> list[list[int]]:
    """Of parts that work one after the other on a table of values: what is behind each forgotten.

    Args:
        reads: for each part the places that it reads or writes.
        kept: those that are never forgotten.
    """
    last = {place: i for i, places in enumerate(reads) for place in places}
    kept = {*kept}
    return [[place for place, at in last.items() if at == i and place not in kept] for i in range(len(reads))]


@dataclass(frozen=True)
class Part:
    """A part of a graph: code, the layouts that it was compiled for, and the places in a table of values that
    it reads and writes.
    """

    code: Code
    fed: Sequence[TensorLine]
    inputs: Sequence[int]
    results: Sequence[int]


class Native:
    """Native code of a graph, part after part on a table of values; called with the input ports' tensors.

    Native code looks at no layouts. Whatever arrives at a part is compared with what it was compiled for, and
    copied where it differs. Calls whose inputs have the strides of the call before copy the same: the strides
    of what native code returns never change. What the graph returns has the layouts that other graphs read.

    Args:
        parts: in their order.
        results: the places of what is returned; the inputs come first in the table.
        returned: how that is laid out.
    """

    def __init__(self, parts: Sequence[Part], results: Sequence[int], returned: Sequence[TensorLine]) -> None:
        self._parts, self._results, self._returned = parts, results, returned
        dropped = last_read([(*part.inputs, *part.results) for part in parts], results)
        self._calls = [
            (part.code, part.inputs, part.results, behind)
            for part, behind in zip(parts, dropped, strict=True)
        ]
        self._size = 1 + max((place for part in parts for place in part.results), default=0)
        # the only part of a whole graph takes and gives everything as it comes
        self._whole = len(parts) == 1 and [*results] == [*parts[0].results]
        self._latest = _Copies()

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        strides, latest = [tensor.stride() for tensor in tensors], self._latest
        if strides != latest.strides:
            return self._compared(tensors, strides)
        if self._whole and not latest.any_fed:
            results = self._parts[0].code(*tensors)
        else:
            values: list[Any] = [*tensors, *[None] * (self._size - len(tensors))]
            for (code, inputs, places, dropped), copied in zip(self._calls, latest.fed, strict=True):
                fed = [values[place] for place in inputs]
                for i, line in copied:
                    fed[i] = line.laid(fed[i])
                for place, value in zip(places, code(*fed), strict=True):
                    values[place] = value
                for place in dropped:
                    values[place] = None
            results = [values[place] for place in self._results]
        for i, line in latest.returned:
            results[i] = line.laid(results[i])
        return results

    def _compared(
        self, tensors: Sequence[torch.Tensor], strides: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        """What a call returns in which everything is looked at; its copies are known from then on."""
        values, copied = dict(enumerate(tensors)), []
        for part, (_, _, _, dropped) in zip(self._parts, self._calls, strict=True):
            fed, copies = _laid(part.fed, [values[place] for place in part.inputs])
            copied.append(copies)
            values |= zip(part.results, part.code(*fed), strict=True)
            for place in dropped:
                del values[place]
        results, copies = _laid(self._returned, [values[place] for place in self._results])
        # other threads may be within a call
        self._latest = _Copies(strides, copied, copies)
        return results


_Copied = Sequence[tuple[int, TensorLine]]
"""Places in a list of tensors, and the layouts that the ones there are copied to."""


@dataclass(frozen=True)
class _Copies:
    """What is copied in calls whose inputs have these strides: before each part, and of the results."""

    strides: list[tuple[int, ...]] | None = None
    fed: Sequence[_Copied] = ()
    returned: _Copied = ()

    @cached_property
    def any_fed(self) -> bool:
        return any(self.fed)


def _laid(lines: Sequence[TensorLine], tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], _Copied]:
    """Tensors in these layouts, and what had to be copied for it."""
    found = [line.laid(tensor) for line, tensor in zip(lines, tensors, strict=True)]
    return found, [(i, lines[i]) for i, tensor in enumerate(tensors) if found[i] is not tensor]


class Following:
    """Code of a model that is at hand: it follows the weights wherever they are moved, as by `model.to`."""

    def __init__(self, native: Native, codes: Sequence[tuple[Code, Mapping[str, torch.Tensor]]]) -> None:
        self._native = native
        self._codes = codes
        self._weights = [weight for _, weights in codes for weight in weights.values()]
        self._addresses: list[int] = []

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        addresses = [*map(_ADDRESS, self._weights)]
        if addresses != self._addresses:
            for code, weights in self._codes:
                code.bind(weights)
            self._addresses = addresses
        return self._native(*tensors)
