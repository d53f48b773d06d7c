"""A call of a module that cannot be traced, as one operation of a graph."""

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcache.ir.errors import StateError
from graphcache.libraries.torch_private import DispatchKey, ForceDispatchKeys, keys_excluded, keys_included

_AUTOGRAD = (DispatchKey.AutogradFunctionality, DispatchKey.AutogradOther, DispatchKey.AutogradNestedTensor)
_TAGS = [
    getattr(torch.Tag, name)
    for name in ("needs_exact_strides", "cudagraph_unsafe")
    if hasattr(torch.Tag, name)
]


_NUMBERS = itertools.count(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Opaque(ABC):
    """A call of a module that was not traced, and what is known of it.

    `place` is the module's path, `cause` why it is not traced, `flops` what a real call took, and `attends`
    whether PyTorch's attention ran in it. `described` are the layouts of its results, by `describe_layouts`.
    `number` stands for the call in graphs.
    """

    place: str
    cause: str
    module: nn.Module
    flops: int
    attends: bool
    described: str
    number: int = field(default_factory=_NUMBERS.__next__)

    @property
    @abstractmethod
    def key(self) -> str:
        """Equal for calls that do the same."""

    @abstractmethod
    def trained(self) -> list[Tensor]:
        """The module's parameters that need gradients, as many as the operation is given weights."""

    @abstractmethod
    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The module's results, none of which shares memory with another tensor."""


class _Calls:
    """What the numbers in graphs stand for, as long as a captured step owns it; no number is used twice."""

    def __init__(self) -> None:
        self._by_number: weakref.WeakValueDictionary[int, Opaque] = weakref.WeakValueDictionary()
        self._by_key: weakref.WeakValueDictionary[str, Opaque] = weakref.WeakValueDictionary()

    def known(self, call: Opaque) -> Opaque:
        call = self._by_key.setdefault(call.key, call)
        self._by_number[call.number] = call
        return call

    def find(self, number: int) -> Opaque:
        call = self._by_number.get(number)
        if call is None:
            raise StateError(
                f"opaque call {number} is gone with the capture that it belongs to; run the transformed "
                "model, which captures anew, instead of a graph that was taken out of it, copied or loaded"
            )
        return call


# operations of PyTorch's are global, and hold plain data alone
_CALLS = _Calls()


def known(call: Opaque) -> Opaque:
    """A call that does the same and is owned already, such as by code that was compiled; or this one."""
    return _CALLS.known(call)


def opaque_call(call: Opaque, tensors: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Run a call through its operation, which tracing records.

    Args:
        call: known, and owned by whoever runs the graph.
        tensors: what the module is given.
        weights: its parameters that need gradients; it computes with its own, gradients arrive at these.
    """
    made: list[Tensor] = torch.ops.graphcache.opaque(call.number, tensors, weights, call.described)
    return made


def describe_layouts(tensors: Sequence[Tensor]) -> str:
    """Dtype, device, shape and strides of tensors as text."""
    return "; ".join(
        f"{str(t.dtype).removeprefix('torch.')} {t.device} {_sizes(t.shape)} {_sizes(t.stride())}"
        for t in tensors
    )


def _sizes(sizes: Sequence[int]) -> str:
    return f"({','.join(map(str, sizes))})"


def _empty(results: str) -> Iterator[Tensor]:
    for text in results.split("; "):
        dtype, device, *both = text.split(" ")
        shape, stride = ([int(size) for size in sizes[1:-1].split(",") if size] for sizes in both)
        yield torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device=device)


def _as_outside() -> Any:
    """Autograd works as outside of operations, within which PyTorch switches it off."""
    excluded = keys_excluded()
    if not torch.is_inference_mode_enabled():
        for key in _AUTOGRAD:
            excluded = excluded.remove(key)
    return ForceDispatchKeys(keys_included(), excluded)


@torch.library.custom_op("graphcache::opaque", mutates_args=(), tags=_TAGS)
def _opaque(handle: int, tensors: list[Tensor], weights: list[Tensor], results: str) -> list[Tensor]:
    with _as_outside(), torch.no_grad():
        return _CALLS.find(handle).run(tensors)


@_opaque.register_fake
def _(handle: int, tensors: list[Tensor], weights: list[Tensor], results: str) -> list[Tensor]:
    return [*_empty(results)]


@torch.library.custom_op("graphcache::opaque_gradients", mutates_args=(), tags=_TAGS)
def _gradients(
    handle: int, inputs: list[Tensor], count: int, given: list[Tensor], places: list[int], wanted: list[int]
) -> list[Tensor]:
    """Gradients of the wanted ones of `count` tensors and the weights: the call once more, with its graph.

    `given` are the gradients of its results at `places`.
    """
    with _as_outside(), torch.enable_grad():
        tensors = [tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(inputs[:count])]
        call = _CALLS.find(handle)
        results = call.run(tensors)
        pairs = [(results[i], gradient) for i, gradient in zip(places, given, strict=True)]
        pairs = [(result, gradient) for result, gradient in pairs if result.requires_grad]
        leaves = [[*tensors, *call.trained()][i] for i in wanted]
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if pairs:
            sources, gradients = zip(*pairs, strict=True)
            found = torch.autograd.grad(sources, leaves, gradients, allow_unused=True)
    return [_laid(gradient, leaf) for gradient, leaf in zip(found, leaves, strict=True)]


@_gradients.register_fake
def _(
    handle: int, inputs: list[Tensor], count: int, given: list[Tensor], places: list[int], wanted: list[int]
) -> list[Tensor]:
    return [torch.empty_like(inputs[i]) for i in wanted]


def _laid(gradient: Tensor | None, leaf: Tensor) -> Tensor:
    made = torch.zeros_like(leaf.detach())
    return made if gradient is None else made.copy_(gradient)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.handle, tensors, weights, _ = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, *weights)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> Any:
    _, tensors, weights, _ = ctx.needs_input_grad
    needed = [*tensors, *weights]
    wanted = [i for i, is_needed in enumerate(needed) if is_needed]
    places = [i for i, gradient in enumerate(gradients) if gradient is not None]
    given = [gradients[i] for i in places]
    found = torch.ops.graphcache.opaque_gradients(
        ctx.handle, [*ctx.saved_tensors], ctx.count, given, places, wanted
    )
    made = dict(zip(wanted, found, strict=True))
    all_made = [made.get(i) for i in range(len(needed))]
    return None, all_made[: ctx.count], all_made[ctx.count :], None


_opaque.register_autograd(_backward, setup_context=_save)
OPAQUE: Any = torch.ops.graphcache.opaque.default


def called(node: fx.Node) -> Opaque | None:
    """What a node calls that was not traced, if it is such a call."""
    handle: Any = node.args[0] if node.target is OPAQUE else None
    return None if handle is None else _CALLS.find(handle)
