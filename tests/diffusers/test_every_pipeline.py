"""Pipelines of diffusers, tiny, beside the reference interpreter in them; `make test-models` takes all.

A run takes one, which the seed chooses, beside those of test_pipeline_zoo.py, which are tested further.
"""

import functools
from typing import Any

import pytest
import torch

import graphcache
from every_pipeline import MORE, REFUSED_PIPELINES
from graphcache import CaptureError, presets
from reference import assert_same
from reference_pipeline import reference, transformed, untouched
from tiny_pipelines import TinyPipeline

STEPS = 4
fora = functools.partial(presets.fora, interval=2)


def run(tiny: TinyPipeline, pipe: Any) -> Any:
    return tiny.generate(pipe, STEPS)


@pytest.mark.few(1)
@pytest.mark.parametrize("known", sorted(MORE), scope="module")
def test_plans_give_the_bits_of_the_pipeline_and_of_the_reference(known: str) -> None:
    tiny = MORE[known]
    plain = run(tiny, untouched(tiny))
    assert_same(run(tiny, transformed(tiny, presets.compute(STEPS))), plain)
    pipe = transformed(tiny, fora(STEPS))
    result = run(tiny, pipe)
    assert_same(result, reference(tiny, fora, steps=STEPS))
    assert not torch.equal(torch.as_tensor(result), torch.as_tensor(plain))
    graphcache.restore(pipe)
    assert_same(run(tiny, pipe), plain)


@pytest.mark.few(1)
@pytest.mark.parametrize("refused", sorted(REFUSED_PIPELINES), scope="module")
def test_what_cannot_be_captured_is_refused_with_its_reason(refused: str) -> None:
    tiny, refusal = REFUSED_PIPELINES[refused]
    torch._dynamo.reset()  # what attention compiled for one model can break that of the next
    run(tiny, untouched(tiny))
    with pytest.raises(CaptureError, match=refusal.message):
        run(tiny, transformed(tiny, presets.compute(STEPS)))
