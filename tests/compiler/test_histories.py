"""Histories hold entries of one kind; others are refused when plans are checked, stored and read."""

import pytest
import torch
from torch import nn

from graphcache import GraphCacheError, Plan, StateError
from graphcache.compiler.histories import entries, refuse_others
from graphcache.compiler.program import Program
from graphcache.ir.history import History
from graphcache.ir.state import CacheState
from reference import capture_call
from tiny import arguments, tiny

PLAN = Plan.parse("plan steps=4 preset=none\nt = taylorseer order=1\n@self ##t.\n@mlp #.#.")


def program(model: nn.Module, batch: int) -> Program:
    return Program(capture_call(model, arguments(0.5, batch, 3), "timestep"), None)


def test_phases_of_one_plan_agree_about_every_history() -> None:
    made = program(tiny(1), 2)
    schedule = made.schedule(PLAN)
    found = made.entries(schedule)
    assert {name: [tuple(part.shape) for part in parts] for name, parts in found.items()} == {
        History("blocks.0.self"): [(2, 3, 4)],
        History("blocks.0.mlp"): [(2, 3, 4)],
    }


@pytest.mark.parametrize("stored", [True, False])
def test_phases_of_two_sizes_do_not(stored: bool) -> None:
    one, two = program(tiny(1), 1), program(tiny(1), 2)
    schedule = one.schedule(PLAN)
    first, other = one.phase(schedule, 0).step, two.phase(two.schedule(PLAN), 0 if stored else 3).step
    verb = "write" if stored else "read"
    with pytest.raises(
        GraphCacheError,
        match=rf"^{verb} blocks.0.\w+ part 0.*: f32\[2,3,4\] in one .* f32\[1,3,4\] in another",
    ):
        entries([first, other])


def test_an_entry_of_another_kind_is_not_stored() -> None:
    cache = CacheState()
    cache.store(History("a"), (torch.zeros(2, 3),))
    for other in (torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.bfloat16)):
        with pytest.raises(StateError, match=r"^a: .* comes to be cached beside f32\[2,3\]"):
            cache.store(History("a"), (other,))
    assert len(cache.entries[History("a")]) == 1


@pytest.mark.parametrize("other", [torch.zeros(1, 3, 4), torch.zeros(2, 3, 4, dtype=torch.float64)], ids=str)
def test_an_entry_of_another_kind_is_not_read(other: torch.Tensor) -> None:
    made = program(tiny(1), 2)
    phase = made.phase(made.schedule(PLAN), 1)
    cache = CacheState()
    refuse_others(cache, phase)
    for port in phase.places.reads:
        cache.entries[port.history] = [(torch.zeros(2, 3, 4),)] * 2
    refuse_others(cache, phase)
    cache.entries[phase.places.reads[0].history] = [(other,)] * 2
    with pytest.raises(StateError, match="is cached, and this step reads another shape or dtype"):
        refuse_others(cache, phase)
