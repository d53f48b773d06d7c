"""Cost expressions: against graphs and runs at sizes that were never captured, and what is refused."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from graphcache import Plan, PlanError
from graphcache.analysis import ops
from graphcache.analysis.branches import branch_flops
from graphcache.analysis.cost import graph_flops
from graphcache.analysis.symbolic import CostError, Sized, among, solve, symbol
from graphcache.compiler.program import Program
from graphcache.cost.costing import CostModel, Device, cost_model
from graphcache.ir.graph import StepGraph
from graphcache.ir.schedule import Budget
from reference import capture_call
from seeding import own_numbers
from tiny import TinyDiT, arguments, tiny
from zoo import CASES

Call = dict[str, Any]
TINY = {"batch": 5, "tokens": 7}
PLANS = {
    "reuse": "plan steps=5\n@self #..#.\n@mlp ##.#.",
    "forecast": "plan steps=6\nf = taylorseer order=1\n@self ##f##f\n@mlp #.#.#.",
    "range": "plan steps=4\nrange(0..1) #.#.",
    "output": "plan steps=4\noutput #.#.",
    "fraction": "plan steps=5\na = tokens .5 by random multiple=1\n@mlp #aa#a",
    "number": "plan steps=4\na = tokens 2 by norm multiple=1\n@self #aa.",
    "two budgets": "plan steps=4\na = tokens .3 by random multiple=2\nb = tokens 3 by norm multiple=1\n"
    "@self #a.#\n@mlp #bb.",
}


@functools.cache
@own_numbers
def costs(name: str) -> CostModel:
    if name == "tiny":
        return cost_model(tiny(2), arguments())
    model, call, timestep = zoo(name, ZOO[name][0])
    return cost_model(model, call, timestep)


ZOO: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "pixart": (
        {"batch": 2, "height": 12, "width": 12, "text": 6},
        {"batch": 3, "height": 16, "width": 20, "text": 5},
    ),
    "flux": ({"batch": 2, "tokens": 16, "text": 6}, {"batch": 3, "tokens": 10, "text": 7}),
}
"""The example's sizes, and those where the expressions are held against counts."""


def zoo(name: str, sizes: dict[str, int]) -> tuple[nn.Module, Call, str]:
    """A model of the zoo and a call of it at some sizes."""
    case, batch, text = CASES[name], sizes["batch"], sizes["text"]
    call = case.kwargs(batch)
    call["encoder_hidden_states"] = torch.randn(batch, text, call["encoder_hidden_states"].shape[2])
    if name == "flux":
        call["hidden_states"] = torch.randn(batch, sizes["tokens"], case.shape[1])
        call |= {"txt_ids": torch.zeros(text, 3), "img_ids": torch.zeros(sizes["tokens"], 3)}
    else:
        call["hidden_states"] = torch.randn(batch, 4, sizes["height"], sizes["width"])
        call["encoder_attention_mask"] = torch.ones(batch, text)
    return made(name), call, case.timestep


@functools.cache
def made(name: str) -> nn.Module:
    """One block of each kind, which is as much to solve and half as long to capture."""
    model: Any = CASES[name].make()
    for part in ("transformer_blocks", "single_transformer_blocks"):
        if hasattr(model, part):
            setattr(model, part, getattr(model, part)[:1])
    return model


def tiny_step(batch: int = 2, tokens: int = 3, model: nn.Module | None = None) -> StepGraph:
    return capture_call(model or tiny(2), arguments(batch=batch, tokens=tokens), "timestep").step


def moved(step: StepGraph, tensors: list[Tensor]) -> int:
    """Bytes of the tensors that every operation but views is given and gives, counted in a run."""
    total = 0
    free = ops.VIEWS | ops.SLICES | {ops.aten.expand.default}

    class Counter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            nonlocal total
            value = super().run_node(n)
            if n.op == "call_function" and n.target not in free:
                given = [self.env[item] for item in n.all_input_nodes]
                leaves = [item for item in pytree.tree_leaves([given, value]) if isinstance(item, Tensor)]
                total += sum(item.numel() * item.element_size() for item in leaves)
            return value

    with torch.no_grad():
        Counter(step.module, garbage_collect_values=False).run(*tensors)
    return total


