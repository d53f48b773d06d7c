"""Token budgets of attention that lays its tokens out in many ways: followed rightly, or refused by name."""

from functools import cache

import pytest
import torch

from graphcache import Plan, PlanError
from graphcache.compiler.program import Program
from reference import Subject, assert_same, capture_call
from seeding import own_numbers
from tests.analysis.test_tokens import assert_close, inputs, run
from tests.runtime.test_semantics import check_against_reference
from token_models import ATTENTIONS, WIDTH, arguments, made
from zoo import Case
from zoo.case import unit

REFUSED = {
    "tokens_rolled": "aten.roll.default.* moves tokens to other places",
    "tokens_flipped": "aten.flip.default.* moves tokens to other places",
    "in_windows": "attends within groups of tokens, each of which has keys of its own",
    "causal": "scaled_dot_product_attention.* mixes tokens",
    "pooled": "aten.mean.dim.* mixes tokens",
    "pieces_in_another_order": "aten.cat.default.* joins tokens in another order",
}
FOLLOWED = [name for name in (*ATTENTIONS, "fused", "sequence_first") if name not in REFUSED]
TOKENS = 16


@pytest.fixture(autouse=True)
def _inference() -> object:
    with torch.no_grad():
        yield


@cache
@own_numbers
def laid_out(name: str, batch: int) -> Subject:
    model = made(name)
    case = Case(name, lambda: made(name), arguments, "x", (TOKENS, WIDTH), "timestep", unit, {}, 2)
    return Subject(case, model, capture_call(model, case.kwargs(batch), "timestep"), batch)


def budgeted(letter: str, on: Subject, actions: str) -> Plan:
    """A row for every branch."""
    rows = "\n".join(f"{branch.name} {actions}" for branch in on.captured.step.branches)
    return Plan.parse(f"plan steps={len(actions)}\n{letter}\n{rows}")


@pytest.mark.few(8)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FOLLOWED)
def test_all_tokens_equal_compute_bit_for_bit(name: str, batch: int) -> None:
    on = laid_out(name, batch)
    given = [inputs(on, 1 - step / 3, step) for step in range(3)]
    plan = budgeted(f"a = tokens {TOKENS + 5} by random multiple=1", on, "#aa")
    assert_same(run(on, plan, given), run(on, budgeted("", on, "###"), given))


@pytest.mark.few(4)
@pytest.mark.parametrize("name", FOLLOWED)
def test_some_tokens_equal_the_reference(name: str) -> None:
    on = laid_out(name, 3)
    letters = "a = tokens 5 by random multiple=1"
    check_against_reference(on, budgeted(letters, on, "#aa.#a"), assert_close)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", FOLLOWED)
def test_tokens_of_large_values_equal_the_reference(name: str) -> None:
    on = laid_out(name, 2)
    check_against_reference(on, budgeted("a = tokens 7 by norm multiple=1", on, "#aa"), assert_close)


@pytest.mark.parametrize("name", REFUSED)
def test_what_moves_or_mixes_tokens_is_refused(name: str) -> None:
    on = laid_out(name, 2)
    with pytest.raises(PlanError, match=f"no token budget, since node .*{REFUSED[name]}"):
        Program(on.captured, None).check(budgeted("a = tokens 4 by random", on, "#a"))


@pytest.mark.parametrize(
    ("name", "letter", "reason"),
    [
        ("across_samples_in_one_sequence", "entropy", r"attention is not \(rows, heads, tokens, channels\)"),
        ("samples_in_one_sequence", "influence", r"attention is not \(rows, heads, tokens, channels\)"),
        ("tokens_first", "cluster", r"is not \(rows, tokens, channels\), of which clusters are made"),
    ],
)
def test_scores_that_need_another_layout_are_refused(name: str, letter: str, reason: str) -> None:
    on = laid_out(name, 2)
    role = on.captured.step.branches[0].role
    plan = Plan.parse(f"plan steps=2\na = tokens 4 by {letter}\n@{role} #a")
    with pytest.raises(PlanError, match=reason):
        Program(on.captured, None).check(plan)
