"""`linear8`: attention extrapolated from a value in bfloat16 and a difference in 8 bits."""

from collections.abc import Iterator

import pytest
import torch

import graphcache
from graphcache import Plan, PlanError
from graphcache.presets import fastercache
from inside import states_of
from reference import assert_same, subject

ROWS = """
    l = linear8 weight=exact
    h = linear8 weight=0.5
    @self   ##l.#h#l
    @joint  ##l.#h#l
    @mlp    #l.##hh.
"""
PLAN = Plan.parse(f"plan steps=8 preset=none\n{ROWS}")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.few(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["pixart", "latte", "cogvideox", "wan"])
def test_the_reference_packs_alike(name: str, dtype: torch.dtype) -> None:
    on = subject(name, dtype=dtype)
    made = on.sample(on.transform(PLAN), 8)
    assert_same(made, on.sample(on.reference(PLAN), 8))


@pytest.mark.parametrize("start", [2, 5])
def test_a_start_in_mid_schedule(start: int) -> None:
    on = subject("pixart")
    model = on.transform(PLAN)
    model.reset(start_step=start)
    assert_same(on.sample(model, 8, start), on.sample(on.reference(PLAN, start), 8, start))


def test_it_is_near_the_whole_cache() -> None:
    on = subject("pixart")
    whole = Plan.parse(str(PLAN).replace("linear8", "linear"))
    for packed, full in zip(on.sample(on.transform(PLAN), 8), on.sample(on.transform(whole), 8), strict=True):
        error = (packed[0] - full[0]).norm() / full[0].norm()
        assert error < 0.01


def test_an_entry_has_three_bytes_an_element_and_a_scale_a_token() -> None:
    on = subject("pixart")
    model = on.transform(PLAN)
    for step in range(2):
        model(**on.case.call(on.static(), on.latents(), 1 - step / 8))
    (branch,) = model.summary().branches
    (shape,) = {tuple(node.meta["val"].shape) for node in _values(on)}
    tokens, width = shape[0] * shape[1], shape[2]
    # two blocks: attention and MLP, the MLP's newest one is older
    assert branch.steps[-1].held_bytes == 4 * (3 * tokens * width + 4 * tokens)
    state = states_of(model)["", 0]
    assert state.cache.held_bytes() == branch.steps[-1].held_bytes


def _values(on: object) -> list[torch.fx.Node]:
    step = on.captured.step
    nodes = step.nodes()
    return [nodes[branch.value] for branch in step.branches if branch.role != "cross"]


def test_other_forecasts_of_a_row_cannot_read_it() -> None:
    with pytest.raises(PlanError, match="'l' is linear8, whose cache the row's other letters cannot read"):
        Plan.parse("plan steps=3\nl = linear8 weight=1.0\nt = newton order=1\n@self #lt")


def test_fastercache_takes_it() -> None:
    plan = fastercache("latte", 12, compact=True)
    assert Plan.parse(str(plan)) == plan
    assert [letter.kind for letter in plan.letters] == ["linear8", "frequency"]
    assert graphcache.presets.resample(plan, 20) == fastercache("latte", 20, compact=True)
