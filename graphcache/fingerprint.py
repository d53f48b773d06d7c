"""What a capture bakes in of a model, compared at the start of each generation."""

from typing import Any

from torch import nn

from graphcache.ir.errors import CaptureError

Fingerprint = tuple[Any, ...]

_PLAIN = (bool, int, float, str, type(None))
"""Attributes that tracing bakes in and that compare by value."""


def fingerprint(model: nn.Module) -> Fingerprint:
    """What a capture bakes in of a model's modules and weights, to be compared at each generation's start.

    Holds the objects themselves, so that none can be freed and its identity reused.

    Raises:
        CaptureError: training mode, or hooks, both of which a captured graph would lose silently.
    """
    if model._compiled_call_impl is not None:
        raise CaptureError(
            "the model was compiled by model.compile(); transform one that was not, with backend='inductor'"
        )
    found: list[Any] = []
    todo = [model]
    while todo:
        module = todo.pop()
        state = module.__dict__
        if module.training or state["_forward_hooks"] or state["_forward_pre_hooks"] or _is_replaced(module):
            raise _stateful(model, module)
        found.append(_Same(module))
        for value in (*state["_parameters"].values(), *state["_buffers"].values()):
            if value is not None:
                found += (_Same(value), value.dtype, value.device, value.requires_grad)
        found += [item for item in state.items() if item[1].__class__ in _PLAIN]
        todo.extend(child for child in state["_modules"].values() if child is not None)
    return tuple(found)


def _is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's own (diffusers leaves such behind)."""
    own = module.__dict__.get("forward")
    if own is None:
        return False
    return getattr(own, "__func__", None) is not type(module).forward or own.__self__ is not module


class _Same:
    """Compares by identity; tensors would compare by element."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _stateful(model: nn.Module, module: nn.Module) -> CaptureError:
    where = next((name for name, item in model.named_modules() if item is module), "") or "the model"
    if module.training:
        return CaptureError(f"{where} is in training mode; call model.eval() before the first generation")
    what = "forward hooks"
    if _is_replaced(module):
        what = "a forward of its own, set on the instance (accelerate's hooks do that)"
    return CaptureError(
        f"{where} has {what}, which would run once during the capture and never again; "
        "remove it (for diffusers' caches: model.disable_cache()) before transforming"
    )
