"""What the passes make of a graph: golden texts, op counts, purity, number of graphs, compiled phases."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

import graphcache
from graphcache import Plan, presets
from graphcache.analysis.cost import graph_flops
from graphcache.analysis.invariant import invariant_values
from graphcache.analysis.liveness import lower
from graphcache.compiler.program import Program
from graphcache.ir.graph import CacheWrite, StepGraph
from graphcache.ir.history import GUIDANCE, PREDICTION, History
from graphcache.ir.plan import Preset
from graphcache.ir.schedule import Role, Schedule
from graphcache.ir.text import render
from graphcache.passes.base import Pass
from graphcache.passes.guidance import Guide
from graphcache.passes.hoist import Hoist, Prologue
from graphcache.passes.prune import pruned
from graphcache.passes.simplify import Simplify
from graphcache.passes.specialize import Specialize
from graphcache.passes.tag import Tag
from inside import states_of
from reference import assert_same, capture_call, subject
from tiny import arguments, tiny

Golden = Callable[[str], None]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def captured(depth: int = 1) -> StepGraph:
    return capture_call(tiny(depth), arguments(), "timestep").step


def plan(rows: str, steps: int) -> Plan:
    return Plan.parse(f"plan steps={steps} preset=none\n{rows}")


def specialised(step: StepGraph, rows: str, steps: int, at: int) -> StepGraph:
    """The phase of one step of a plan."""
    schedule = lower(plan(rows, steps), step.branches)
    return Specialize(schedule.phases[schedule.steps[at].phase], schedule.ranges)(step)


def hoisted(step: StepGraph) -> StepGraph:
    return Hoist(invariant_values(step))(step)


def test_captured_and_tagged(golden: Golden) -> None:
    golden(render(captured()))


def test_hoisted_step(golden: Golden) -> None:
    golden(render(hoisted(captured())))


def test_prologue(golden: Golden) -> None:
    step = captured()
    golden(render(Prologue(invariant_values(step))(step)))


def test_specialised_to_store(golden: Golden) -> None:
    golden(render(specialised(hoisted(captured()), "@self #.#.", 4, at=0)))


def test_specialised_to_reuse(golden: Golden) -> None:
    golden(render(specialised(hoisted(captured()), "@self ##.#\n@mlp ##.#", 4, at=2)))


def test_specialised_to_forecast(golden: Golden) -> None:
    golden(render(specialised(hoisted(captured()), "t = taylorseer order=2\n@mlp ###t", 4, at=3)))


def test_specialised_to_correct(golden: Golden) -> None:
    rows = "c = tuned compute\n@mlp ##c.\n  step 2 = 0.9 0.1"
    golden(render(specialised(hoisted(captured()), rows, 4, at=2)))


def test_specialised_to_store_a_range(golden: Golden) -> None:
    golden(render(specialised(hoisted(captured()), "range(0..0) #.", 2, at=0)))


def test_specialised_to_reuse_a_range(golden: Golden) -> None:
    golden(render(specialised(hoisted(captured(depth=2)), "range(1..1) #.", 2, at=1)))


def test_specialised_to_reuse_the_output(golden: Golden) -> None:
    golden(render(specialised(hoisted(captured()), "output #.", 2, at=1)))


GUIDED = """
    l = linear weight=0.5
    g = frequency low=1.1 low_until=2 high=1.2 high_from=3
    @self     ##l#l
    guidance  ##g#g"""


def guided(rows: str, at: int, role: Role, batch: int = 2) -> StepGraph:
    """The phase of one step for calls of one role, on six tokens of three frames."""
    header = "conditional=last grid=3x1x2"
    made = Plan.parse(f"plan steps=5 {header} preset=none\n{rows}")
    step = capture_call(tiny(), arguments(batch=batch, tokens=6), "timestep").step
    schedule = lower(made, step.branches, role=role)
    phase = schedule.phases[schedule.steps[at].phase]
    assert schedule.guided is not None
    step = Specialize(phase, schedule.ranges, schedule.guided.conditional)(hoisted(step))
    return Guide(phase, schedule.guided)(step)


def test_both_branches_measured(golden: Golden) -> None:
    rows = "l = linear weight=0.5\n@self  ##l#l\nguidance ##.#."
    golden(render(guided(rows, 1, "doubled")))


def test_one_branch_for_both(golden: Golden) -> None:
    golden(render(guided(GUIDED, 2, "doubled", batch=1)))


