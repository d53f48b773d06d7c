"""Weights kept elsewhere, on a machine with one device: what is moved is counted, and what is not is missed.

Nothing may be computed with a weight where it is kept; copies of it are counted.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook
from diffusers.hooks import group_offloading
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


class Stream:
    """Stands in for a stream on which copies run; they have ended when they were asked for."""

    def synchronize(self) -> None:
        return None

    wait_stream = record_event = synchronize


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Within, the CPU has streams and pinned memory, as far as offloading by groups asks for them."""
    with (
        patch.object(torch.cpu, "stream", lambda stream: contextlib.nullcontext()),
        patch.object(torch.cpu, "current_stream", lambda *_: Stream()),
        patch.object(torch.Tensor, "pin_memory", lambda self: self.clone()),
        patch.object(torch.Tensor, "is_pinned", lambda self: True),
    ):
        yield


def in_groups(level: str, folder: Path | None = None, stream: bool = False) -> Callable[[nn.Module], None]:
    def enable(model: nn.Module) -> None:
        config = group_offloading.GroupOffloadingConfig(
            onload_device=CPU,
            offload_device=CPU,
            offload_type=group_offloading.GroupOffloadingType(level),
            non_blocking=stream,
            record_stream=False,
            low_cpu_mem_usage=False,
            num_blocks_per_group=1,
            offload_to_disk_path=None if folder is None else str(folder),
            stream=Stream() if stream else None,
            block_modules=getattr(model, "_group_offload_block_modules", None),
            exclude_kwargs=getattr(model, "_skip_keys", None),
        )
        group_offloading._apply_group_offloading(model, config)

    return enable


def sequentially(model: nn.Module) -> None:
    cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)


class Moves(TorchDispatchMode):
    """Counts what a plan fetches, and refuses all else that is done with weights where they are kept.

    Args:
        kept: the weights by name, as they are kept in memory; those in files have no names.
    """

    def __init__(self, kept: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = {tensor.untyped_storage()._cdata: name for name, tensor in kept.items()}
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func.overloadpacket
        for tensor in filter(lambda item: isinstance(item, torch.Tensor), args):
            name = self.names.get(tensor.untyped_storage()._cdata, "")
            if kind is torch.ops.graphcache.fetch:
                self.counts[name] += 1
                self.bytes += nbytes(tensor)
            elif name:
                assert kind is torch.ops.aten.detach, f"{func} computes with {name}, which is elsewhere"
        return func(*args, **(kwargs or {}))


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class HookMoves:
    """Within, counts the bytes that the libraries' own hooks bring."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> "HookMoves":
        onload, align = group_offloading.ModuleGroup.onload_, AlignDevicesHook.pre_forward

        def onloads(group: Any) -> None:
            tensors = [item for module in group.modules for item in (*module.parameters(), *module.buffers())]
            self.bytes += sum(
                map(nbytes, {id(t): t for t in (*tensors, *group.parameters, *group.buffers)}.values())
            )
            onload(group)

        def aligns(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = align(hook, module, *args, **kwargs)
            if hook.offload:
                self.bytes += sum(map(nbytes, module.parameters(recurse=False)))
            return result

        self._patches = contextlib.ExitStack()
        self._patches.enter_context(patch.object(group_offloading.ModuleGroup, "onload_", onloads))
        self._patches.enter_context(patch.object(AlignDevicesHook, "pre_forward", aligns))
        return self

    def __exit__(self, *_: Any) -> None:
        self._patches.close()
