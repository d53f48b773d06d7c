"""Phases that write into cached values, as functions of their inputs."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from graphcache import Plan
from graphcache.analysis import ops
from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.program import Program
from graphcache.ir.graph import CacheRead, CacheWrite, StepGraph
from graphcache.ir.text import render
from graphcache.passes.pure import Pure
from graphcache.runtime.runner import begun, run_step
from reference import assert_same, runner_tensors
from tests.passes.test_shard import generation, program, tiny_program
from tests.passes.test_shard_tokens import BY_ROLE, plan
from tiny import arguments, tiny


def test_what_is_written_is_a_result(golden: Callable[[str], None]) -> None:
    made, rows = tiny_program(), plan("a = tokens 2 by random multiple=1\n@mlp #a", 2)
    golden(render(Pure()(made.phase(made.schedule(rows), 1).step)))


CASES = [(name, BY_ROLE[name]) for name in ("dit", "pixart", "sd3", "flux", "latte")]
BLENDED = "a = tokens 2 by cluster multiple=1 blend=0.5\n@mlp #aa#"


def tiny_generation() -> list[list[Tensor]]:
    return [runner_tensors(tiny(), arguments(t, tokens=4)) for t in (1.0, 0.7, 0.4, 0.1)]


@pytest.mark.few(3)
@pytest.mark.parametrize(("name", "rows"), [*CASES, ("tiny", BLENDED)])
def test_the_same_results_and_nothing_written(name: str, rows: str) -> None:
    made = tiny_program() if name == "tiny" else program(name)
    assert written(made, plan(rows), tiny_generation() if name == "tiny" else generation(name))


def written(made: Program, rows: Plan, calls: Sequence[Sequence[Tensor]]) -> int:
    """How many entries a generation has written to; each phase is run in both ways."""
    state, count = begun((), made, rows, 0, "only"), 0

    def evaluate(runnable: Runnable, fed: list[Tensor]) -> Sequence[Tensor]:
        nonlocal count
        pure, before = Pure()(runnable.step), [tensor.clone() for tensor in fed]
        found = pure.module(*fed)
        assert_same(fed, before)
        results = runnable.call(*fed)
        changed = [t for port, t in zip(runnable.step.inputs, fed, strict=True) if is_changed(port)]
        assert_same([*found], [*results, *changed])
        assert_pure(pure, len(changed))
        count += len(changed)
        return results

    with torch.no_grad():
        for step, tensors in enumerate(calls):
            state.step = step
            run_step(state, tensors, evaluate)
    return count


def assert_pure(step: StepGraph, changed: int) -> None:
    """It writes into nothing, also by its ports, and there is nothing left to do."""
    assert not any(node.target in ops.WRITES for node in step.graph.nodes)
    assert not any(map(is_changed, step.inputs))
    assert all(isinstance(port, CacheWrite) for port in step.outputs[len(step.outputs) - changed :])
    assert render(Pure()(step)) == render(step)


def is_changed(port: object) -> bool:
    return isinstance(port, CacheRead) and port.changed