def test_the_other_branch_answered(golden: Golden) -> None:
    """Of the model's own work nothing is left."""
    golden(render(guided(GUIDED, 2, "uncond")))


def test_specialised_to_store_packed(golden: Golden) -> None:
    golden(render(specialised(hoisted(captured()), "l = linear8 weight=0.5\n@mlp ###l", 4, at=2)))


def test_specialised_to_read_packed(golden: Golden) -> None:
    golden(render(specialised(hoisted(captured()), "l = linear8 weight=0.5\n@mlp ###l", 4, at=3)))


@pytest.mark.parametrize("name", ["pixart", "latte", "cogvideox", "mochi"])
def test_a_branch_answered_from_the_other_costs_nothing(name: str) -> None:
    step = subject(name).captured.step
    schedule = lower(plan("guidance #.", 2), step.branches, role="uncond")
    assert schedule.guided is not None
    answer = Guide(schedule.phases[1], schedule.guided)(step)
    assert attention(answer) == 0
    assert not weights(answer)
    assert graph_flops(answer) == 0


def test_a_plain_difference_is_not_split() -> None:
    """Without a letter of frequencies one tensor is kept, and no product is left."""
    measured = guided("guidance ##.#.", 1, "doubled")
    kept = [port for port in measured.outputs if isinstance(port, CacheWrite)]
    assert kept == [CacheWrite(History(GUIDANCE), 0)]
    assert count(measured)["matmul.default"] == 0
    assert count(guided(GUIDED, 1, "doubled"))["matmul.default"] == 4


def test_a_refresh_is_written_only_where_a_one_branch_step_follows() -> None:
    step = subject("pixart").captured.step
    schedule = lower(plan("guidance ####..##.##", 11), step.branches, role="cond")
    other = lower(plan("guidance ####..##.##", 11), step.branches, role="uncond")
    assert [at.keep[History(GUIDANCE)] for at in other.steps] == [0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0]
    assert all(at.keep[History(PREDICTION)] == 1 for at in schedule.steps)


@pytest.mark.parametrize("name", ["fora", "taylorseer", "pab", "delta_dit", "fastercache"])
def test_schedule(name: str, golden: Golden) -> None:
    made = presets.evaluate(Preset(name), 12)
    role: Role = "doubled" if made.is_guided else "only"
    golden(f"{made}\n\n{lower(made, captured(depth=2).branches, role=role)}")


def attention(step: StepGraph) -> int:
    return count(step)["scaled_dot_product_attention.default"]


def count(step: StepGraph) -> Counter[str]:
    return Counter(str(node.target).removeprefix("aten.") for node in step.calls())


def weights(step: StepGraph) -> set[str]:
    return {str(node.target).removeprefix("model.") for node in step.graph.find_nodes(op="get_attr")}


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "latte", "wan"])
def test_a_reused_attention_is_not_computed(name: str) -> None:
    step = subject(name).captured.step
    total = attention(step)
    kinds = [branch.role for branch in step.branches if branch.role != "mlp" and not branch.context]
    assert total == len(kinds) > 0
    for row in ("@self", "@cross", "@joint"):
        left = [role for role in kinds if not role.startswith(row[1:])]
        phase = specialised(step, f"{row} #.\n@mlp #.", 2, at=1)
        assert attention(phase) == len(left)


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "latte", "wan", "cogvideox", "mochi"])
def test_with_every_branch_reused_only_modulation_is_left_of_the_blocks(name: str) -> None:
    step = hoisted(subject(name).captured.step)
    phase = specialised(step, "* #.", 2, at=1)
    assert attention(phase) == 0
    blocks = {branch.name.split(".")[0] for branch in step.branches}
    left = {weight for weight in weights(phase) if weight.split(".")[0] in blocks}
    assert not [
        weight for weight in left if any(part in weight for part in (".attn", ".ff.", ".ffn.", "proj_mlp"))
    ]
    assert count(phase)["linear.default"] < count(step)["linear.default"]


@pytest.mark.parametrize("name", ["pixart", "flux", "latte"])
def test_with_all_blocks_reused_as_one_range_nothing_is_left_of_them(name: str) -> None:
    step = subject(name).captured.step
    phase = specialised(step, "range(0.0..1.0) #.", 2, at=1)
    blocks = {branch.name.split(".")[0] for branch in step.branches}
    assert not {weight for weight in weights(phase) if weight.split(".")[0] in blocks}


def test_with_the_output_reused_nothing_but_a_copy_is_left() -> None:
    phase = specialised(subject("dit").captured.step, "output #.", 2, at=1)
    assert count(phase) == {"clone.default": 1}
    assert not weights(phase)


