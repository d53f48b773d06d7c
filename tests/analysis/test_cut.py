"""What a reuse has to keep: the minimum cut against brute force, on zoo models, as plans; hoisted values."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import graphcache
from graphcache import Plan, PlanError
from graphcache.analysis.cut import Change, Cut, Gates, cheapest_cut, sites_of
from graphcache.analysis.dataflow import LATENT, TIMESTEP, Dataflow
from graphcache.analysis.invariant import cheapest_hoist, invariant_values
from graphcache.analysis.ranges import cut_range
from graphcache.compiler.program import Program
from graphcache.ir.graph import CacheWrite, Hoisted, StepGraph, storage_bytes, value_of
from graphcache.passes.hoist import Hoist, Prologue
from reference import Subject, capture_call, subject
from tiny import TinyBlock, TinyDiT, arguments, tiny

ZOO = ("dit", "pixart", "sd3", "flux", "latte", "functional_mmdit")


class Constant(TinyDiT):
    """Gates by text alone."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        gate = self.text(text)[:, None]
        for block in self.blocks:
            x = block(x, gate)
        return x + self.time(timestep[:, None])[:, None]


class Skipping(Constant):
    """What leaves the first block is part of the result."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        first = x = self.blocks[0](x, self.text(text)[:, None])
        for block in self.blocks[1:]:
            x = block(x, self.time(timestep[:, None])[:, None])
        return torch.cat([first * 2, x], dim=-1)


class PooledBlock(TinyBlock):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """The MLP sees the mean of the tokens and adds one row to all of them."""
        q, k, v = self.qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, dim=-1)
        x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.down(F.gelu(self.up(x.mean(1, keepdim=True))))


class Pooled(TinyDiT):
    def __init__(self, depth: int = 1, dim: int = 4) -> None:
        super().__init__(depth, dim)
        self.blocks = nn.ModuleList(PooledBlock(dim) for _ in range(depth))


class HalfBlock(TinyBlock):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Branches in half precision, the stream in single."""
        q, k, v = self.qkv(F.layer_norm(x, x.shape[-1:]).to(self.qkv.weight.dtype)).chunk(3, dim=-1)
        x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v)).float()
        return x + self.down(F.gelu(self.up(x.to(self.up.weight.dtype)))).float()


class Half(TinyDiT):
    def __init__(self, depth: int = 1, dim: int = 4) -> None:
        super().__init__(depth, dim)
        self.blocks = nn.ModuleList(HalfBlock(dim).bfloat16() for _ in range(depth))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def captured(kind: type[TinyDiT] = TinyDiT, depth: int = 2) -> StepGraph:
    return capture_call(tiny(depth, kind), arguments(), "timestep").step


def names(step: StepGraph, *blocks: int) -> list[str]:
    return [branch.name for branch in step.branches if not blocks or branch.block in blocks]


@dataclass(frozen=True)
class Brute:
    """Tries every set of tensors, with a definition of its own of what each is good for."""

    step: StepGraph
    reused: Collection[str]
    gates: Gates

    @cached_property
    def flow(self) -> Dataflow:
        return Dataflow(self.step)

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        return self.step.nodes()

    @cached_property
    def values(self) -> set[fx.Node]:
        return {self.nodes[b.value] for b in self.step.branches if b.name in self.reused}

    @cached_property
    def streams(self) -> dict[fx.Node, tuple[int, fx.Node]]:
        return {self.nodes[b.merge]: (b.block, self.nodes[b.stream]) for b in self.step.branches}

    def is_stale(self, node: fx.Node) -> bool:
        """Whether a node of this step can be had of the reused values and constants alone."""
        if node in self.values:
            return True
        kinds = self.flow.depends[node]
        if node.op != "call_function" or not kinds & (LATENT | TIMESTEP):
            return not kinds & (LATENT | TIMESTEP)
        if not kinds & LATENT and self.gates == "kept":
            return any(user not in self.streams and self.comes_of_values(user) for user in node.users)
        return all(self.is_stale(item) for item in node.all_input_nodes)

    def comes_of_values(self, node: fx.Node) -> bool:
        return any(self.flow.reaches(value, node) for value in self.values)

    def is_whole(self, block: int) -> bool:
        inside = [b for b in self.step.branches if b.block == block]
        addends = [i for b in inside for i in self.nodes[b.merge].all_input_nodes if i.name != b.stream]
        return all(b.name in self.reused for b in inside) and all(map(self.is_stale, addends))

    def candidates(self) -> dict[str | Change, int]:
        stale = [node for node in self.step.calls() if self.comes_of_values(node) and self.is_stale(node)]
        found: dict[str | Change, int] = {node.name: storage_bytes(value_of(node)) for node in stale}
        for first in range(self.step.blocks):
            for last in range(first, self.step.blocks):
                if all(map(self.is_whole, range(first, last + 1))):
                    for merge in cut_range(self.step, "", first, last).leaving:
                        found[Change(first, last, merge)] = storage_bytes(value_of(self.nodes[merge]))
        return found

    def suffices(self, kept: Collection[str | Change]) -> bool:
        seen: dict[fx.Node, bool] = {}

        def is_had(node: fx.Node) -> bool:
            if node not in seen:
                seen[node] = node.name in kept or any(map(is_had, changed(node))) or is_made(node)
            return seen[node]

        def is_made(node: fx.Node) -> bool:
            return node not in self.values and all(map(is_had, node.all_input_nodes))

        def changed(node: fx.Node) -> Iterator[fx.Node]:
            for item in kept:
                if isinstance(item, Change) and item.node == node.name:
                    before = node
                    while before in self.streams and item.first <= self.streams[before][0] <= item.last:
                        before = self.streams[before][1]
                    yield before

        return all(map(is_had, self.step.results()))

    def least(self) -> int:
        sizes = self.candidates()
        subsets = (kept for count in range(len(sizes) + 1) for kept in combinations(sizes, count))
        return min(sum(sizes[item] for item in kept) for kept in subsets if self.suffices(kept))


