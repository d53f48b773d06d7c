"""Models shared out among ranks: the results of one process, for a part of the work and of the caches."""

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import token_models
from graphcache import Plan, PlanError, presets
from graphcache.analysis.cost import graph_flops
from graphcache.compiler.program import Program
from graphcache.ir.graph import StepGraph
from graphcache.ir.ranks import Shared
from graphcache.ir.schedule import Role
from graphcache.ir.text import render
from lockstep import Mesh, Rank, exchanges_of, line, run_ranks, square
from reference import capture_call, runner_tensors, subject
from seeding import own_numbers
from tiny import arguments, tiny

STEPS = 4
ONE_PROCESS: list[Mesh] = [()]
TUNED = """plan steps=4 preset=none
c = tuned compute
f = fitted order=1
l = linear8 weight=0.5
@mlp  ##fc
  step 2 = 1.2 -0.2
  step 3 = 0.9 0.1
*     ##l#
"""
PLANS = {
    "fora": presets.fora(STEPS, 2),
    "taylorseer": presets.taylorseer(STEPS, 2, 1),
    "fastercache": presets.fastercache(STEPS, start=0.2),
    "range": Plan.parse("plan steps=4 preset=none\nrange(0.0..0.6) #.#."),
    "tuned": Plan.parse(TUNED),
    "output": Plan.parse("plan steps=4 preset=none\noutput #.#."),
}


@functools.cache
def program(name: str) -> Program:
    return Program(subject(name).captured, None).prepared()


def generation(name: str) -> list[list[Tensor]]:
    """Flat inputs of each step of a model of the zoo."""
    on = subject(name)
    static, latents = on.static(), on.latents()
    times = [1 - step / STEPS for step in range(STEPS)]
    return [runner_tensors(on.model, on.case.call(static, latents + 0.1 * t, t)) for t in times]


def check(
    program: Program,
    meshes: Sequence[Mesh],
    plan: Plan,
    calls: Sequence[Sequence[Tensor]],
    role: Role = "only",
) -> tuple[Rank, Rank]:
    """One process and the first of the ranks, all of which have its results."""
    (alone,) = run_ranks(program, ONE_PROCESS, plan, calls, role)
    ranks = run_ranks(program, meshes, plan, calls, role)
    for rank in ranks:
        for ours, theirs in zip(tree_leaves(rank.results), tree_leaves(alone.results), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len({tuple(rank.held) for rank in ranks}) == 1
    return alone, ranks[0]


@functools.cache
@own_numbers
def tiny_program(tokens: int = 4, batch: int = 2) -> Program:
    return Program(capture_call(tiny(), arguments(tokens=tokens, batch=batch), "timestep"), None).prepared()


def part(program: Program, mesh: Mesh, plan: Plan, phase: int = 0) -> StepGraph:
    """A rank's part of a phase."""
    made = Program(program.captured, None, mesh=mesh).prepared()
    return made.phase(made.schedule(plan), phase).step


def test_a_block_of_two_ranks(golden: Callable[[str], None]) -> None:
    plan = Plan.parse("plan steps=2 preset=none\n@self ##\n@mlp #.")
    golden(render(part(tiny_program(), line(2)[1], plan, 1)))


CHECKED = [
    ("dit", "taylorseer", square(), 0.25),
    ("pixart", "fora", line(2), 0.5),
    ("sd3", "taylorseer", line(2), 0.5),
    ("flux", "tuned", line(2), 0.5),
    ("wan", "tuned", line(2), 0.5),
    ("cogvideox", "range", line(4), (48 / 4 + 6) / 54),  # the 6 words do not divide
    ("hunyuan_video", "fora", line(2), 0.5),
    ("latte", "fastercache", line(2), 0.5),
    ("factorised_dit", "fora", line(2), 0.5),
    ("pixart", "output", line(2, "guidance"), 0.5),
]


@pytest.mark.few(3)
@pytest.mark.parametrize(("name", "plan", "meshes", "share"), CHECKED)
def test_as_one_process(name: str, plan: str, meshes: Sequence[Mesh], share: float) -> None:
    alone, rank = check(program(name), meshes, PLANS[plan], generation(name))
    assert rank.held == pytest.approx([share * held for held in alone.held])


def test_both_halves_of_guidance_and_one() -> None:
    on = subject("dit")
    latents = torch.cat([on.latents()[:1]] * 2)
    times = [1 - step / STEPS for step in range(STEPS)]
    calls = [runner_tensors(on.model, on.case.call(on.static(), latents + 0.1 * t, t)) for t in times]
    made = Program(on.captured, None).prepared()
    made.halve(on.model, calls[0], "last")
    alone, rank = check(made, line(2), PLANS["fastercache"], calls, "doubled")
    schedule = made.schedule(PLANS["fastercache"], role="doubled")
    assert any(phase.half for phase in schedule.phases)
    assert max(rank.held) < max(alone.held)
    with pytest.raises(PlanError, match="row guidance leaves out one of the branches"):
        run_ranks(made, line(2, "guidance"), PLANS["fastercache"], calls, "doubled")


@pytest.mark.parametrize(("tokens", "batch"), [(4, 4), (8, 4), (2, 2)])
@pytest.mark.parametrize("shared", ["tokens", "guidance"])
def test_sizes_that_happen_to_be_equal(tokens: int, batch: int, shared: Shared) -> None:
    """The channels are 4, and so may be the tokens and the samples."""
    calls = [runner_tensors(tiny(), arguments(t, batch, tokens)) for t in (1.0, 0.7, 0.4)]
    check(tiny_program(tokens, batch), line(2, shared), presets.fora(3, 2), calls)


MIXING = {
    "pooled": "mean.dim",
    "tokens_rolled": "roll.default",
    "tokens_flipped": "flip.default",
    "pieces_in_another_order": "slice.Tensor",
    "causal": "scaled_dot_product_attention.default",
    "rotated_in_part": "slice.Tensor",
    "rotated_in_place": "slice.Tensor",
}


@pytest.mark.parametrize("name", [*token_models.ATTENTIONS, "fused", "sequence_first"])
def test_every_layout_of_tokens(name: str) -> None:
    model = token_models.made(name)
    x = torch.randn(3, 2, 16, 12)
    calls = [{"x": item, "timestep": torch.tensor([0.5, 0.5]), **token_models.arguments(2)} for item in x]
    made = Program(capture_call(model, calls[0], "timestep"), None).prepared()
    flat = [runner_tensors(model, call) for call in calls]
    if name not in MIXING:
        check(made, line(2), presets.fora(3, 2), flat)
        return
    with pytest.raises(PlanError, match=rf"mesh=: node \w+ \(aten\.({MIXING[name]})\)"):
        part(made, line(2)[0], presets.fora(3, 2))


EXCHANGES = {"pixart": 2, "flux": 4, "latte": 2, "functional_mmdit": 2 * 4}
"""One for each over tokens of several ranks: not over text, and not over the frames of a place; two where it
is written as products, of which one meets keys and the other values.
"""


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "exchanges"), EXCHANGES.items())
def test_exchanges_of_attention_and_one_at_the_end(name: str, exchanges: int) -> None:
    made = program(name)
    computed, reused = (part(made, line(2)[1], presets.fora(4, 2), phase) for phase in range(2))
    assert [exchanges_of(step) for step in (computed, reused)] == [exchanges + 1, 1]
    assert graph_flops(computed) < 0.6 * graph_flops(made.step)


