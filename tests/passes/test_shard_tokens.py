"""Budgets of tokens shared out among ranks: those of one process, each rank computing its part of them."""

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

import token_models
from graphcache import Plan, PlanError
from graphcache.analysis.cost import graph_flops
from graphcache.analysis.shard_layout import Axis
from graphcache.analysis.shards import Given, shards
from graphcache.compiler.program import Program
from graphcache.ir.graph import CacheRead, CacheWrite, Output, StepGraph, value_of
from graphcache.ir.history import History
from graphcache.passes import scores
from lockstep import Mesh, exchanges_of, line, square
from reference import capture_call, runner_tensors, subject
from seeding import own_numbers
from tests.passes.test_shard import check, generation, part, program, tiny_program
from tiny import arguments, tiny

BY_ROLE = {
    "dit": "a = tokens 5 by random multiple=1\n@self #a#a\n@mlp #aa.",
    "pixart": "a = tokens 7 by norm multiple=1\n@cross #aa.\n@mlp #a.a",
    "entropy": "a = tokens 4 by entropy multiple=1\n@cross #aa.",
    "sd3": "a = tokens 4 by random multiple=1\n@joint #aa.\n@mlp #aaa",
    "flux": "a = tokens 3 by influence multiple=1\n@joint #a.#\n@joint.context #.aa\n@parallel #aa#",
    "wan": "a = tokens 9 by stratified multiple=1\n@self #aa.\n@cross #a.#",
    "cogvideox": "a = tokens 5 by random multiple=1\nb = tokens 1 by norm multiple=1\n"
    "@joint #aa#\n@mlp.context #b.#",
    "hunyuan_video": "a = tokens 3 by norm multiple=1\n@joint #aa.\n@parallel #a.a",
    "latte": "a = tokens 3 by random multiple=1\n@self.spatial #aa.\n@cross #.a#\n@mlp #aaa",
}
CHECKED = [
    ("dit", "dit", square(), 0.25),
    ("pixart", "pixart", line(4), 0.25),
    ("pixart", "entropy", line(2), 0.5),
    ("sd3", "sd3", line(2), 0.5),
    ("flux", "flux", line(2), 0.5),
    ("wan", "wan", line(2), 0.5),
    ("cogvideox", "cogvideox", line(4), 0.4),  # the 6 words do not divide
    ("hunyuan_video", "hunyuan_video", line(2), 0.55),
    ("latte", "latte", line(2), 0.5),
    ("pixart", "pixart", line(2, "guidance"), 0.5),
]


def plan(rows: str, steps: int = 4) -> Plan:
    return Plan.parse(f"plan steps={steps} preset=none\n{rows}")


@pytest.mark.few(3)
@pytest.mark.parametrize(("name", "rows", "meshes", "share"), CHECKED)
def test_as_one_process(name: str, rows: str, meshes: Sequence[Mesh], share: float) -> None:
    alone, rank = check(program(name), meshes, plan(BY_ROLE[rows]), generation(name))
    assert max(rank.held) <= share * max(alone.held)


@pytest.mark.few(4)
@pytest.mark.parametrize("meshes", [line(2), line(4), square()], ids=["2", "4", "2x2"])
@pytest.mark.parametrize(("tokens", "count"), [(4, 1), (4, 3), (8, 5)])
def test_any_number_of_tokens(tokens: int, count: int, meshes: Sequence[Mesh]) -> None:
    """The channels are 4, as may be the tokens; what is chosen need not divide by the ranks."""
    calls = [runner_tensors(tiny(), arguments(t, 4, tokens)) for t in (1.0, 0.7, 0.4)]
    check(
        tiny_program(tokens, 4),
        meshes,
        plan(f"a = tokens {count} by random multiple=1\n@self #aa\n@mlp #a#", 3),
        calls,
    )


@functools.cache
@own_numbers
def attending(name: str) -> tuple[Program, list[list[Tensor]]]:
    """A model of two blocks, and the inputs of three steps."""
    model = token_models.made(name)
    x = torch.randn(3, 2, 16, 12)
    calls = [{"x": item, "timestep": torch.tensor([0.5, 0.5]), **token_models.arguments(2)} for item in x]
    made = Program(capture_call(model, calls[0], "timestep"), None).prepared()
    return made, [runner_tensors(model, call) for call in calls]


SCORES = {
    "norm": "by norm",
    "influence": "by influence",
    "sampled": "by influence queries=.25",
    "stratified": "by stratified",
    "clusters": "by cluster blend=0.25",
}


@pytest.mark.few(3)
@pytest.mark.parametrize("score", SCORES)
def test_every_score(score: str) -> None:
    made, calls = attending("rotated_by_halves")
    check(made, line(2), plan(f"a = tokens 5 {SCORES[score]} multiple=1\n* #aa", 3), calls)


