"""Operations that move cached values between the device and pinned host memory beside its work.

They are custom operations, so that compilers keep them where a pass puts them. On other devices than CUDA
they copy.
"""

import functools
from typing import Any

import torch
from torch import Tensor


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
