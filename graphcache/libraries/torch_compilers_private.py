"""Every private name of PyTorch's compilers that graphcache uses, and why.

Importing Dynamo and Inductor takes a second, and a model may be run that was compiled elsewhere: they are
looked for where something is compiled first.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from graphcache.libraries.private import attribute, names_of

with names_of("torch"):
    # the backend that a user chose, behind what Dynamo puts around it
    from torch._dynamo.eval_frame import innermost_backend as innermost_backend

    # where the symbol of a size comes from
    from torch._dynamo.source import ConstantSource as ConstantSource

    # where PyTorch logs which sizes it takes for constants
    from torch._export import non_strict_utils as _non_strict

    # the number of iterations under CUDA graphs that PyTorch was told of
    from torch._inductor.cudagraph_trees import MarkStepBox as MarkStepBox

    # a phase is compiled as one graph
    dynamo_options: Any = torch._dynamo.config.patch
    error_on_graph_break: Any = torch._dynamo.error_on_graph_break
    # torch.compile's `mode` spelt out, and whether CUDA graphs are on for all
    list_mode_options: Any = torch._inductor.list_mode_options
    inductor_config: Any = torch._inductor.config
    # Inductor's code for one graph without torch.compile's way to it, which takes longer than a small region
    standalone_compile: Any = torch._inductor.standalone_compile
    # a graph as native code, which is given its weights when it is loaded
    aot_compile: Any = torch._inductor.aot_compile

    # where export looks through all nodes for symbols that depend on data
    from torch.export import _trace as _tracing

    _trace: Any = _tracing
    attribute(_trace, "_replace_unbacked_bindings")

EXPORT_LOG: str = _non_strict.__name__


@contextlib.contextmanager
def unbacked_symbols_where_there_are_any() -> Iterator[None]:
    """Export names them anew in each node, a thirteenth of its time, also in graphs that have none."""
    look = _trace._replace_unbacked_bindings

    def look_if_any(module: torch.fx.GraphModule) -> None:
        if any("unbacked_bindings" in node.meta for node in module.graph.nodes):
            look(module)

    _trace._replace_unbacked_bindings = look_if_any
    try:
        yield
    finally:
        _trace._replace_unbacked_bindings = look