def test_a_map_in_pieces_stays_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a map that is too large for one piece each rank computes its part, and exchanges its sums alone."""
    monkeypatch.setattr(scores, "MOST_BYTES", 2048)
    rows = plan("a = tokens 4 by entropy multiple=1\n@cross #aaa")
    alone = Program(program("pixart").captured, None).prepared()
    pieces = [
        graph_flops(made.phase(made.schedule(rows), 0).step)
        for made in (alone, Program(alone.captured, None, mesh=line(2)[1]).prepared())
    ]
    assert pieces[1] < 0.6 * pieces[0]
    check(alone, line(2), rows, generation("pixart"))


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["beside_text", "heads_among_samples", "summed_by_letters", "fused"])
def test_other_layouts(name: str) -> None:
    made, calls = attending(name)
    check(made, line(2), plan("a = tokens 6 by random multiple=1\n* #aa", 3), calls)


def test_both_halves_of_guidance() -> None:
    on = subject("dit")
    latents = torch.cat([on.latents()[:1]] * 2)
    calls = [runner_tensors(on.model, on.case.call(on.static(), latents + t, t)) for t in (1.0, 0.75, 0.5)]
    made = Program(on.captured, None).prepared()
    made.halve(on.model, calls[0], "last")
    rows = Plan.parse(
        "plan steps=3 preset=none conditional=last\na = tokens 5 by cluster multiple=1 blend=.25\n"
        "@mlp #aa\nguidance ##."
    )
    check(made, line(2), rows, calls, "doubled")


EXCHANGES = {"mlp": 2, "self": 5, "cross": 2}


@pytest.mark.parametrize("role", EXCHANGES)
def test_exchanges_of_chosen_tokens_and_the_work_of_a_rank(role: str) -> None:
    """To whom computes them and back to whom keeps them; of attention the same of keys and values, which are
    then gathered from the entries, both at once.
    """
    made, rows = program("pixart"), plan(f"a = tokens 8 by random multiple=1\n* #.\n@{role} #a", 2)
    alone = made.phase(made.schedule(rows), 1).step
    step, sites = part(made, line(2)[1], rows, 1), 2
    assert exchanges_of(step) == EXCHANGES[role] * sites + 1
    stays = graph_flops(part(made, line(2)[1], plan("* #.", 2), 1))
    whole = graph_flops(made.phase(made.schedule(plan("* #.", 2)), 1).step)
    assert graph_flops(step) - stays <= 0.55 * (graph_flops(alone) - whole)


def test_all_ranks_choose_the_same_of_whole_scores() -> None:
    made, rows = program("dit"), plan("a = tokens 5 by norm multiple=1\n@mlp #a", 2)
    step = part(made, line(2)[0], rows)
    scored = {
        port.history.site: result
        for port, result in zip(step.outputs, step.results(), strict=True)
        if isinstance(port, CacheWrite) and port.history.content == "scores"
    }
    assert scored
    assert {tuple(value_of(result).shape) for result in scored.values()} == {(2, 16)}


def test_an_entry_that_is_taken_asunder_is_not_written_to() -> None:
    """A copy of all parts would be written to, and no later step would read that."""
    graph = fx.Graph()
    with FakeTensorMode():
        entry, index, values = graph.placeholder("entry"), graph.placeholder("index"), graph.placeholder("v")
        entry.meta["val"], index.meta["val"] = torch.empty(2, 6, 4), torch.empty(2, dtype=torch.int64)
        values.meta["val"] = torch.empty(2, 2, 2, 4)
        aten = torch.ops.aten
        cut = graph.call_function(aten.reshape.default, (entry, [2, 3, 2, 4]))
        cut.meta["val"] = torch.empty(2, 3, 2, 4)
        rows = graph.call_function(aten.arange.default, (2,))
        rows.meta["val"] = torch.empty(2, dtype=torch.int64)
        rows = graph.call_function(aten.reshape.default, (rows, [2, 1]))
        rows.meta["val"] = torch.empty(2, 1, dtype=torch.int64)
        put = graph.call_function(aten.index_put_.default, (cut, [rows, index], values))
        put.meta["val"] = torch.empty(2, 3, 2, 4)
    graph.output((put,))
    ports = (CacheRead(History("a"), 0, 0), *(CacheRead(History("b"), 0, i) for i in range(2)))
    step = StepGraph(torch.nn.Module(), graph, ports, (Output(0),))
    axis = Axis.of(1, 6, 2)
    assert axis is not None
    with pytest.raises(PlanError, match="chosen tokens are written into a cache entry by node index_put_"):
        shards(step, Given({}, {"entry": axis}))
