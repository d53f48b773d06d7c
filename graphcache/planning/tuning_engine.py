"""A model under a plan whose coefficients are parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from graphcache.compiler.phase_code import Runnable
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.graph import CacheWrite, Coefficients
from graphcache.ir.history import OUTPUT, range_site
from graphcache.ir.plan import Plan
from graphcache.ir.ranks import Ranks
from graphcache.ir.resolve import resolve
from graphcache.ir.roles import Names
from graphcache.ir.schedule import Phase
from graphcache.ir.state import CacheState
from graphcache.planning.evaluation import in_stretches
from graphcache.planning.gradient_memory import GradientMemory, with_own_inputs
from graphcache.planning.in_stretches import InStretches
from graphcache.planning.plan_memory import lowered
from graphcache.planning.profile_memory import Needs, Share
from graphcache.planning.tuning_memory import cut, tuning_needs
from graphcache.runtime.engine import Engine
from graphcache.runtime.options import Options
from graphcache.runtime.runner import BranchState, run_step
from graphcache.runtime.session import CallSlot

Key = tuple[int, int]
"""(row, step) of listed coefficients."""


class Weights(nn.Module):
    """A plan's listed coefficients: by row and step their sum, and the shares of all but the newest entry."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.given = plan
        self.values = nn.ParameterDict()
        for number, row in enumerate(plan.rows):
            for step, listed in row.coefficients:
                start = torch.tensor([sum(listed), *listed[1:]], dtype=torch.float32)
                self.values[_name((number, step))] = nn.Parameter(start)
        if not len(self.values):
            raise GraphCacheError(
                "the plan lists no coefficients, so there is nothing to tune; take one from search(), or "
                "with_corrections(plan)"
            )

    def coefficients(self, key: Key) -> Tensor:
        """Newest entry first."""
        value = self.values[_name(key)]
        return torch.cat([(value[0] - value[1:].sum())[None], value[1:]])

    def plan(self) -> Plan:
        """The plan with the coefficients as they are now."""
        rows = []
        for number, row in enumerate(self.given.rows):
            listed = tuple(
                (step, tuple(self.coefficients((number, step)).tolist())) for step, _ in row.coefficients
            )
            rows.append(replace(row, coefficients=listed))
        return replace(self.given, rows=tuple(rows), preset=None)


def _put(cache: CacheState, port: CacheWrite, value: Tensor) -> None:
    """Let a value take the place of a part of a history's newest entry."""
    newest = [*cache.entries[port.history][0]]
    newest[port.part] = value
    cache.entries[port.history][0] = tuple(newest)


def _needing(latent: Tensor) -> Tensor:
    """A tensor that needs a gradient."""
    return latent if latent.requires_grad else latent.clone().requires_grad_()


def _name(key: Key) -> str:
    return f"{key[0]}_{key[1]}"


class TuningEngine(Engine):
    """Runs a model under a plan whose coefficients are parameters.

    What gradients need is held for the first evaluations, as far as the share of memory for that goes; the
    others are computed again on the way back.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        names: Names,
        pipe: Any = None,
        mesh: tuple[Ranks, ...] = (),
    ) -> None:
        super().__init__(model, Options(weights.given, names=names, mesh=mesh), pipe)
        # code that is compiled without gradients has none later
        self.maker.adopts = False
        self.weights = weights
        self.share = Share(0)
        self.left = GradientMemory(0)
        self._keys: dict[tuple[Phase, int], dict[int, Key]] = {}
        self._cut: WeakKeyDictionary[Runnable, InStretches] = WeakKeyDictionary()

    def needs(self, inputs: Mapping[str, Any], calls: int, result: Tensor, references: int) -> Needs:
        """What tuning takes where a step makes so many calls like one with these arguments."""
        plan = self.weights.given
        calls_under = lowered(self, inputs, plan, calls)
        return tuning_needs(calls_under, self.cut_once, result.nbytes, references)

    def cut_once(self, runnable: Runnable) -> InStretches:
        """A phase's graph in stretches."""
        if runnable not in self._cut:
            self._cut[runnable] = cut(runnable)
        return self._cut[runnable]

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return super().__call__((), self.with_gradient(self.binder.bind(args, kwargs)))

    def with_gradient(self, bound: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments with latents that need one, as at later steps: that is part of a signature."""
        bound = dict(bound)
        key, tensors = self.binder.signature(bound)
        spec = self.maker.spec(key, bound)
        owner = spec.latent_argument(tensors, "tune")
        held = bound[owner]
        bound[owner] = _needing(held) if isinstance(held, Tensor) else type(held)(map(_needing, held))
        return bound

    def evaluate(self, branch: CallSlot, state: BranchState, tensors: Sequence[Tensor]) -> Any:
        keys, count = self._groups(state), state.program.captured.output.count

        def evaluated(runnable: Runnable, fed: list[Tensor]) -> Sequence[Tensor]:
            for place, port in enumerate(runnable.step.inputs):
                if isinstance(port, Coefficients) and port.group in keys:
                    weights = self.weights.coefficients(keys[port.group])
                    padding = weights.new_zeros(len(fed[place]) - len(weights))
                    fed[place] = torch.cat([weights, padding]).to(fed[place])
            if all(tensor.grad_fn is None for tensor in fed):
                # no coefficient was met yet, or none is trained
                with torch.no_grad():
                    return runnable.call(*fed)
            fed = with_own_inputs(runnable, fed)
            graph = self.cut_once(runnable)
            hold = self.left.takes(graph.runnable)
            results = in_stretches(graph, fed, self.share.stride, hold, self.options.mesh)
            own = len(runnable.step.outputs)
            for written, value in zip(graph.runnable.step.outputs[own:], results[own:], strict=True):
                assert isinstance(written, CacheWrite)
                _put(state.cache, written, value)
            # samplers may change these in place
            return [*(result.clone() for result in results[:count]), *results[count:own]]

        with self.in_step(branch, state, tensors):
            return run_step(state, tensors, evaluated)

    def _groups(self, state: BranchState) -> dict[int, Key]:
        """The row and step behind each group of coefficients of the current step."""
        phase = state.schedule.phases[state.now.phase]
        cached = self._keys.get((phase, state.step))
        if cached is not None:
            return cached
        plan, step = self.weights.given, state.program.captured.step
        found = resolve(plan, step.branches, step.blocks)
        rows = dict(found.branches)
        rows |= {range_site(first, last): row for row, first, last in found.ranges}
        rows |= {OUTPUT: found.output} if found.output else {}
        keys: dict[int, Key] = {}
        for history, action in phase.actions:
            site = history.site
            if action.group >= 0 and site in rows and rows[site].listed(state.step) is not None:
                keys.setdefault(action.group, (plan.rows.index(rows[site]), state.step))
        self._keys[phase, state.step] = keys
        return keys
