"""Cache entries in host memory: the same pictures, and transfers in the order of the layers."""

from collections.abc import Iterator

import pytest
import torch

import graphcache
from graphcache import Plan
from graphcache.compiler.program import Program
from graphcache.ir.graph import CacheRead, CacheWrite, StepGraph
from graphcache.passes.offload import Offload
from graphcache.passes.transfer import ARRIVE, FETCH, SEND
from inside import states_of
from reference import assert_same, subject
from tiny import arguments, tiny

PLAN = Plan.parse("""
    plan steps=8 preset=none
    l = linear weight=0.5
    @self   ##l.##.l
    @cross  #.#.#.#.
    @mlp    #l.##.l.
""")
EVERYWHERE = Plan.parse("plan steps=8 preset=none\nl = linear weight=0.5\n* ##l.##.l")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def phases(plan: Plan = PLAN) -> list[tuple[StepGraph, StepGraph]]:
    """Every phase of a plan on PixArt, without and with transfers."""
    program = Program(subject("pixart").captured, None)
    schedule = program.schedule(plan)
    before = [program.phase(schedule, index).step for index in range(len(schedule.phases))]
    return [(step, Offload(schedule.movable)(step)) for step in before]


@pytest.mark.parametrize("name", ["pixart", "latte", "flux"])
def test_the_results_are_those_without(name: str) -> None:
    on = subject(name)
    plan = PLAN if name == "pixart" else EVERYWHERE
    model = graphcache.transform(on.model, plan, offload=True)
    assert_same(on.sample(model, 8), on.sample(graphcache.transform(on.model, plan), 8))


def test_compiled_graphs_keep_the_transfers() -> None:
    results = []
    for offload in (False, True):
        model = graphcache.transform(tiny(), EVERYWHERE, backend="inductor", offload=offload)
        results.append([model(**arguments(1 - step / 8)) for step in range(8)])
    assert_same(*results)


def test_every_entry_is_fetched_once_and_waited_for_before_it_is_read() -> None:
    for before, after in phases():
        nodes = after.calls()
        place = {node: number for number, node in enumerate(nodes)}
        arrivals = {value: node for node in nodes if node.target is ARRIVE for value in node.args[0]}
        fetched = [node for node in nodes if node.target is FETCH]
        reads = [node for port, node in after.ports() if isinstance(port, CacheRead)]
        assert sorted(node.args[0].name for node in fetched) == sorted(node.name for node in reads)
        assert len(reads) == sum(isinstance(port, CacheRead) for port in before.inputs)
        for node in fetched:
            readers = [user for user in node.users if user.target is not ARRIVE]
            assert readers
            assert place[arrivals[node]] < min(place[user] for user in readers)


def test_entries_are_asked_for_when_those_of_the_site_before_arrive() -> None:
    for _, after in phases():
        kinds = [node.target for node in after.calls() if node.target in (FETCH, ARRIVE)]
        text = "".join("f" if kind is FETCH else "a" for kind in kinds)
        # never are more sites under way than the next one
        assert text == "" or (text[0] == "f" and text[-1] == "a" and "aa" not in text)


def test_every_stored_value_is_sent_right_behind_its_node() -> None:
    for before, after in phases():
        names = dict(zip(before.outputs, before.results(), strict=True))
        for port, node in zip(after.outputs, after.results(), strict=True):
            if isinstance(port, CacheWrite):
                assert node.target is SEND
                assert node.prev.name == names[port].name
                assert node.meta["val"].device.type == "cpu"


def test_it_changes_nothing_the_second_time() -> None:
    for _, after in phases():
        ports = (*after.inputs, *after.outputs)
        again = Offload({port.history for port in ports if isinstance(port, CacheRead | CacheWrite)})(after)
        assert [node.target for node in again.calls()] == [node.target for node in after.calls()]


def test_what_tokens_are_written_into_stays() -> None:
    plan = Plan.parse("plan steps=4 preset=none\nt = tokens 16 by random\n@mlp #tt.\n@cross #.#.")
    program = Program(subject("pixart").captured, None)
    movable = program.schedule(plan).movable
    assert movable
    assert all("cross" in name.site for name in movable)


def test_the_summary_tells_how_much_is_on_the_host() -> None:
    on = subject("pixart")
    model = graphcache.transform(on.model, PLAN, offload=True)
    on.sample(model, 8)
    (branch,) = model.summary().branches
    assert branch.host_bytes == branch.peak_bytes - branch.hoisted_bytes > 0
    assert "in host memory" in str(branch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", [None, "inductor"])
def test_entries_are_pinned_and_the_results_the_same_on_a_device(backend: str | None) -> None:
    on = subject("pixart", device="cuda")
    made = []
    for offload in (False, True):
        model = graphcache.transform(on.model, PLAN, offload=offload, backend=backend)
        made.append(on.sample(model, 5))
        states = states_of(model).values()
        kept = [tensor for state in states for tensor in state.cache.tensors()]
        assert kept
        assert all(tensor.is_pinned() == offload for tensor in kept)
    # what fuses across a cached value without transfers is two kernels with them
    close = 0 if backend is None else 1e-5
    torch.testing.assert_close(*made, rtol=close, atol=close)
