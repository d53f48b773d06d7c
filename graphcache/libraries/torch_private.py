"""Every private name of PyTorch that graphcache uses, and why; those of its compilers apart.

All are looked for when graphcache is imported, so that a version of PyTorch without one of them is told then.
PyTorch's compilers take a second to import: see `torch_compilers_private`.
The tables of a module, `MODULE_TABLES` and `FORWARD_HOOKS`, may be read by their names anywhere: modules are
saved with them, and everyone's extensions read them.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.attention
from torch import nn

from graphcache.libraries.private import attribute, names_of

MODULE_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""What a module holds: tracing and the watch follow it."""
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""What a graph would lose."""
COMPILED_CALL = "_compiled_call_impl"
"""What Module.compile() leaves on a module: tells its backend, and is put aside by tracing."""

with names_of("torch"):
    # torch.compiler.disable(recursive=False) would fail while another thread exports
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

    # what a torch.compile region around a model compiles with
    from torch._C._dynamo.eval_frame import get_eval_frame_callback as get_eval_frame_callback

    # operations with inner graphs, which are refused or inlined
    from torch._ops import HigherOrderOperator as HigherOrderOperator

    # what nodes of a captured graph call
    from torch._ops import OpOverload as OpOverload

    # why a model cannot be traced
    from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
    from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException

    # what describes a node's result
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor

    # where results of new nodes are made
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch._subclasses.fake_tensor import UnsupportedOperatorException as UnsupportedOperatorException

    # tracing's own tensors, which hide no numbers
    from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor

    # sees what a call writes to and what it costs
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

    # subclasses that tracing takes apart by itself
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass

    # arguments and results of operations, taken apart and put together
    from torch.utils._pytree import tree_flatten as tree_flatten
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map_only as tree_map_only
    from torch.utils._pytree import tree_unflatten as tree_unflatten

    for _table in (*MODULE_TABLES, *FORWARD_HOOKS):
        attribute(nn.Module(), _table)
    compiled_call = attribute(nn.Module, COMPILED_CALL)
    # calls a module past its compiled code, and is passed over on the stack
    MODULE_CALL: Any = nn.Module._call_impl

    # how often a tensor was written to
    version_of: Callable[[torch.Tensor], int] = attribute(torch.Tensor, "_version")
    # memory known again, of fake tensors too, which have no addresses
    storage_of: Callable[[torch.UntypedStorage], int] = attribute(torch.UntypedStorage, "_cdata")
    # which arguments an operation writes to
    schema_of = attribute(torch.ops.aten.add.Tensor, "_schema")

    # operations that stand in graphs
    CONJUGATE: Any = torch.ops.aten._conj.default
    INTEGER_MM: Any = torch.ops.aten._int_mm.default
    ITEM: Any = torch.ops.aten._local_scalar_dense.default
    SOFTMAX: Any = torch.ops.aten._softmax.default
    TO_COPY: Any = torch.ops.aten._to_copy.default
    UNSAFE_VIEW: Any = torch.ops.aten._unsafe_view.default
    # attention that returns the log-sum-exp of each query
    CPU_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    EFFICIENT_ATTENTION: Any = torch.ops.aten._scaled_dot_product_efficient_attention.default
    FLASH_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention.default

    # exchanges between processes as operations of a graph, which compilers see
    ALL_GATHER: Any = torch.ops._c10d_functional.all_gather_into_tensor.default
    ALL_REDUCE: Any = torch.ops._c10d_functional.all_reduce.default
    REDUCE_SCATTER: Any = torch.ops._c10d_functional.reduce_scatter_tensor.default
    ALL_TO_ALL: Any = torch.ops._c10d_functional.all_to_all_single.default
    WAIT: Any = torch.ops._c10d_functional.wait_tensor.default

    # which kernels attention may take, in which order, and which one it does
    allowed_kernels: Any = torch.nn.attention._cur_sdpa_kernel_backends
    kernel_priority: Any = torch._C._get_sdp_priority_order
    set_kernel_priority: Any = torch._C._set_sdp_priority_order
    chosen_kernel: Any = torch._fused_sdp_choice

    # within an operation of ours autograd works as outside of it
    DispatchKey: Any = torch._C.DispatchKey
    ForceDispatchKeys: Any = torch._C._ForceDispatchKeyGuard
    keys_excluded: Any = torch._C._dispatch_tls_local_exclude_set
    keys_included: Any = torch._C._dispatch_tls_local_include_set

    # no code is written for modules that nobody calls
    use_lazy_graph_module: Any = torch.fx._lazy_graph_module._use_lazy_graph_module
    make_graph_module: Any = torch.fx._lazy_graph_module._make_graph_module
    # what runs code that was compiled ahead of time
    AOT_RUNNERS: Any = torch._C._aoti
    # a model is called as it is, whatever watches operations around it
    disable_current_modes: Any = torch.utils._python_dispatch._disable_current_modes

FAKE_TENSOR_LOG = FakeTensor.__module__
"""Where PyTorch logs what does not fit, which is expected while sizes are tried."""


def forget_real(mode: FakeTensorMode) -> None:
    """Let go of the tensors that fake ones were made of.

    PyTorch moves no tensor that is made of others while somebody refers to it weakly.
    """
    with names_of("torch"):
        mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()


def compiled_module(wrapper: nn.Module) -> nn.Module | None:
    """The module behind torch.compile(module), which transform works on; None for any other module."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return None
    with names_of("torch"):
        if not isinstance(wrapper, dynamo.OptimizedModule):
            return None
        module: nn.Module = wrapper._orig_mod
    return module


def skip(function: Any, reason: str) -> Any:
    """Keep torch.compile out of a function, but not of those that it calls.

    The reason is what torch.compile says where it is asked for one graph, if it knows the attribute.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = reason
    return function


def aot_runner(device: str, library: str) -> Any:
    """Runs what AOTInductor compiled for a kind of device; a PyTorch without that device has none."""
    with names_of("torch"):
        if device == "cpu":
            return AOT_RUNNERS.AOTIModelContainerRunnerCpu(library, 1)
        return AOT_RUNNERS.AOTIModelContainerRunnerCuda(library, 1, device, os.path.dirname(library))
