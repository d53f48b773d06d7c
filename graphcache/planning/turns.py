"""Which of a pipeline's models is called at which step: told by a real generation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.planning.sampling import Sampling
from graphcache.runtime.engine import Engine
from graphcache.runtime.options import Options
from graphcache.runtime.runner import BranchState
from graphcache.runtime.session import CallSlot


@dataclass
class Turns:
    """The model that each step of a generation of `steps` calls."""

    steps: int
    models: dict[int, nn.Module] = field(default_factory=dict)

    def called(self, step: int, model: nn.Module) -> bool:
        """Note a call; whether it is the first one of a model's turn.

        Raises:
            GraphCacheError: another model is called at that step as well, or there is no such step.
        """
        if step >= self.steps:
            raise GraphCacheError(
                f"the generation goes on to step {step} of its scheduler, and steps={self.steps} were given; "
                "give as many as the model is evaluated in one generation"
            )
        is_first = step not in self.models and self.models.get(step - 1) is not model
        if self.models.setdefault(step, model) is not model:
            raise GraphCacheError(
                f"step {step} calls two denoisers, of {type(self.models[step]).__name__} and of "
                f"{type(model).__name__}: a plan is found for one a step. Choose with Sampling.of(pipe, "
                "parts=...), or profile each as a module, with a sampler of its own; does a scheduler of the "
                "pipeline tell the step?"
            )
        return is_first

    def handovers(self) -> tuple[int, ...]:
        """The steps at which another model takes over, once the generation has ended.

        Raises:
            GraphCacheError: a step called no model.
        """
        missing = [step for step in range(self.steps) if step not in self.models]
        if missing:
            raise GraphCacheError(
                f"of {self.steps} steps the generation evaluates none of the models at {len(missing)}, the "
                f"first of them step {missing[0]}: give all denoisers that take turns, and samples whose "
                "generations run every step"
            )
        return tuple(step for step in range(1, self.steps) if self.models[step] is not self.models[step - 1])


class _Noting(Engine):
    """Computes everything, and notes the steps."""

    turns: Turns

    def evaluate(self, branch: CallSlot, state: BranchState, tensors: Sequence[torch.Tensor]) -> Any:
        self.turns.called(state.step, self.model)
        return super().evaluate(branch, state, tensors)


def handovers(sampling: Sampling, sample: Any, steps: int) -> tuple[int, ...]:
    """The steps at which another model takes over in a sample's generation, which is run for that.

    Of a single model there are none, and nothing is run.

    Raises:
        GraphCacheError: a step calls two models, or none.
    """
    if len(sampling.models) == 1:
        return ()
    turns, options = Turns(steps), Options(Plan(steps), names=sampling.names, mesh=sampling.ranks)
    engines = [_Noting(model, options, sampling.pipe) for model in sampling.models]
    for engine in engines:
        engine.turns = turns
    sampling.generate(sampling.wrapped(engines), sample, steps)
    return turns.handovers()
