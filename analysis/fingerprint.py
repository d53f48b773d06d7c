"""Which model a plan was made for."""

import hashlib

from graphcache.ir.graph import StepGraph


def fingerprint(step: StepGraph) -> str:
    """A word that tells models apart by their weights' shapes and their branches.

    It does not depend on the inputs' sizes, the weights' values or dtypes, or the libraries' versions.
    """
    weights = dict(step.root.named_parameters())
    for call in step.opaque:
        weights |= {f"model.{call.place}.{name}": w for name, w in call.module.named_parameters()}
    lines = [f"{name} {tuple(value.shape)}" for name, value in sorted(weights.items())]
    lines += [f"{branch.name} {branch.role}" for branch in step.branches]
    return "m" + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:15]
