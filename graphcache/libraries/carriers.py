"""Hooks of accelerate and diffusers that keep a model's weights elsewhere and bring them for each forward."""

import contextlib
import sys
from collections.abc import Hashable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from graphcache.libraries import accelerate_private, diffusers_private

Slot = tuple[int, str]
"""A place in a module's table of parameters or buffers: the table's identity and the name."""


class Kept(NamedTuple):
    """A weight that is kept elsewhere, see `ir/home`; `table[name]` stands for it in its module."""

    table: dict[str, Any]
    name: str
    device: torch.device
    unit: Hashable
    read: Any

    @property
    def slot(self) -> Slot:
        return id(self.table), self.name


def is_carrier(hook: Any) -> bool:
    """Whether all that a hook does is to move weights, and inputs to where they are."""
    return type(hook) in _kinds("diffusers.hooks.group_offloading", _OF_DIFFUSERS) or type(hook) in _kinds(
        "accelerate.hooks", _OF_ACCELERATE
    )


_OF_DIFFUSERS = ("GroupOffloadingHook", "LazyPrefetchGroupOffloadingHook", "LayerExecutionTrackerHook")
_OF_ACCELERATE = ("AlignDevicesHook", "CpuOffload")


def _kinds(module: str, names: Iterable[str]) -> list[Any]:
    """Classes of a module, where it is loaded: nobody has their hooks otherwise."""
    return [getattr(sys.modules.get(module), name, None) for name in names]


def has_carriers(modules: Iterable[nn.Module]) -> bool:
    """Whether some hook moves weights of modules."""
    traces = (diffusers_private.REGISTRY, *accelerate_private.HOOKS)
    hooked = [module for module in modules if not module.__dict__.keys().isdisjoint(traces)]
    return any(
        is_carrier(hook)
        for module in hooked
        for hook in (*accelerate_private.hooks_of(module), *diffusers_private.hooks_of(module))
    )


def moves_a_whole_model(hook: Any) -> bool:
    """Whether a hook brings all of a model for its first forward, and leaves it there."""
    return type(hook) in _kinds("accelerate.hooks", ["CpuOffload"])


def kept_elsewhere(modules: Iterable[nn.Module]) -> Iterable[Kept]:
    """The weights that hooks around these modules keep elsewhere, each once."""
    modules, found = list(modules), dict[Slot, Kept]()
    if not has_carriers(modules):
        return ()
    for kept in _kept(modules):
        found.setdefault(kept.slot, kept)
    return found.values()


def _kept(modules: list[nn.Module]) -> Iterator[Kept]:
    for module in modules:
        for hook in accelerate_private.hooks_of(module):
            if type(hook) in _kinds("accelerate.hooks", ["AlignDevicesHook"]) and hook.offload:
                yield from _of_one(module, hook)
    groups = {
        id(hook.group): hook.group
        for module in modules
        for hook in diffusers_private.hooks_of(module)
        if type(hook) in _kinds("diffusers.hooks.group_offloading", ["GroupOffloadingHook"])
    }
    if groups:
        slots: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in modules:
            for table in tables(module):
                for name, tensor in table.items():
                    slots.setdefault(id(tensor), []).append((table, name))
        for group in groups.values():
            yield from _of_group(group, slots)


def tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's own parameters and buffers."""
    return module._parameters, module._buffers


def _of_one(module: nn.Module, hook: Any) -> Iterator[Kept]:
    """What accelerate keeps for a module, or for all in it; the module itself has empty tensors."""
    from accelerate.utils import named_module_tensors

    names = named_module_tensors(
        module,
        include_buffers=hook.offload_buffers,
        recurse=hook.place_submodules,
        remove_non_persistent=True,
    )
    for path, _ in [*names]:
        *outer, name = path.split(".")
        inner = module.get_submodule(".".join(outer))
        table = next(table for table in tables(inner) if name in table)
        read = partial(_mapped, hook.weights_map, path, table, name)
        yield Kept(table, name, _device(hook.execution_device), id(module), read)


def _device(named: Any) -> torch.device:
    """As tensors on it say it: with an index where it has one."""
    return torch.empty(0, device=named).device


def _mapped(weights: Any, path: str, table: dict[str, Any], name: str) -> torch.Tensor:
    value: torch.Tensor = weights[path].to(table[name].dtype)
    return value


def _of_group(group: Any, slots: dict[int, list[tuple[dict[str, Any], str]]]) -> Iterator[Kept]:
    """What diffusers keeps for a group of modules, in host memory or in a file."""
    tensors = [tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())]
    for tensor in (*tensors, *group.parameters, *group.buffers):
        for table, name in slots[id(tensor)]:
            read: Any = partial(table.__getitem__, name)
            if group.offload_to_disk_path is not None:
                read = partial(_filed, group.safetensors_file_path, group.tensor_to_key[tensor])
            elif group.stream is not None:  # what is cast in its place is not what comes
                read = partial(group.cpu_param_dict.__getitem__, tensor)
            yield Kept(table, name, _device(group.onload_device), id(group), read)


def _filed(path: str, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        value: torch.Tensor = file.get_tensor(key)
    return value


@contextlib.contextmanager
def carriers_stilled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, no weight is moved: what is traced is the forward that they stand around."""
    modules = list(modules)
    with contextlib.ExitStack() as stack:
        for module in modules:
            if any(map(is_carrier, accelerate_private.hooks_of(module))):
                stack.enter_context(accelerate_private.stilled(module))
            for hook in filter(is_carrier, diffusers_private.hooks_of(module)):
                stack.enter_context(diffusers_private.stilled(hook))
        yield
