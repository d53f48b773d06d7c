"""One call of a model as a capture makes it, by which graphs for such calls are judged."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from graphcache.ir.call import CallSpec, OutputSpec
from graphcache.ir.graph import same_bits
from graphcache.libraries.kernels import ChosenKernels
from graphcache.tracing.computation import Computation, Operation
from graphcache.tracing.numeric_time import refuse_unlike_numbers, run_as_tensors
from graphcache.tracing.plain_tensors import Originals
from graphcache.tracing.rehearsal import alone, rehearse
from graphcache.tracing.undisturbed import undisturbed


@dataclass(frozen=True)
class RealCall:
    """What a call gave, and what was computed for it.

    Attributes:
        model: that was called.
        tensors: that it was given.
        output: the structure of its result.
        results: the tensors in it.
        operations: that they depend on.
    """

    model: nn.Module
    tensors: Sequence[torch.Tensor]
    output: OutputSpec
    results: tuple[torch.Tensor, ...]
    operations: "Counter[Operation]"

    def is_that_of(self, run: Callable[..., Sequence[torch.Tensor]]) -> bool:
        """Whether a graph gives the same bits for these tensors, and does so by the same operations.

        Bits alone would not tell what has no effect in this call: a clamp that does not bite, a factor of
        zeros.
        """
        computation = Computation(self.model, self.tensors)
        with torch.inference_mode(False), torch.no_grad(), computation:
            found = run(*self.tensors)
        return (
            len(found) == len(self.results)
            and all(map(same_bits, found, self.results))
            and computation.of(found) == self.operations
        )


def really_called(model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor]) -> RealCall:
    """Call a model; it is left as it was.

    Raises:
        CaptureError: the call fails, or it is one that tracing refuses before it begins.
    """
    originals = Originals()
    plain = [originals.plain(tensor) for tensor in tensors]
    devices = {tensor.device for tensor in (*tensors, *model.parameters())}
    found: list[RealCall] = []

    def real() -> None:
        with ChosenKernels():
            if call.numbers:
                refuse_unlike_numbers(call, model, plain)
            computation = Computation(model, plain)
            with computation:
                output, results = OutputSpec.of(*run_as_tensors(call, model, plain))
            found.append(RealCall(model, tensors, output, results, computation.of(results)))

    with alone(model, devices):
        undisturbed(model, originals, lambda: rehearse(real, devices), lambda: None)
    return found[-1]
