"""One real call of a model before it is traced, which leaves every tensor and random state as they were."""

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphcache.ir.errors import CaptureError
from graphcache.ir.versions import memory
from graphcache.libraries.exclusive import COMPILING
from graphcache.libraries.torch_private import OpOverload, TorchDispatchMode, disable_current_modes, schema_of
from graphcache.tracing.explanation import user_line
from graphcache.tracing.hooks import uncompiled

_AS_THEY_ARE = (CaptureError, MemoryError, torch.OutOfMemoryError)
_UNCOMPILED = "found no compiled frames"
"""What PyTorch says of code that has to be compiled, and is not since operations are watched."""
_COMPILES = (
    "forward lets code be compiled as a whole (flex attention does), which PyTorch does not do while a "
    "call's writes are watched; use code that is not compiled within forward. It fails"
)
Undo = Callable[[], bool]
"""Undoes writes, and says whether there were any."""


def rehearse(call: Callable[[], Any], devices: Iterable[torch.device]) -> Undo:
    """Call a model once, so that what it makes in its first call, and keeps out of sight, holds real values.

    Args:
        call: the model's call; its result is dropped.
        devices: on which the model computes.

    Returns:
        Undoes what the call wrote into tensors that are older.

    Raises:
        CaptureError: the call fails; then it is undone. Lack of memory is raised as it is.
    """
    writes = Writes()
    try:
        with disable_current_modes(), random_states_kept(devices), writes:
            call()
    except BaseException as error:
        writes.undo()
        if isinstance(error, _AS_THEY_ARE) or not isinstance(error, Exception):
            raise
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        what = _COMPILES if _UNCOMPILED in reason else "the model itself fails on this call"
        raise CaptureError(f"{what}{user_line(error)}: {reason}") from error
    finally:
        torch.clear_autocast_cache()
    return writes.undo


@contextlib.contextmanager
def alone(model: nn.Module, devices: Iterable[torch.device]) -> Iterator[None]:
    """Calls of a model within are its own forward's, without gradients, one thread's at a time, and draw no
    random numbers that others would have drawn.
    """
    with (
        COMPILING,
        uncompiled(model),
        torch.inference_mode(False),
        torch.no_grad(),
        random_states_kept(devices),
    ):
        yield


@contextlib.contextmanager
def random_states_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Whatever random numbers are drawn within, later ones are as if none had been."""
    numpy: Any = sys.modules.get("numpy")
    own, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    indices = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    try:
        with torch.random.fork_rng(indices):
            yield
    finally:
        random.setstate(own)
        if numpy:
            numpy.random.set_state(arrays)


class Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps a copy of every tensor older than itself before it is written to."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._effects: dict[Any, Effects] = {}
        self._new: set[int] = set()
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def written(self) -> list[torch.Tensor]:
        """The older tensors that were written to."""
        return [tensor for tensor, _ in self._copies]

    def undo(self) -> bool:
        """Write the copies back, the newest first, and say whether there are any."""
        copies, self._copies = self._copies, []
        for tensor, copy in reversed(copies):
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(copy)
        return bool(copies)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._effects:
            self._effects[func] = Effects.of(func)
        effects = self._effects[func]
        for tensor in effects.targets(args, kwargs):
            self._keep(tensor)
        result = func(*args, **kwargs)
        if effects.is_new:
            self._new.update(map(memory, _tensors(result)))
        return result

    def _keep(self, tensor: torch.Tensor) -> None:
        if memory(tensor) not in self._new:
            self._copies.append((tensor, tensor.clone()))


@dataclass(frozen=True, slots=True)
class Effects:
    """Of an operation: which arguments it writes to, and whether its results have memory of their own."""

    written: tuple[tuple[int, str], ...]
    is_new: bool

    @staticmethod
    def of(operation: Any) -> "Effects":
        if not isinstance(operation, OpOverload):
            return Effects((), False)
        schema = schema_of(operation)
        arguments = enumerate(schema.arguments)
        written = [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
        return Effects(tuple(written), all(one.alias_info is None for one in schema.returns))

    def targets(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
        """The tensors that a call writes to."""
        for index, name in self.written:
            yield from _tensors(args[index] if index < len(args) else kwargs.get(name))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (item for item in value if isinstance(item, torch.Tensor))
