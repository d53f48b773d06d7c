"""Tensors and their memory known again, and how often they were written."""

import weakref

import torch

from graphcache.libraries.torch_private import storage_of, version_of

Stamp = tuple[weakref.ref[torch.Tensor], int]
"""A tensor, which is not kept alive, and how often it had been written; -1 if it does not count that."""


def version(tensor: torch.Tensor | None) -> int:
    """Counts changes in place; inference tensors have no count."""
    return -1 if tensor is None or tensor.is_inference() else version_of(tensor)


def stamp(tensor: torch.Tensor) -> Stamp:
    """By which the same tensor, unchanged, is known again."""
    return weakref.ref(tensor), version(tensor)


def memory(tensor: torch.Tensor) -> int:
    """Identifies what a tensor's values lie in; those without memory of their own by themselves."""
    try:
        return storage_of(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return id(tensor)
