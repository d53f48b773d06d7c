"""Every private name of PyTorch's compilers that graphcache uses, and why.

Importing Dynamo and Inductor takes a second, and a model may be run that was compiled elsewhere: they are
looked for where something is compiled first.
"""

from typing import Any

import torch

from graphcache.libraries.private import names_of

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

EXPORT_LOG: str = _non_strict.__name__