def counted(model: nn.Module, call: Call) -> int:
    """What PyTorch counts in a run; of attention's kernels on a CPU it only knows the plain one."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**call)
    return counter.get_total_flops()


def test_the_expressions_of_the_tiny_model_can_be_read() -> None:
    model = costs("tiny")
    assert str(model.step_flops) == "32*batch*tokens**2 + 512*batch*tokens + 8*batch"
    assert str(model.prologue_flops) == "32*batch"
    assert str(model.site_flops["blocks.1.mlp"]) == "128*batch*tokens"
    assert str(model.step.entry_bytes("blocks.0.self")) == "16*batch*tokens"
    assert model.fixed == {}


def test_flops_and_bytes_of_the_tiny_model_at_a_size_never_captured() -> None:
    model, call = costs("tiny"), arguments(**TINY)
    at, captured = model.at(**TINY), capture_call(tiny(2), call, "timestep")
    assert at.step_flops + at.prologue_flops == graph_flops(captured.step) == counted(tiny(2), call)
    assert at.value(model.call.total_bytes) == moved(captured.step, list(call.values()))
    assert at.site_flops == branch_flops(Program(captured, None).step)


@pytest.mark.parametrize("name", ZOO)
def test_flops_and_bytes_at_a_size_never_captured(name: str) -> None:
    model, there = costs(name), ZOO[name][1]
    network, call, timestep = zoo(name, there)
    at, captured = model.at(**there), capture_call(network, call, timestep)
    assert at.step_flops + at.prologue_flops == graph_flops(captured.step) == counted(network, call)
    inputs = [value for value in pytree.tree_leaves(call) if isinstance(value, Tensor)]
    named = dict(zip(captured.call.leaf_names, range(len(inputs)), strict=True))
    ordered = [call[leaf] for leaf in named]
    assert at.value(model.call.total_bytes) == moved(captured.step, ordered)
    # which rounds down at every operation that sites share
    assert at.site_flops == pytest.approx(branch_flops(Program(captured, None).step), abs=8)
    assert model.fixed == {}
    assert model.call.alone == ()


def check_plan(model: CostModel, program: Program, plan: Plan, sizes: dict[str, int]) -> None:
    """A plan's expressions with sizes put in are the counts of its phases at these sizes."""
    schedule = program.schedule(plan)
    phases = [program.phase(schedule, index).step for index in range(len(schedule.phases))]
    once = [program.prologue.step] if program.prologue else []
    graphs = [*once, *(phases[step.phase] for step in schedule.steps)]
    at = model.at(**sizes)
    assert at.plan_flops(plan) == sum(map(graph_flops, graphs))
    assert at.plan_bytes(plan) == schedule.peak(program.entry_bytes(schedule))
    here = [Sized({}, graph) for graph in graphs]
    assert at.plan_moved(plan) == sum(solve([graph]).total_bytes for graph in here)


@functools.cache
def tiny_program() -> Program:
    return Program(capture_call(tiny(2), arguments(**TINY), "timestep"), None)


@pytest.mark.parametrize("name", PLANS)
def test_plans_at_a_size_never_captured(name: str) -> None:
    check_plan(costs("tiny"), tiny_program(), Plan.parse(PLANS[name]), TINY)


def test_a_token_budget_on_joint_attention() -> None:
    network, call, timestep = zoo("flux", ZOO["flux"][1])
    program = Program(capture_call(network, call, timestep), None)
    plan = Plan.parse("plan steps=4\na = tokens .25 by random multiple=1\n@joint #a.#")
    check_plan(costs("flux"), program, plan, ZOO["flux"][1])


def test_a_budget_stands_in_the_expression_until_the_tokens_are_known() -> None:
    flops = costs("tiny").plan_flops(Plan.parse(PLANS["fraction"]))
    assert flops.atoms(sympy.Function) == {among(symbol("tokens"), sympy.Float(0.5), sympy.Integer(1))}
    for tokens in (1, 2, 5, 200):
        taken = among(sympy.Integer(tokens), sympy.Float(0.3), sympy.Integer(16))
        assert taken == Budget(0.3, 16).among(tokens)


def test_one_size_prices_another() -> None:
    plan = Plan.parse(PLANS["reuse"])
    small, large = costs("tiny").at(), costs("tiny").at(tokens=4096)
    device = Device(flop=1e-12, byte=1e-11, step=1e-4)
    assert small.plan_seconds(plan, device) < large.plan_seconds(plan, device)
    predicted = device.seconds(large.plan_flops(plan), large.plan_moved(plan), 5)
    assert large.plan_seconds(plan, device) == predicted


class Positioned(TinyDiT):
    """A table of positions, learned for three tokens."""

    def __init__(self, depth: int = 1, dim: int = 4) -> None:
        super().__init__(depth, dim)
        self.positions = nn.Parameter(torch.ones(3, dim))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x + self.positions, timestep, text)


class Special(TinyDiT):
    """Adds a position table of its own at three tokens, and computes one elsewhere."""

    def __init__(self, depth: int = 1, dim: int = 4) -> None:
        super().__init__(depth, dim)
        self.register_buffer("table", torch.ones(3, dim))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        count = x.shape[1]
        table = self.table if count == 3 else torch.arange(count).float()[:, None].repeat(1, 4)
        return super().forward(x + table, timestep, text)