@pytest.mark.parametrize("gates", ["fresh", "kept"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", [TinyDiT, Constant, Skipping, Pooled, Half])
def test_no_set_of_tensors_is_cheaper(kind: type[TinyDiT], depth: int, gates: Gates) -> None:
    step = captured(kind, depth)
    known = names(step)
    assert len(known) == 2 * depth
    for count in range(len(known) + 1):
        for reused in combinations(known, count):
            brute = Brute(step, reused, gates)
            cut = cheapest_cut(step, reused, gates=gates)
            assert brute.suffices(cut.kept), (reused, cut)
            assert cut.bytes == brute.least(), (reused, cut)


def test_three_blocks_without_a_timestep_are_one_tensor() -> None:
    step = captured(Constant, 3)
    for gates in ("fresh", "kept"):
        cut = cheapest_cut(step, names(step), gates=gates)
        assert cut.kept == (Change(0, 2, step.branches[-1].merge),)
        assert cut.bytes == Brute(step, names(step), gates).least() == 2 * 3 * 4 * 4


def test_narrow_branches_are_kept_one_by_one() -> None:
    """In half precision two branches are as large as the stream's change, and one is smaller."""
    step = captured(Half, 1)
    cut = cheapest_cut(step, names(step), gates="kept")
    assert sites_of(cut) == ("blocks.0.self", "blocks.0.mlp")
    assert cut.bytes == 2 * (2 * 3 * 4 * 2)
    assert sites_of(cheapest_cut(captured(Half, 2), names(captured(Half, 2)), gates="kept")) == (
        "range(0..1)",
    )


def test_what_is_read_on_the_way_leaves_the_range_as_well() -> None:
    step = captured(Skipping, 2)
    cut = cheapest_cut(step, names(step), gates="kept")
    assert [(item.first, item.last) for item in cut.kept if isinstance(item, Change)] == [(0, 0), (0, 1)]
    assert sites_of(cut) == ("range(0..1)",)


def stream_bytes(step: StepGraph, merge: str) -> int:
    return storage_bytes(value_of(step.nodes()[merge]))


@pytest.mark.parametrize("name", ZOO)
def test_the_whole_stack_is_one_tensor(name: str) -> None:
    step = subject(name).captured.step
    image = min(stream_bytes(step, branch.merge) for branch in step.branches if not branch.context)
    cut = cheapest_cut(step, names(step), gates="kept")
    assert sites_of(cut) == (f"range(0..{step.blocks - 1})",)
    assert len(cut.kept) == 1
    assert cut.bytes == image


@pytest.mark.parametrize("name", ZOO)
def test_with_fresh_gates_the_branches_are_kept(name: str) -> None:
    """Those of them whose values are read: the last block's text is not."""
    step = subject(name).captured.step
    cut = cheapest_cut(step, names(step))
    values = {branch.value: branch.name for branch in step.branches}
    assert {values[str(item)] for item in cut.kept} == set(sites_of(cut))
    assert set(sites_of(cut)) >= {branch.name for branch in step.branches if not branch.context}


def test_one_tensor_a_stream_leaves_a_range_of_double_blocks() -> None:
    step = subject("flux").captured.step
    cut = cheapest_cut(step, names(step, 0, 1), gates="kept")
    merges = {branch.merge: branch.context for branch in step.branches if branch.block == 1}
    assert sorted(merges[item.node] for item in cut.kept if isinstance(item, Change)) == [False, True]
    assert sites_of(cut) == ("range(0..1)",)
    assert sites_of(cheapest_cut(step, names(step, 2, 3), gates="kept")) == ("range(2..3)",)


@pytest.mark.parametrize(("name", "blocks"), [("pixart", (1,)), ("latte", (1, 2)), ("latte", (0, 1, 2))])
def test_a_range_of_blocks_is_one_tensor(name: str, blocks: tuple[int, ...]) -> None:
    step = subject(name).captured.step
    (change,) = cheapest_cut(step, names(step, *blocks), gates="kept").kept
    assert isinstance(change, Change)
    assert (change.first, change.last) == (blocks[0], blocks[-1])


def test_a_branch_left_out_splits_the_range() -> None:
    step = subject("latte").captured.step
    reused = [name for name in names(step) if name != "temporal_transformer_blocks.0.mlp"]
    cut = cheapest_cut(step, reused, gates="kept")
    assert sites_of(cut) == ("range(0..0)", "range(2..3)", "temporal_transformer_blocks.0.self.temporal")
    alone = "outside of any range: temporal_transformer_blocks.0.mlp of the same block computes"
    reasons = [reason.partition(" ")[2] for _, reason in cut.reasons]
    assert reasons[:2] == [f"adds it to the stream, {alone}", f"carries the stream on, {alone}"]


def test_reasons_name_the_gate() -> None:
    step = captured()
    nodes, reasons = step.nodes(), dict(cheapest_cut(step, names(step)).reasons)
    gate = "mul gates blocks.0.self by unsqueeze_1, which depends on the timestep"
    attention, mlp = (step.branches[i].value for i in (0, 1))
    assert reasons[attention] == gate
    assert reasons[mlp] == f"{step.branches[1].merge} adds it to the stream, outside of any range: {gate}"
    assert value_of(nodes[attention]).shape == (2, 3, 4)


def test_reasons_name_the_reader() -> None:
    step = captured()
    kept = dict(cheapest_cut(step, names(step), gates="kept").reasons)
    assert kept == {step.branches[-1].merge: "it is output 0 of the step"}
    kept = dict(cheapest_cut(step, names(step, 0), gates="kept").reasons)
    assert kept[step.branches[1].merge].startswith("blocks.1.self computes and reads it")


def test_nothing_reused_keeps_nothing() -> None:
    assert cheapest_cut(captured(), []) == Cut((), 0, (), ())


def test_a_cut_is_the_same_before_and_after_hoisting() -> None:
    step = captured()
    hoisted = Hoist(invariant_values(step))(step)
    for gates in ("fresh", "kept"):
        assert cheapest_cut(hoisted, names(step), gates=gates) == cheapest_cut(step, names(step), gates=gates)


def test_an_unknown_branch_is_refused() -> None:
    with pytest.raises(PlanError, match=r"blocks\.7\.mlp is no branch .* begin with: blocks\.0\.mlp"):
        cheapest_cut(captured(), ["blocks.7.mlp"])


def plan(sites: Collection[str]) -> Plan:
    return Plan.parse("plan steps=3 preset=none\n" + "\n".join(f"{site} #.." for site in sites))


Call = Callable[[int], dict[str, Any]]


def differs(one: nn.Module, other: nn.Module, call: Call) -> tuple[float, float]:
    """Largest difference of two models' results over three steps, and how much the results change."""
    first, second = ([model(**call(step)) for step in range(3)] for model in (one, other))
    leaves = zip(tree_leaves(first), tree_leaves(second), strict=True)
    largest = max((a - b).abs().max().item() for a, b in leaves)
    moved = (tree_leaves(second[0])[0] - tree_leaves(second[2])[0]).abs().max().item()
    return largest, moved


@pytest.mark.parametrize("left_out", [None, "blocks.1.self", "blocks.2.mlp"])
def test_a_plan_of_the_cut_is_the_reuse_of_the_branches(left_out: str | None) -> None:
    reused = [name for name in names(captured(Constant, 3)) if name != left_out]
    sites = sites_of(cheapest_cut(captured(Constant, 3), reused))
    assert len(sites) < len(reused)

    def call(step: int) -> dict[str, Any]:
        inputs = arguments(t=1.0 - step / 3)
        return {**inputs, "x": inputs["x"] * (1 + step)}

    text = call(0)["text"]
    models = [graphcache.transform(tiny(3, Constant), plan(rows)) for rows in (sites, reused)]
    error, moved = differs(models[0], models[1], lambda step: {**call(step), "text": text})
    assert error < 1e-5 < moved


@pytest.mark.parametrize("name", ["pixart", "flux", "latte"])
@pytest.mark.parametrize("blocks", [(), (0, 1)])
def test_a_plan_of_the_cut_is_the_reuse_of_the_branches_while_time_stands(
    name: str, blocks: tuple[int, ...]
) -> None:
    on = subject(name)
    reused = names(on.captured.step, *blocks)
    sites, static = sites_of(cheapest_cut(on.captured.step, reused, gates="kept")), on.static()
    models = [on.transform(plan(rows), wait="never") for rows in (sites, reused)]
    latents = [on.latents(seed) for seed in range(3)]
    error, moved = differs(models[0], models[1], lambda step: on.case.call(static, latents[step], 0.5))
    assert error < 1e-5 < moved


def kept_by_plan(on: Subject, sites: Collection[str]) -> int:
    """Bytes of one entry of each history that a plan stores."""
    program = Program(on.captured, None)
    return sum(program.entry_bytes(program.schedule(plan(sites))).values())


@pytest.mark.parametrize("gates", ["fresh", "kept"])
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "latte"])
def test_a_plan_keeps_what_the_cut_says(name: str, gates: Gates) -> None:
    on = subject(name)
    cut = cheapest_cut(on.captured.step, names(on.captured.step), gates=gates)
    assert kept_by_plan(on, sites_of(cut)) == cut.bytes


