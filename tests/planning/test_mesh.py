"""Profiles, tuned plans and comparisons by several ranks are those of one process, and the same on all."""

import math
import pickle
import socket
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import graphcache
import mesh_planning
from graphcache import GraphCacheError, Plan, Profile
from graphcache.analysis.shard_layout import Axis, Segment
from graphcache.cli.main import app
from graphcache.ir.ranks import Ranks
from graphcache.planning.comparison import load_rows
from graphcache.planning.holdings import Cut, Holding, Rows, samples_of
from graphcache.planning.moves import TokensOfPart
from graphcache.planning.probing import ProbeEngine
from graphcache.planning.profile_memory import Needs
from graphcache.planning.recording import Recording
from graphcache.planning.sampling import Sampling
from graphcache.planning.subject import described
from graphcache.runtime.options import Options
from linear import Sampler
from lockstep import Mesh, line
from mesh_planning import BUDGETED, PLAN
from processes import together
from tiny import tiny


def assert_alike(found: Profile, alone: Profile) -> None:
    assert [replace(site, seconds=0) for site in found.sites] == [replace(s, seconds=0) for s in alone.sites]
    for name, table, other in (
        *zip([site.name for site in alone.sites], found.gram, alone.gram, strict=True),
        *zip([site.name for site in alone.sites], found.effects, alone.effects, strict=True),
    ):
        np.testing.assert_allclose(table, other, atol=1e-5 * abs(other).max(), rtol=0, err_msg=name)
    assert (found.numbers, found.calls, found.flops) == (alone.numbers, alone.calls, alone.flops)
    for ours, theirs in ((found.drift, alone.drift), (found.ranking, alone.ranking)):
        assert ours.keys() == theirs.keys()
        for name, numbers in ours.items():
            np.testing.assert_allclose(numbers, theirs[name], atol=1e-5, rtol=1e-5, err_msg=name)


def assert_the_same(one: Profile, other: Profile) -> None:
    assert np.array_equal(one.gram, other.gram)
    assert np.array_equal(one.effects, other.effects)
    assert (one.sites, one.timings) == (other.sites, other.timings)
    for ours, theirs in ((one.drift, other.drift), (one.ranking, other.ranking)):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(table, theirs[name]) for name, table in ours.items())


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("sizes", "mode", "options"),
    [
        ({"tokens": 2}, "first", {"memory": 60_000, "detail": "tokens"}),
        ({"guidance": 2}, "last", {"detail": "steps", "backend": "aot_eager"}),
        ({"guidance": 2}, None, {}),
        ({"guidance": 2, "tokens": 2}, "first", {"detail": "tokens"}),
    ],
)
def test_profiles(sizes: dict[str, int], mode: str | None, options: dict[str, Any]) -> None:
    count = 2 ** len(sizes)
    first, *others = together(count, mesh_planning.profiled, sizes, mode, options)
    assert_alike(first[1], first[0])
    for other in others:
        assert_the_same(other[1], first[1])


def test_profiles_of_models(request: pytest.FixtureRequest) -> None:
    names = ["flux", "latte"]  # two streams, and frames that are rows of a sample
    if request.config.getoption("--every-model"):
        names += ["dit", "pixart", "sd3", "wan", "cogvideox", "hunyuan_video"]
    first, second = together(2, mesh_planning.profiled_models, names, timeout=600)
    for name in names:
        assert first[name][0].drift
        assert_alike(first[name][1], first[name][0])
        assert_the_same(second[name][1], first[name][1])


def test_profiles_of_models_that_take_turns() -> None:
    (alone, ours), (_, theirs) = together(2, mesh_planning.relayed)
    assert_alike(ours, alone)
    assert_the_same(theirs, ours)
    assert (ours.handovers, ours.calls) == (alone.handovers, 2)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("shared", "plan", "memory"),
    [
        ("tokens", PLAN, 40_000),
        ("guidance", PLAN, 40_000),
        ("tokens", BUDGETED, 60_000),
        ("guidance", BUDGETED, 60_000),
    ],
)
def test_tuned_plans(shared: str, plan: Plan, memory: int) -> None:
    first, second = together(2, mesh_planning.tuned, {shared: 2}, plan, (1 << 20, memory))
    for alone, ours, theirs in ((first[0], first[1], second[1]), (first[2], first[3], second[3])):
        assert ours == theirs
        assert ours.plan != plan
        for row, other in zip(ours.plan.rows, alone.plan.rows, strict=True):
            assert (row.selector, row.actions) == (other.selector, other.actions)
            for (_, mine), (_, expected) in zip(row.coefficients, other.coefficients, strict=True):
                assert mine == pytest.approx(expected, abs=1e-5)
        assert ours.after == pytest.approx(alone.after, abs=1e-3)
        curves = [[now.trained for now in tuned.curve] for tuned in (ours, alone)]
        assert curves[0] == pytest.approx(curves[1], 1e-5)
    assert first[1].plan == first[3].plan, "what is computed again changes nothing"