class Native(TinyDiT):
    """Scales the tokens once more at three of them."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x * 2 if x.shape[1] == 3 else x, timestep, text)


class Alone(TinyDiT):
    """Scales the tokens of a batch of one."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x * 2 if x.shape[0] == 1 else x, timestep, text)


class Captioned(TinyDiT):
    """Takes a vector for each word of its text, and a mask."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, timestep, (self.text(text) * mask[:, :, None]).mean(1))


class Deeper(TinyDiT):
    """Skips its last block at six tokens."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        gate = (self.time(timestep[:, None]) + self.text(text))[:, None]
        for block in self.blocks[: len(self.blocks) - (x.shape[1] == 6)]:
            x = block(x, gate)
        return x


class Padded(TinyDiT):
    """Pads its tokens to a multiple of four."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4))
        return super().forward(padded, timestep, text)[:, : x.shape[1]]


class Squares(TinyDiT):
    """Has a value of tokens times tokens in one dimension."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        pairs = (x[:, :, None] * x[:, None]).flatten(1, 2)
        return super().forward(x + pairs.mean(1, keepdim=True), timestep, text)


def test_a_size_that_the_model_refuses_is_fixed_and_says_why() -> None:
    model = cost_model(tiny(kind=Positioned), arguments())
    assert "positions" in model.fixed["tokens"]
    assert str(model.step_flops) == "920*batch"
    with pytest.raises(CostError, match=r"tokens=4: it could not be varied from 3: .*positions"):
        model.at(tokens=4)
    assert model.at(batch=3, tokens=3).step_flops == graph_flops(
        Program(capture_call(tiny(kind=Positioned), arguments(batch=3), "timestep"), None).step
    )


def test_a_size_can_be_left_fixed() -> None:
    model = cost_model(tiny(), arguments(), sizes={"tokens": None})
    assert model.fixed == {"tokens": "it was given as fixed"}
    assert list(model.symbols) == ["batch"]


def test_a_table_that_one_size_reads_and_others_compute_is_told() -> None:
    model = cost_model(tiny(kind=Special), arguments())
    assert str(model.step_flops) == "16*batch*tokens**2 + 256*batch*tokens + 8*batch"
    assert any("table" in name for name in model.call.alone)


def test_where_the_example_is_special_the_captures_begin_at_twice_its_size() -> None:
    model = cost_model(tiny(kind=Native), arguments())
    assert model.fixed == {}
    assert model.captures[0].sizes == {"batch": 2, "tokens": 6}
    assert model.at().sizes == {"batch": 2, "tokens": 3}


def test_a_batch_of_one_can_be_the_example() -> None:
    model = cost_model(tiny(kind=Alone), arguments(batch=1))
    assert model.fixed == {}
    assert model.at(batch=7).step_flops == 7 * model.at().step_flops


def test_an_input_of_the_same_size_by_chance_does_not_grow() -> None:
    call = {**arguments(), "text": torch.randn(2, 3, 4), "mask": torch.ones(2, 3)}
    model = cost_model(tiny(kind=Captioned), call)
    assert model.fixed == {}
    assert str(model.call.total_flops) == ("32*batch*text + 16*batch*tokens**2 + 256*batch*tokens + 40*batch")


def test_an_explicit_call_says_what_grows() -> None:
    model = cost_model(
        tiny(2), arguments(), calls={"tokens": arguments(tokens=8), "all": arguments(batch=3, tokens=5)}
    )
    assert model.step_flops == costs("tiny").step_flops
    assert [dict(capture.sizes) for capture in model.captures][-1] == {"batch": 3, "tokens": 5}


def at(sizes: dict[str, int], kind: type[TinyDiT]) -> Sized:
    return Sized(sizes, tiny_step(**sizes, model=tiny(2, kind)))


