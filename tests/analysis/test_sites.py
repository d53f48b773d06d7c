"""The branches that the analysis finds, against the tables read off the models' sources."""

import re
from collections import Counter
from typing import Any

import pytest
from torch import Tensor

from graphcache.ir.graph import value_of
from graphcache.ir.selector import ROLES
from reference import capture_call, subject
from tiny import TinyDiT, arguments, tiny
from zoo import CASES

NAME = re.compile(
    r"(?P<path>[\w@]+(\.[\w@]+)*?)\.(?P<role>[a-z]+(\.spatial|\.temporal)?)(\.context)?(\.\d+)?"
)


def every_case(test: Any) -> Any:
    """The same few for all tests of this file, which share the captures."""
    return pytest.mark.few(8)(pytest.mark.parametrize("name", CASES)(test))


@every_case
def test_roles_and_blocks_are_those_of_the_source(name: str) -> None:
    step, case = subject(name).captured.step, CASES[name]
    assert Counter(b.role + ".context" * b.context for b in step.branches) == case.roles
    assert step.blocks == case.blocks


@every_case
def test_names_are_distinct_and_say_block_and_role(name: str) -> None:
    on = subject(name)
    branches, modules = on.captured.step.branches, dict(on.model.named_modules())
    assert len({branch.name for branch in branches}) == len(branches)
    for branch in branches:
        found = NAME.fullmatch(branch.name)
        assert found is not None
        assert found["role"] == branch.role
        assert branch.role in ROLES
        assert (".context" in branch.name) == branch.context
        assert found["path"] in modules


@every_case
def test_branches_come_in_execution_order_at_even_depths(name: str) -> None:
    step = subject(name).captured.step
    order = {node.name: i for i, node in enumerate(step.graph.nodes)}
    places = [order[branch.merge] for branch in step.branches]
    assert places == sorted(places)
    assert [b.block for b in step.branches] == sorted(b.block for b in step.branches)
    assert {b.block: b.depth for b in step.branches} == {
        block: block / (step.blocks - 1) for block in range(step.blocks)
    }


@every_case
def test_each_merge_adds_something_made_of_the_value_to_the_stream(name: str) -> None:
    step = subject(name).captured.step
    nodes = step.nodes()
    merges = [branch.merge for branch in step.branches]
    assert len(set(merges)) == len(merges)
    for branch in step.branches:
        merge, stream, value = nodes[branch.merge], nodes[branch.stream], nodes[branch.value]
        assert stream in merge.all_input_nodes
        (added,) = set(merge.all_input_nodes) - {stream}
        todo, seen = [added], set()
        while todo:
            node = todo.pop()
            seen.add(node)
            todo.extend(item for item in node.all_input_nodes if item not in seen)
        assert value in seen
        assert value_of(value).numel() == value_of(merge).numel()


def test_a_branch_value_is_what_comes_before_the_gate() -> None:
    step = capture_call(tiny(), arguments(), "timestep").step
    nodes = step.nodes()
    values = [(b.name, nodes[b.value].args[1].target) for b in step.branches]
    assert values == [
        ("blocks.0.self", "model.blocks.0.out.weight"),
        ("blocks.0.mlp", "model.blocks.0.down.weight"),
    ]
    gated = nodes[step.branches[0].merge].args[1]
    assert str(gated.target) == "aten.mul.Tensor"


def test_a_module_that_runs_twice_has_sites_of_its_own_each_time() -> None:
    class Looping(TinyDiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            gate = (self.time(timestep[:, None]) + self.text(text))[:, None]
            return self.blocks[0](self.blocks[0](x, gate), gate)

    step = capture_call(tiny(kind=Looping), arguments(), "timestep").step
    names = [branch.name for branch in step.branches]
    assert names == ["blocks.0.self", "blocks.0.mlp", "blocks.0@1.self", "blocks.0@1.mlp"]


def test_a_single_block_is_at_depth_0() -> None:
    step = capture_call(tiny(), arguments(), "timestep").step
    assert [(branch.block, branch.depth) for branch in step.branches] == [(0, 0.0), (0, 0.0)]