def test_the_step_and_its_prologue_share_no_work() -> None:
    on = subject("pixart")
    program = Program(on.captured, None)
    assert program.prologue is not None
    whole, step, once = (count(s) for s in (on.captured.step, program.step, program.prologue.step))
    for target in ("linear.default", "scaled_dot_product_attention.default", "layer_norm.default"):
        assert step[target] + once[target] == whole[target]
    assert once["linear.default"] >= 4


PASSES: list[Pass] = [Simplify(), Tag()]


@pytest.mark.parametrize("item", PASSES, ids=lambda item: type(item).__name__)
@pytest.mark.parametrize("name", ["dit", "mochi", "cogvideox", "factorised_dit"])
def test_a_pass_run_twice_changes_nothing_more(item: Pass, name: str) -> None:
    once = item(subject(name).captured.step)
    again = item(once)
    assert render(again) == render(once)
    assert again.branches == once.branches


@pytest.mark.parametrize("name", ["dit", "mochi", "cogvideox", "factorised_dit"])
def test_pruning_leaves_what_is_read(name: str) -> None:
    step = subject(name).captured.step
    graph, _ = step.copy()
    again = pruned(step.rebuilt(graph))
    assert render(again) == render(step)
    assert again.branches == step.branches


def test_no_pass_changes_its_input() -> None:
    step = captured(depth=2)
    held = invariant_values(step)
    assert held
    schedule = lower(
        plan("c = tuned compute\nrange(0..0) #.#\n@mlp ##c\n  step 2 = 0.5\noutput ##.", 3), step.branches
    )
    phases = [Specialize(phase, schedule.ranges) for phase in schedule.phases]
    before = render(step), step.branches, step.passes, [dict(node.meta) for node in step.graph.nodes]
    for item in (*PASSES, Hoist(held), Prologue(held), *phases):
        made = item(step)
        assert made.graph is not step.graph
        after = render(step), step.branches, step.passes, [dict(node.meta) for node in step.graph.nodes]
        assert str(after) == str(before)


def test_simplify_drops_dropout_asserts_and_casts_that_change_nothing() -> None:
    step = subject("factorised_dit").captured.step
    assert not {"dropout.default", "_assert_tensor_metadata.default", "detach.default"} & count(step).keys()


MOST = {"fora": 2, "delta_dit": 3, "taylorseer": 2, "hicache": 2, "pab": 5}


@pytest.mark.parametrize("name", ["dit", "pixart", "flux", "latte"])
@pytest.mark.parametrize("preset", MOST)
def test_fifty_steps_take_a_few_graphs(name: str, preset: str) -> None:
    schedule = Program(subject(name).captured, None).schedule(presets.evaluate(Preset(preset), 50))
    assert len(schedule.phases) <= MOST[preset]


def graphs_of(schedule: Schedule) -> int:
    return len({step.phase for step in schedule.steps})


COMPILED = """
    plan steps=5 preset=none
    t = taylorseer order=1
    *  ##.t#
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["chunked_dit", "pixart", "mochi"])
def test_each_phase_is_one_compiled_graph_and_never_compiled_again(name: str) -> None:
    torch._dynamo.reset()
    on, counter = subject(name), CompileCounterWithBackend("aot_eager")
    made = Plan.parse(COMPILED)
    model = on.transform(made, backend=counter)
    expected = on.sample(on.reference(made), made.steps)
    first = on.sample(model, made.steps)
    (state,) = states_of(model).values()
    schedule = state.schedule
    assert counter.frame_count == graphs_of(schedule)
    assert counter.frame_count == model.summary().branches[0].graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        second = on.sample(model, made.steps)
    assert counter.frame_count == graphs_of(schedule)
    assert_same(second, first)
    for result, right in zip(tree_leaves(first), tree_leaves(expected), strict=True):
        torch.testing.assert_close(result, right, rtol=1e-5, atol=1e-5)


def test_inductor_agrees_with_the_reference() -> None:
    model, made = tiny(), plan("t = newton order=1\n@self ##.t\n@mlp #.#.", 4)
    compiled = graphcache.transform(model, made, backend="inductor")
    eager = graphcache.transform(model, made)
    for t in (1.0, 0.75, 0.5, 0.25):
        kwargs: dict[str, Any] = arguments(t)
        torch.testing.assert_close(compiled(**kwargs), eager(**kwargs), rtol=1e-5, atol=1e-5)