def test_comparisons() -> None:
    first, second = together(2, mesh_planning.compared, {"tokens": 2})
    alone, ours = first
    assert ours == second[1]
    for row, other in zip(ours, alone, strict=True):
        assert (row.name, row.kind, row.steps, row.failure) == (other.name, other.kind, other.steps, None)
        assert row.psnr == pytest.approx(other.psnr, abs=1e-3)
        assert row.ideal == pytest.approx(other.ideal, rel=0.05)


def test_auto(tmp_path: Path) -> None:
    first, second = together(2, mesh_planning.automatic, str(tmp_path))
    (alone, result), (ours, shared) = first
    assert ours == second[1][0]
    assert torch.equal(shared, second[1][1])
    torch.testing.assert_close(shared, result, atol=1e-4, rtol=0)
    assert ours[1] == alone[1]
    assert [row.actions for row in ours[0].rows] == [row.actions for row in alone[0].rows]
    assert Plan.load(tmp_path / "shared" / "plan.txt") == ours[0]
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("shared", "alone0")]
    assert names[0] == names[1] == ["plan.txt", "profile.json"]


def test_plans_that_ranks_cannot_share_are_not_chosen() -> None:
    first, second = together(2, mesh_planning.checked)
    assert str(first) == str(second)
    *errors, other = first
    assert all(0 < error < 1 for error in errors)
    assert math.isnan(other)


def test_an_interrupted_profile_goes_on_where_it_was(tmp_path: Path) -> None:
    first, second = together(2, mesh_planning.interrupted, str(tmp_path / "profile.json"))
    assert first[:2] == second[:2] == [[".profile.json.part0"], [(1, 2), (2, 2)]]
    for other in (first[3], second[2], second[3]):
        assert_the_same(other, first[2])
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


FACTORY = "mesh_planning:factory"
COMMANDS = {
    "auto": f"auto {FACTORY} --output out --backend none --steps 4 --iterations 1 --speedup 1.3",
    "profile": f"profile {FACTORY} --backend none --steps 4 --detail steps",
    "search": f"search profile.json --model {FACTORY} --speedup 1.3",
    "tune": f"tune {FACTORY} plan.txt --iterations 1",
    "compare": f"compare {FACTORY} --plan tuned.txt --promise --steps 4 --backend none --output rows.json",
}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        places = [stack.enter_context(socket.socket()) for _ in range(count)]
        for place in places:
            place.bind(("127.0.0.1", 0))
        return [place.getsockname()[1] for place in places]


def test_the_commands(tmp_path: Path) -> None:
    """Each goes on with what the one before has left; the first rank alone speaks, reads and writes."""
    commands = dict(zip(free_ports(len(COMMANDS)), COMMANDS.values(), strict=True))
    (first, there), (second, elsewhere) = together(2, mesh_planning.commanded, str(tmp_path), commands)
    assert second == [("", "None")] * len(COMMANDS), first
    assert elsewhere == []
    assert there == ["out", "plan.txt", "profile.json", "rows.json", "tuned.txt"]
    told = dict(zip(COMMANDS, (text for text, _ in first), strict=True))
    assert "other libraries' caches run on one device, and are left out" in told["auto"]
    assert "backend=None, mesh=mesh)" in told["auto"]
    assert [error for _, error in first] == ["None"] * len(COMMANDS)
    assert "dB after" in told["tune"]
    assert "wrote tuned.txt: it promises" in told["compare"]
    home = tmp_path / "0"
    rows = {row.name for row in load_rows(home / "out" / "comparison.json")}
    assert rows == {"plain", "found", "fora", "taylorseer", "3 steps"}
    model, sampler, samples = mesh_planning.factory()
    alone = graphcache.profile(model, samples, steps=4, sampler=sampler, detail="steps")
    assert_alike(graphcache.load_profile(home / "profile.json"), alone)
    (_, row) = load_rows(home / "rows.json")
    for path, steps in (("tuned.txt", row.steps), ("out/tuned.txt", 4)):
        plan = Plan.load(home / path)
        assert plan.promise is not None
        assert plan.steps == steps