def base_and(kind: type[TinyDiT], *others: dict[str, int]) -> list[Sized]:
    sizes = [{"batch": 2, "tokens": 3}, {"batch": 4, "tokens": 3}, *others]
    return [at(size, kind) for size in sizes]


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "other operations": (
        lambda: solve(base_and(Deeper, {"batch": 2, "tokens": 6})),
        r"at batch=2 tokens=6 the model runs other operations: \d+ that depend .* instead of \d+",
    ),
    "another operation": (
        lambda: solve(base_and(Native, {"batch": 2, "tokens": 6})),
        r"outside the sites, node mul \(aten.mul.Tensor\): at batch=2 tokens=6 .* instead; choose sizes",
    ),
    "padding": (
        lambda: solve(base_and(Padded, {"batch": 2, "tokens": 6}, {"batch": 6, "tokens": 10})),
        r"node \w+ .*: a dimension is 4 at batch=2 tokens=3, .* 12 at batch=6 tokens=10: no sum of products "
        "of tokens; fix a size",
    ),
    "squares": (
        lambda: solve(base_and(Squares, {"batch": 2, "tokens": 6}, {"batch": 6, "tokens": 9})),
        "node flatten .*no sum of products of tokens",
    ),
    "no capture of a size": (lambda: solve(base_and(TinyDiT)), "no capture changes tokens alone"),
    "unknown size": (lambda: costs("tiny").at(height=3), r"height=3 is no size .* it has batch, tokens"),
    "no whole number": (
        lambda: costs("pixart").at(height=9),
        r"height=9 .*: a dimension would be .* no such call fits",
    ),
    "no tokens": (lambda: costs("tiny").at(tokens=0), "tokens=0: a dimension would be .* = 0"),
    "unknown site": (lambda: costs("tiny").step.entry_bytes("x"), "no site x; the sites are blocks.0.self"),
    "unknown call": (
        lambda: cost_model(tiny(), arguments(), calls={"depth": arguments()}),
        "there is no size depth; the model has batch, tokens",
    ),
    "the same call": (
        lambda: cost_model(tiny(), arguments(), calls={"tokens": arguments()}),
        "the call for tokens has the example's size, 3",
    ),
    "sizes that do not go together": (
        lambda: cost_model(tiny(), arguments(), calls={"all": {**arguments(), "text": torch.ones(7, 4)}}),
        "batch, tokens cannot change together: .*leave a size as it is",
    ),
    "too few rows": (lambda: Device.fit([(1.0, 1.0, 1.0)]), "three or more rows"),
    "no seconds": (lambda: Device.fit([(1.0, 1.0, 0.0)] * 3), "no seconds; measure it again"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    action, message = REFUSALS[case]
    with pytest.raises(CostError, match=message):
        action()


def test_a_refusal_within_a_phase_names_what_is_left_of_it() -> None:
    plan = Plan.parse("plan steps=2\n@mlp #.")

    def phase(batch: int, tokens: int) -> Sized:
        call = arguments(batch=batch, tokens=tokens)
        program = Program(capture_call(tiny(2, Padded), call, "timestep"), None)
        schedule = program.schedule(plan)
        return Sized({"tokens": tokens}, program.phase(schedule, len(schedule.phases) - 1).step)

    with pytest.raises(CostError, match="no sum of products of tokens"):
        solve([phase(2, 3), phase(2, 6), phase(2, 10)])


def test_sums_and_products_that_the_captures_cannot_tell_apart() -> None:
    class Linear(nn.Module):
        def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
            return latents.flatten(2) * 2

    def sized(height: int, width: int) -> Sized:
        call = {"latents": torch.ones(2, 3, height, width), "timestep": torch.ones(2)}
        return Sized({"height": height, "width": width}, capture_call(Linear(), call, "timestep").step)

    captures = [sized(4, 4), sized(8, 4), sized(4, 8)]
    with pytest.raises(CostError, match="height and width may be added or multiplied"):
        solve(captures)
    shapes = solve([*captures, sized(12, 8)])
    assert str(shapes.shape(shapes.step.calls()[-1].name)[2]) == "height*width"


def test_guidance_on_a_doubled_batch_is_refused() -> None:
    plan = Plan.parse("plan steps=4 conditional=last\nguidance #.#.")
    with pytest.raises(PlanError, match="doubled batch has no cost expression"):
        costs("tiny").plan_flops(plan)
    assert costs("tiny").plan_flops(plan, role="cond") != 0


def test_fitting_a_device_finds_the_constants_that_made_the_rows() -> None:
    made = Device(flop=2e-13, byte=5e-12, step=3e-5)
    work = [(1e9, 4e6), (8e9, 9e6), (3e10, 2e8), (5e11, 3e8), (2e10, 5e9)]
    found = Device.fit([(flops, bytes, made.seconds(flops, bytes)) for flops, bytes in work])
    assert (found.flop, found.byte, found.step) == pytest.approx((2e-13, 5e-12, 3e-5), rel=1e-6)
    assert found.residuals == pytest.approx([0.0] * 5, abs=1e-6)


def test_no_constant_of_a_device_is_negative() -> None:
    found = Device.fit([(1e9, 1e6, 2e-3), (2e9, 9e6, 1e-3), (4e9, 2e6, 5e-3), (8e9, 5e7, 6e-3)])
    assert min(found.flop, found.byte, found.step) >= 0
    assert max(map(abs, found.residuals)) > 0.01
