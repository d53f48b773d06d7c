"""Which model a plan was made for."""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from graphcache.ir.graph import StepGraph


def fingerprint(step: StepGraph) -> str:
    """A word that tells models apart by their weights' shapes and their branches.

    It does not depend on the inputs' sizes, the weights' values or dtypes, or the libraries' versions.
    """
    shapes = {name: weight.shape for name, weight in step.root.named_parameters()}
    shapes |= step.packed
    for call in step.opaque:
        shapes |= {f"model.{call.place}.{name}": shape for name, shape in _shapes(call.module)}
    lines = [f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items())]
    lines += [f"{branch.name} {branch.role}" for branch in step.branches]
    return "m" + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:15]


def _shapes(module: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """Of a module's weights; a linear layer's may be packed, and stand for a matrix all the same."""
    for path, part in module.named_modules():
        for name, weight in part.named_parameters(path, recurse=False):
            is_matrix = isinstance(part, nn.Linear) and part.weight is weight
            yield name, torch.Size((part.out_features, part.in_features)) if is_matrix else weight.shape
