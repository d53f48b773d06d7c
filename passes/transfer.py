"""Operations that move cached values and weights between the device and pinned host memory beside its work.

They are custom operations, so that compilers keep them where a pass puts them. On other devices than CUDA
they copy.
"""

import functools
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from graphcache.ir.errors import StateError
from graphcache.ir.graph import StepGraph
from graphcache.ir.home import Home


@functools.cache
def _transfers(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which all copies run, in the order in which they are asked for."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@torch.library.custom_op("graphcache::send", mutates_args=())
def send(value: Tensor) -> Tensor:
    """A copy in host memory that may still be under way; it is read by `fetch` alone."""
    if not value.is_cuda:
        return value.to("cpu", copy=True, memory_format=torch.contiguous_format)
    # compiled code may write into the value's memory again before the copy has ended
    staged = value.clone(memory_format=torch.contiguous_format)
    host = torch.empty_like(staged, device="cpu", pin_memory=True)
    stream = _transfers(value.device)
    stream.wait_stream(torch.cuda.current_stream(value.device))
    with torch.cuda.stream(stream):
        host.copy_(staged, non_blocking=True)
    staged.record_stream(stream)
    return host


@send.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format)


@torch.library.custom_op("graphcache::fetch", mutates_args=())
def fetch(host: Tensor, device: torch.device) -> Tensor:
    """Memory of the device that is being filled; `arrive` waits until it is."""
    if device.type != "cuda":
        return host.to(device, copy=True)
    made = torch.empty_like(host, device=device)
    stream = _transfers(made.device)
    # the memory may be in use by what was asked of the device before
    stream.wait_stream(torch.cuda.current_stream(made.device))
    with torch.cuda.stream(stream):
        made.copy_(host, non_blocking=True)
    return made


@fetch.register_fake
def _(host: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(host, device=device)


@torch.library.custom_op("graphcache::arrive", mutates_args=("values",))
def arrive(values: list[Tensor]) -> None:
    """Let the device's work wait for the copies that were asked for so far."""
    for device in {value.device for value in values if value.is_cuda}:
        torch.cuda.current_stream(device).wait_stream(_transfers(device))


@arrive.register_fake
def _(values: list[Tensor]) -> None:
    return None


SEND: Any = torch.ops.graphcache.send.default
FETCH: Any = torch.ops.graphcache.fetch.default
ARRIVE: Any = torch.ops.graphcache.arrive.default


def fetched(home: Home, stand_in: Tensor) -> Tensor:
    """A weight on its way to the device, to be awaited by `arrive`.

    Raises:
        StateError: it is not the one that a graph was made for.
    """
    made: Tensor = FETCH(home.read().detach(), home.device)
    if (made.shape, made.stride(), made.dtype) != (stand_in.shape, stand_in.stride(), stand_in.dtype):
        raise StateError(
            f"a weight of shape {tuple(made.shape)} and {made.dtype} was put where one of shape "
            f"{tuple(stand_in.shape)} and {stand_in.dtype} was captured; call model.reset(), and where "
            "weights are cast, cast them before they are offloaded"
        )
    return made


def here(step: StepGraph, name: str) -> Any:
    """What a graph names, where it can be computed with."""
    value = attrgetter(name)(step.root)
    home = step.homes.get(id(value))
    if home is None:
        return value
    made = fetched(home, value)
    ARRIVE([made])
    return made
