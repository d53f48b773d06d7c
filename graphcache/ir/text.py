"""Graphs as text: stable across captures, short enough to read in a diff."""

from typing import Any

import torch
from torch import fx

from graphcache.ir.graph import StepGraph
from graphcache.ir.opaque import called

_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}


def describe(value: Any) -> str:
    """Dtype and shape of a tensor, such as `f32[2,16]`."""
    if isinstance(value, torch.Tensor):
        name = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{name}[{','.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe(item) for item in value)})"
    return type(value).__name__


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item) for item in value)}]"
    return str(value).removeprefix("torch.")


def _operation(node: fx.Node) -> str:
    target = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
    arguments = [_argument(item) for item in node.args]
    call = called(node)
    if call is not None:
        arguments[0] = call.place  # the number is another one in each capture
    arguments += [f"{key}={_argument(item)}" for key, item in node.kwargs.items()]
    return f"{target}({', '.join(arguments)})"


def render(step: StepGraph) -> str:
    """The graph as text, one line a node; parameters are named where they are used first."""
    ports = {node: port for port, node in step.ports()}
    sites = {branch.value: branch.name for branch in step.branches}
    lines = []
    for node in step.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            text = str(ports[node])
        elif node.op == "get_attr":
            text = f"weight {str(node.target).removeprefix('model.')}"
        else:
            text = _operation(node)
        site = f"  <- {sites[node.name]}" if node.name in sites else ""
        lines.append(f"%{node.name} = {text} : {describe(node.meta.get('val'))}{site}")
    for port, node in zip(step.outputs, step.results(), strict=True):
        lines.append(f"{port} = %{node.name}")
    return "\n".join(lines)