class Uneven(nn.Module):
    """Attention whose values have more channels than its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v, self.out = nn.Linear(4, 8), nn.Linear(4, 6), nn.Linear(6, 4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        query, key = self.qk(x).chunk(2, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(query, key, self.v(x)))
        return x + self.down(self.up(x + timestep[:, None, None]).relu())


def test_keys_and_values_of_other_shapes_are_two_exchanges() -> None:
    inputs = [{"x": torch.randn(2, 8, 4), "timestep": torch.full((2,), t)} for t in (1.0, 0.5)]
    model = Uneven().eval()
    made = Program(capture_call(model, inputs[0], "timestep"), None).prepared()
    assert exchanges_of(part(made, line(2)[0], presets.compute(2))) == 3
    check(made, line(2), presets.compute(2), [runner_tensors(model, call) for call in inputs])


def test_the_same_part_each_time_and_the_step_unchanged() -> None:
    made, mesh = program("sd3"), line(2)[1]
    before = render(made.step)
    parts = [render(part(made, mesh, presets.fora(4, 2))) for _ in range(2)]
    assert parts[0] == parts[1]
    assert render(made.step) == before
    assert render(part(made, line(2)[0], presets.fora(4, 2))) != parts[0]


class Convolving(nn.Module):
    """Tokens that meet their neighbours within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.up, self.down = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + self.near(x.transpose(1, 2)).transpose(1, 2)
        return x + self.down(self.up(x + timestep[:, None, None]).relu())


class TestRefused:
    def test_tokens_that_do_not_divide(self) -> None:
        with pytest.raises(PlanError, match=r"is \(2, 3, 4\), and its tokens do not divide by 2 ranks"):
            part(tiny_program(3), line(2)[0], presets.compute(1))

    def test_samples_that_do_not_divide(self) -> None:
        with pytest.raises(PlanError, match="its samples do not divide by 4 ranks"):
            part(tiny_program(4), line(4, "guidance")[0], presets.compute(1))

    def test_what_mixes_neighbours(self) -> None:
        inputs = {"x": torch.randn(2, 8, 4), "timestep": torch.ones(2)}
        made = Program(capture_call(Convolving().eval(), inputs, "timestep"), None).prepared()
        with pytest.raises(PlanError, match=r"node conv1d \(aten.conv1d.*neither attention nor behind"):
            part(made, line(2)[0], presets.compute(1))
        part(made, line(2, "guidance")[0], presets.compute(1))  # samples meet nowhere
