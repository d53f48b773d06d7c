"""What a branch has cached under CUDA graphs lives until PyTorch is told of another iteration."""

from collections.abc import Sequence

import torch

from graphcache.ir.errors import StateError
from graphcache.runtime.runner import BranchState


def refuse_overwritten(state: BranchState, tensors: Sequence[torch.Tensor]) -> None:
    """Refuse to go on with what the CUDA graphs of other generations may have overwritten.

    Raises:
        StateError: another generation, or a mark of the caller's, came between this branch's calls.
    """
    if not state.program.replays_cuda_graphs or not _on_cuda(tensors):
        return
    from graphcache.libraries.torch_compilers_private import MarkStepBox

    latest = MarkStepBox.mark_step_counter
    if state.mark not in (None, latest) and state.cache.entries:
        raise StateError(
            f"step {state.step}: another generation began since this one's last step, or "
            "torch.compiler.cudagraph_mark_step_begin() was called, and under CUDA graphs what this one had "
            "cached may be overwritten then; run one generation after the other, in processes of their own, "
            'or with a backend without CUDA graphs, such as "inductor"'
        )
    state.mark = latest


def _on_cuda(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether graphs are recorded; elsewhere code runs as it is."""
    return any(tensor.is_cuda for tensor in tensors)