def test_a_plan_keeps_the_text_of_a_joint_stream_that_the_cut_drops() -> None:
    on = subject("flux")
    cut = cheapest_cut(on.captured.step, names(on.captured.step), gates="kept")
    assert kept_by_plan(on, sites_of(cut)) == stream_bytes(
        on.captured.step, on.captured.step.branches[-1].merge
    )
    assert kept_by_plan(on, sites_of(cut)) > cut.bytes


@pytest.mark.parametrize("name", ZOO)
def test_the_rule_of_hoisting_keeps_no_byte_too_many(name: str) -> None:
    step = subject(name).captured.step
    cut, pointwise = cheapest_hoist(step), cheapest_hoist(step, pointwise=True)
    assert set(cut.kept) == set(invariant_values(step))
    assert pointwise.bytes <= cut.bytes == cut.by_rule
    assert name != "functional_mmdit" or pointwise.bytes < cut.bytes / 4


class Sliced(TinyDiT):
    """Of the projected text one element in four is read, after an exponential of its own."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        row = self.text(text)[:, None, :1]
        gate = self.time(timestep[:, None])[:, None] + row.exp() + row
        for block in self.blocks:
            x = block(x, gate)
        return x


@pytest.mark.parametrize(("pointwise", "kept"), [(False, 2), (True, 1)])
def test_of_a_hoisted_value_the_slice_that_is_read_is_enough(pointwise: bool, kept: int) -> None:
    model = tiny(1, Sliced)
    step, inputs = capture_call(model, arguments(), "timestep").step, arguments()
    cut = cheapest_hoist(step, pointwise=pointwise)
    assert (len(cut.kept), cut.bytes, cut.by_rule) == (kept, kept * 2 * 4, 2 * 4 * 4 + 2 * 4)
    assert all("of the step reads it" in reason for _, reason in cut.reasons)
    once, hoisted = Prologue(cut.kept)(step), Hoist(cut.kept)(step)
    (text,) = (node.name for node in once.placeholders())
    assert text == "tensors_2"
    held = dict(zip((port.name for port in once.outputs), once.module(inputs["text"]), strict=True))
    read = [held[port.name] if isinstance(port, Hoisted) else inputs[port.name] for port in hoisted.inputs]
    torch.testing.assert_close(hoisted.module(*read)[0], model(**inputs))
    assert not [port for port in hoisted.outputs if isinstance(port, CacheWrite)]