REFUSED = [
    ("--mesh tokens", "processes that torchrun starts"),
    ("--mesh tokens --ray local", "leave out one of them"),
    ("--mesh tokens --device cuda:1", "ranks have devices of their own"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_commands_refuse(options: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, command in COMMANDS.items():
        if "--ray" not in options or name != "tune":
            assert said in str(CliRunner().invoke(app, f"{command} {options}".split()).exception), name
    assert not [*tmp_path.iterdir()]


def test_a_search_that_runs_nothing_is_not_shared() -> None:
    found = CliRunner().invoke(app, ["search", "profile.json", "--speedup", "2", "--mesh", "tokens"])
    assert "--mesh, --device and --dtype are for the runs of --model" in str(found.exception)


def test_ranks_that_were_given_something_else_say_so_on_all_ranks() -> None:
    first, second = together(2, mesh_planning.disagreeing)
    assert first == second
    wanted = ("memory", "settings", "iterations", "samples")
    for said, name in zip(first, wanted, strict=True):
        assert said.startswith(f"mesh=: ranks were given different {name};")


@pytest.mark.few(2)
@pytest.mark.parametrize("what", ["profile", "tune"])
@pytest.mark.parametrize("within", ["evaluation", "tables"])
def test_a_killed_rank_is_an_error_on_the_other(what: str, within: str) -> None:
    other, killed = together(2, mesh_planning.dying, what, within, timeout=60)
    assert killed is None
    assert other.startswith(
        "StateError: a rank of the mesh is gone, or did not answer in time, on the way ba"
    )


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if two ranks shared everything; nothing may be exchanged."""
    monkeypatch.setattr(Sampling, "ranks", line(2)[0])


@pytest.mark.usefixtures("shared")
class TestRefused:
    def test_code_without_exchanges(self) -> None:
        with pytest.raises(GraphCacheError, match="does not go with mesh="):
            graphcache.profile(tiny(), [1], steps=3, sampler=Sampler(), detail="steps", backend="aot")

    def test_rivals(self) -> None:
        rivals: Any = {"other": None}
        with pytest.raises(GraphCacheError, match="other run on one device alone"):
            graphcache.compare(tiny(), {}, [1], steps=3, sampler=Sampler(), rivals=rivals)


def test_what_ranks_share_is_not_sent_to_workers() -> None:
    sampling = replace(Sampling.of(tiny(), Sampler()), mesh=object())
    with pytest.raises(GraphCacheError, match=r"samples of their own \(run=\).*\(mesh=\), one of both"):
        pickle.dumps(sampling)


def test_what_is_no_mesh_is_refused() -> None:
    with pytest.raises(GraphCacheError, match="mesh= is a int"):
        Sampling.of(tiny(), Sampler(), mesh=2)
    with pytest.raises(GraphCacheError, match=r"parts= and mesh= to Sampling\.of"):
        Sampling.of(Sampling.of(tiny(), Sampler()), mesh=2)


def needs(mesh: Mesh) -> Needs:
    sampling = Sampling.of(tiny(3), Sampler("first", tokens=64))
    engine = ProbeEngine(sampling.models[0], Options(Plan(4), mesh=mesh))
    call = sampling.first_call(1, 4)
    described([engine], [call], "first")
    return Needs.of(engine.probe(engine.prepare(call)), steps=4, window=3, calls=1)


def test_a_rank_needs_memory_for_its_part() -> None:
    alone, rank = needs(()), needs(line(2)[0])
    assert rank.branches == alone.branches // 2
    assert rank.least < alone.least
    # keys and values of all tokens are there as well
    assert rank.passing[0] < 0.75 * alone.passing[0]


def test_sampled_tokens_of_ranks_are_right_on_the_mean() -> None:
    """Each rank takes tokens of its own; their products add up to those of all tokens."""
    probes, made = 2000, torch.Generator().manual_seed(0)
    value, gradient = (torch.randn(1, 12, 3, generator=made) for _ in range(2))
    total = np.zeros(probes)
    for rank, mesh in enumerate(line(2)):
        recording = Recording(1, 0, probes, 0, None, 0.5, frozenset({"site"}), mesh=mesh)
        for probe in range(probes):
            recording.probe = probe
            recording._places.clear()
            recording._held.clear()
            own = [(tensor[:, 6 * rank : 6 * rank + 6],) for tensor in (value, gradient)]
            recording.pulled(0, ("", 0), "site", own[0], own[1], [Rows(1, range(1))])
        total += recording.effects["site"][0, 0, :, 0]
    exact = float((value * gradient).sum())
    assert abs(total.mean() - exact) < 4 * total.std() / probes**0.5
    # three tokens of each of two ranks, one of two neighbours: chosen alike there would be 8 sums
    assert len(np.unique(total.round(4))) > 32


class TestHoldings:
    """Each number of a value is counted by one rank."""

    def part(self, rank: int) -> Holding:
        """Text that all hold, and three pairs of tokens, for each of two samples."""
        ranks, halves = Ranks(3, rank % 3, "tokens"), Ranks(2, rank // 3, "guidance", "guidance")
        segments = Segment(2, False), Segment(6, True)
        return Holding.of([1, 4, 5], [Cut(halves, Axis.of(0, 2, 2)), Cut(ranks, Axis(1, 1, segments, 3))])

    def test_parts_make_up_the_whole(self) -> None:
        whole = torch.arange(1, 2 * 8 * 5 + 1).reshape(2, 8, 5)
        numbers = torch.cat([self.part(rank).counted(whole).flatten() for rank in range(6)])
        assert self.part(0).shape == (2, 8, 5)
        assert sorted(numbers[numbers > 0].tolist()) == whole.flatten().tolist()
        assert self.part(4).counted(whole)[0, 2:].tolist() == whole[1, 4:6].tolist()

    def test_a_whole_value_is_the_first_ranks(self) -> None:
        found = [Holding.of([3], [Cut(Ranks(2, rank, ""), None)]) for rank in range(2)]
        assert [held.counted(torch.ones(3)).tolist() for held in found] == [[1] * 3, [0] * 3]

    @pytest.mark.parametrize("places", [None, [1, 3, 4, 7]])
    def test_lengths_of_tokens_add_up(self, places: list[int] | None) -> None:
        """Also of some tokens, of which every rank has others."""
        whole = torch.randn(2, 8, 5)
        chosen = torch.tensor(range(8) if places is None else places)
        total = torch.zeros(2, 8)
        for rank in range(6):
            held, part = self.part(rank), TokensOfPart(self.part(rank))
            value = whole[torch.tensor(held.entries(0))[:, None], torch.tensor(held.entries(1))]
            own = None if places is None else part.among(chosen)
            total += part.squares(value if own is None else value[:, own], own)
        expected = torch.zeros(2, 8).index_copy(1, chosen, whole.square().sum(-1)[:, chosen])
        torch.testing.assert_close(total, expected)

    def test_lengths_over_what_ranks_share_add_up(self) -> None:
        """Of channels some are split, and the others are held by all ranks and counted once."""
        whole, total = torch.randn(2, 3, 6), torch.zeros(2, 3)
        for rank in range(2):
            axis = Axis(2, 1, (Segment(2, False), Segment(4, True)), 2)
            held = Holding.of([2, 3, 4], [Cut(Ranks(2, rank, ""), axis)])
            total += TokensOfPart(held).squares(whole[:, :, held.entries(2)], None)
        torch.testing.assert_close(total, whole.square().sum(-1))

    def test_rows_say_whose_they_are(self) -> None:
        held = Holding.of([2, 4], [Cut(Ranks(2, 1, ""), Axis.of(0, 4, 2))])
        rows = Rows.of(torch.zeros(2, 4), held)
        assert rows == (4, (2, 3))
        assert samples_of([rows], 4) == [2, 3]
        assert samples_of([rows], 2) == [0, 1]
        assert samples_of([rows], 3) is None
        assert rows.of_samples(2) == (2, [1])
        with pytest.raises(GraphCacheError, match="cannot be told apart"):
            Rows(4, (0, 1, 2)).of_samples(2)
        with pytest.raises(GraphCacheError, match="cannot be told apart"):
            samples_of([Rows(4, (0, 1, 2))], 2)
