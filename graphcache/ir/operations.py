"""The operations that a graph in a file may call."""

import math
import operator
import re
from typing import Any

import torch

from graphcache.ir.errors import CaptureError
from graphcache.libraries.torch_private import OpOverload, schema_of

_PYTHON = {
    function.__name__: function
    for function in (
        *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv),
        *(operator.mod, operator.pow, operator.neg, operator.eq, operator.ne),
        *(operator.lt, operator.le, operator.gt, operator.ge, math.trunc, math.floor, math.ceil),
        *(torch.sym_float, torch.sym_int, torch.sym_ite, torch.sym_max, torch.sym_min, torch.sym_not),
        *(torch.sym_sqrt, torch.sym_sum),
    )
}
"""Takes one of several results, or computes sizes."""
_NAMES = {function: name for name, function in _PYTHON.items()}
_NAME = re.compile(r"aten\.\w+\.\w+|prims\.\w+\.\w+", re.ASCII)
_PLAIN = frozenset((torch.Tag.core, torch.Tag.pointwise, torch.Tag.view_copy))
_FURTHER = frozenset(
    """
    __and__ __or__ __xor__ _conj _int_mm _unsafe_view adaptive_avg_pool2d addmm arange atleast_1d atleast_2d
    baddbmm batch_norm bmm broadcast_tensors broadcast_to bucketize chunk complex concat contiguous conv1d
    conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cosine_similarity cross detach diff dot
    dropout dstack einsum empty_like expand_as eye feature_dropout fill flatten floor_divide frobenius_norm
    group_norm hstack imag index_copy index_put instance_norm layer_norm linalg_cross linalg_norm
    linalg_vector_norm linear linspace log_softmax matmul max_pool1d max_pool2d meshgrid mm moveaxis movedim
    mv narrow new_full new_ones new_zeros norm numpy_T one_hot ones ones_like outer pad pad_sequence
    pairwise_distance pixel_shuffle pixel_unshuffle polar ravel real repeat_interleave reshape reshape_as
    rms_norm roll rot90 rsub scaled_dot_product_attention searchsorted softmax split squeeze stack std sum
    swapaxes swapdims t take_along_dim tensor_split tile to transpose tril triu true_divide type_as unbind
    unflatten unfold unsafe_chunk unsafe_split upsample_bicubic2d upsample_bilinear2d upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d var vdot view_as
    view_as_complex view_as_real vstack zeros zeros_like
    """.split()  # noqa: SIM905
)
"""Others than those that PyTorch calls core or pointwise. None of them reads or writes files, changes what
later operations do, or takes what it is given for addresses.
"""


def name_of(operation: Any) -> str:
    """By which `operation` finds it, if it is one that a file may name."""
    return _NAMES.get(operation) or str(operation)


def operation(name: str) -> Any:
    """An operation by its name.

    Raises:
        CaptureError: it is none of those that compute new tensors of tensors and numbers, or sizes of sizes.
    """
    if name in _PYTHON:
        return _PYTHON[name]
    if _NAME.fullmatch(name):
        space, packet, overload = name.split(".")
        found: Any = getattr(getattr(getattr(torch.ops, space), packet, None), overload, None)
        is_one = isinstance(found, OpOverload) and str(found) == name and not schema_of(found).is_mutable
        if is_one and (packet in _FURTHER or not _PLAIN.isdisjoint(found.tags)):
            return found
    raise CaptureError(f"it calls {name!r}, which is none of the operations that a file may name")
