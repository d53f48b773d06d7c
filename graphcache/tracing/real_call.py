"""One call of a model as a capture makes it, for its results."""

from collections.abc import Sequence

import torch
from torch import nn

from graphcache.ir.call import CallSpec, OutputSpec
from graphcache.libraries.kernels import ChosenKernels
from graphcache.tracing.numeric_time import refuse_unlike_numbers, run_as_tensors
from graphcache.tracing.plain_tensors import Originals
from graphcache.tracing.rehearsal import alone, rehearse
from graphcache.tracing.undisturbed import undisturbed


def really_called(
    model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor]
) -> tuple[OutputSpec, tuple[torch.Tensor, ...]]:
    """The structure of a model's result and the tensors in it; the model is left as it was.

    Raises:
        CaptureError: the call fails, or it is one that tracing refuses before it begins.
    """
    originals = Originals()
    plain = [originals.plain(tensor) for tensor in tensors]
    devices = {tensor.device for tensor in (*tensors, *model.parameters())}
    found: list[tuple[OutputSpec, tuple[torch.Tensor, ...]]] = []

    def real() -> None:
        with ChosenKernels():
            if call.numbers:
                refuse_unlike_numbers(call, model, plain)
            found.append(OutputSpec.of(*run_as_tensors(call, model, plain)))

    with alone(model, devices):
        undisturbed(model, originals, lambda: rehearse(real, devices), lambda: None)
    return found[-1]
