"""Batches that change, guidance that ends within a generation, samples that do not know their neighbours."""

from typing import Any

import pytest
import torch
from torch import Tensor

import graphcache
from graphcache import Plan, PlanError, presets
from graphcache.ir.state import Choice
from reference import Reference, Subject, assert_same, runner_tensors, subject

TEXT = """
    plan steps=6 {conditional}preset=none
    t = taylorseer order=1
    *  ##t#t.
"""
ENDS = 4
"""The first step without guidance: it reads a history of two."""


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def half_of(reference: Reference, on: Subject, half: slice) -> Reference:
    """The reference of half the batch, with half of everything that the whole one has computed."""
    small = Reference(on.captured, reference.plan)
    small.now = reference.now
    for mine, whole in zip(small.sites(), reference.sites(), strict=True):
        mine.history = [(step, tuple(part[half] for part in parts)) for step, parts in whole.history]
        mine.patched = None if whole.patched is None else whole.patched[half]
        mine.chosen = {s: Choice(c.places[half], c.clusters[half]) for s, c in whole.chosen.items()}
    return small


def guidance_that_ends(name: str, model: Any, reference: Any, ends: Any) -> tuple[list[Any], list[Any]]:
    """Results of both, four samples first and the last two of them later."""
    whole, small = subject(name, batch=4), subject(name, batch=2)
    static, latents = whole.static(), whole.latents()
    kept = torch.utils._pytree.tree_map(
        lambda leaf: leaf[2:] if isinstance(leaf, Tensor) and leaf.shape[:1] == (4,) else leaf, static
    )
    results, expected = [], []
    for step in range(6):
        if step == ENDS:
            reference, static, latents = ends(reference, small), kept, latents[2:]
        kwargs = small.case.call(static, latents, 1 - step / 6)
        results.append(model(**kwargs))
        expected.append(reference(runner_tensors(model, kwargs)))
    return results, expected


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["pixart", "flux", "wan", "mochi"])
@pytest.mark.parametrize("conditional", ["first", "last"])
def test_the_half_that_the_plan_names_remains(name: str, conditional: str) -> None:
    plan = Plan.parse(TEXT.format(conditional=f"conditional={conditional} "))
    model = subject(name, batch=4).transform(plan)
    half = slice(0, 2) if conditional == "first" else slice(2, 4)
    results, expected = guidance_that_ends(
        name,
        model,
        Reference(subject(name, batch=4).captured, plan),
        lambda reference, small: half_of(reference, small, half),
    )
    assert_same(results, expected)
    (branch,) = model.summary().branches
    assert len(branch.steps) == 6
    assert branch.steps[ENDS].computed == 0


@pytest.mark.parametrize("conditional", ["first", "last"])
def test_chosen_tokens_go_on_with_the_half_that_remains(conditional: str) -> None:
    rows = "a = tokens 5 by random multiple=1\n@mlp #aaaaa\n@cross #.#a.a"
    plan = Plan.parse(f"plan steps=6 conditional={conditional}\n{rows}")
    half = slice(0, 2) if conditional == "first" else slice(2, 4)
    results, expected = guidance_that_ends(
        "pixart",
        subject("pixart", batch=4).transform(plan),
        Reference(subject("pixart", batch=4).captured, plan),
        lambda reference, small: half_of(reference, small, half),
    )
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_without_a_word_in_the_plan_the_history_starts_empty(name: str) -> None:
    plan = Plan.parse(TEXT.format(conditional=""))
    model = subject(name, batch=4).transform(plan)
    results, expected = guidance_that_ends(
        name,
        model,
        Reference(subject(name, batch=4).captured, plan),
        lambda _, small: Reference(small.captured, plan, start=ENDS),
    )
    assert_same(results, expected)


def test_values_whose_batch_is_folded_into_another_axis_start_empty() -> None:
    """Factorised video attention has batch times frames in front: which rows remain cannot be told."""
    plan = Plan.parse(TEXT.format(conditional="conditional=last "))
    model = subject("latte", batch=4).transform(plan)
    results, expected = guidance_that_ends(
        "latte",
        model,
        Reference(subject("latte", batch=4).captured, plan),
        lambda _, small: Reference(small.captured, plan, start=ENDS),
    )
    assert_same(results, expected)


def test_a_batch_that_changes_otherwise_starts_empty() -> None:
    plan = Plan.parse(TEXT.format(conditional="conditional=last "))
    whole, other = subject("chunked_dit", batch=3), subject("chunked_dit", batch=2)
    model, reference = whole.transform(plan), Reference(other.captured, plan, start=2)
    for step, on in enumerate((whole, whole, other, other)):
        kwargs = on.case.call(on.static(), on.latents(), 1 - step / 6)
        result = model(**kwargs)
        if on is other:
            assert_same(result, reference(runner_tensors(model, kwargs)))


def test_a_plan_says_which_half_remains() -> None:
    plan = Plan.parse(TEXT.format(conditional="conditional=last "))
    assert Plan.parse(str(plan)) == plan
    assert str(plan).startswith("plan steps=6 conditional=last preset=none")
    assert plan.resample(12).conditional == "last"
    with pytest.raises(PlanError, match=r"conditional=middle: the conditional half .* is first or last"):
        Plan.parse("plan steps=2 conditional=middle")


def test_a_preset_keeps_which_half_remains() -> None:
    plan = Plan.parse(str(presets.fora(6)).replace("steps=6", "steps=6 conditional=first"))
    again = presets.resample(plan, 9)
    assert (again.conditional, again.rows) == ("first", presets.fora(9).rows)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["dit", "pixart", "flux", "latte", "cogvideox"])
def test_a_sample_does_not_know_its_neighbours(name: str) -> None:
    """The first sample alone, and beside another: the same but for the rounding of larger products."""
    plan = presets.taylorseer(6)
    alone = subject(name, batch=1)
    pair = subject(name, batch=2)
    one, two = alone.sample(alone.transform(plan), 6), pair.sample(pair.transform(plan), 6)
    for single, both in zip(one, two, strict=True):
        torch.testing.assert_close(
            alone.case.prediction(single)[0], pair.case.prediction(both)[0], rtol=1e-4, atol=1e-4
        )


def test_a_smaller_last_batch_is_a_generation_of_its_own() -> None:
    plan = presets.fora(6)
    on = {batch: subject("pixart", batch=batch) for batch in (3, 2)}
    model = graphcache.transform(on[3].model, plan)
    for batch in (3, 3, 2, 3):
        expected = on[batch].sample(on[batch].reference(plan), 6)
        assert_same(on[batch].sample(model, 6), expected)
