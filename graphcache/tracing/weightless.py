"""A model without its weights' values: what it makes of a call has sizes, and takes no time or memory."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import StepGraph
from graphcache.libraries.torch_private import FakeTensor, FakeTensorMode, tree_leaves, tree_map_only
from graphcache.tracing.opaque import is_foreign

_BY_MASK = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


def weightless(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are fake tensors, on the devices that they are on.

    What a call computes of its inputs alone stays real, so that forward may look at masks and lengths.
    Weights of a class that adds to the numbers are shared with the model.

    Raises:
        CaptureError: something that the model holds cannot be copied.
    """
    mode = _mode()
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor if is_foreign(tensor) else _fake(mode, tensor)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(f"the model cannot be copied without its weights: {error}") from error


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_inference():
        return mode.from_tensor(tensor)
    with torch.inference_mode(False), mode:
        kind: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
        made = torch.empty_strided(tensor.shape, tensor.stride(), **kind)
        return nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made


def _mode() -> FakeTensorMode:
    return _Weightless(allow_non_fake_inputs=True)


class _Weightless(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Beside fake tensors, a real mask still says which places it leaves."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _BY_MASK:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        return super().__torch_dispatch__(func, types, args, kwargs)


def _places(index: Any) -> tuple[Any, ...]:
    is_mask = isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
    return index.nonzero(as_tuple=True) if is_mask and not isinstance(index, FakeTensor) else (index,)


class _Sizing(fx.Interpreter):
    """Finds what sizes that depend on values are for real inputs."""

    known: dict[Any, int]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        pairs = zip(tree_leaves(n.meta.get("val")), tree_leaves(value), strict=False)
        for said, found in pairs:
            for size, number in zip(getattr(said, "shape", ()), getattr(found, "shape", ()), strict=False):
                if isinstance(size, torch.SymInt):
                    self.known[size.node.expr] = int(number)
        return value


def sizes_for(step: StepGraph, tensors: Sequence[torch.Tensor]) -> Mapping[Any, int]:
    """Of the sizes of a graph that depend on values, what they are for these inputs.

    Raises:
        CaptureError: they depend on the weights' values too, which are not there.
    """
    sizing = _Sizing(step.module)
    sizing.known = {}
    try:
        with torch.no_grad():
            sizing.run(*tensors)
    except Exception as error:
        raise CaptureError(f"sizes within the model depend on its weights: {error}") from error
    return sizing.known


def settled(step: StepGraph, sizes: Mapping[Any, int]) -> StepGraph:
    """A graph with numbers for the sizes that depend on values, good for counting alone."""

    def whole(value: torch.Tensor) -> torch.Tensor:
        shape = [size if isinstance(size, int) else int(size.node.expr.subs(sizes)) for size in value.shape]
        return torch.empty(shape, dtype=value.dtype, device="meta")

    graph, _ = step.copy()
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(torch.Tensor, whole, node.meta["val"])
    return step.rebuilt(graph)
