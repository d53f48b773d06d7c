"""Other libraries' caches as contenders: they run as their libraries run them, or the row says why not."""

import copy
from typing import Any

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.hooks import FirstBlockCacheConfig

from graphcache import GraphCacheError, presets
from graphcache.planning.comparison import Contender, compare
from graphcache.planning.rivals import Situation, rivals
from graphcache.planning.sampling import Sampling
from graphcache.runtime.closeness import LEAST_ERROR, psnr
from linear import Sampler, linear
from pipelines import PIPELINES

STEPS = 4


def compared(pipe: Any, sample: Any, **options: Any) -> dict[str, Contender]:
    rows = compare(pipe, {}, [sample], steps=STEPS, rivals=rivals(), backend=None, **options)
    return {row.name: row for row in rows}


def test_rivals_run_as_their_library_runs_them_and_leave_the_model_alone() -> None:
    pipe = PIPELINES["flux"].make()
    sample = {**PIPELINES["flux"].arguments(1, True, False), "seed": 0}
    before = copy.deepcopy(pipe.transformer)
    rows = compared(pipe, sample)
    plain = Sampling.of(pipe).generate(before, sample, STEPS)
    assert torch.equal(Sampling.of(pipe).generate(pipe.transformer, sample, STEPS), plain)
    ranges = {f"{kind}_attention_block_skip_range": every for kind, every in
              (("spatial", 2), ("temporal", 4), ("cross", 6))}  # fmt: skip
    now: list[float] = []
    configs = {
        "FirstBlockCache": FirstBlockCacheConfig(),
        "PAB": PyramidAttentionBroadcastConfig(**ranges, current_timestep_callback=lambda: now[-1]),
    }
    for name, config in configs.items():
        hooked = copy.deepcopy(before)
        hooked.enable_cache(config)
        hooked.register_forward_pre_hook(lambda _, args, given: now.append(float(given["timestep"][0])),
                                         with_kwargs=True)  # fmt: skip
        made = Sampling.of(pipe).generate(hooked, sample, STEPS)
        assert rows[name].failure is None
        assert rows[name].kind == "rival"
        assert rows[name].psnr == pytest.approx(float(psnr(made, plain, 2.0, LEAST_ERROR).mean()))
        assert rows[name].speedup > 0


def test_what_cannot_run_is_a_row_that_says_why() -> None:
    rows = {
        row.name: row
        for row in compare(
            linear(), {"large": presets.taylorseer(STEPS)}, [3], steps=STEPS, sampler=Sampler(), backend=None,
            rivals=rivals(), optional=["large"], memory=1_400,
        )
    }  # fmt: skip
    assert rows["plain"].failure is None
    for name in ("FirstBlockCache", "FasterCache", "PAB"):
        assert (
            rows[name].failure == "GraphCacheError: LinearDiT has no enable_cache, as diffusers' models have"
        )
    assert "plan large caches" in str(rows["large"].failure)
    for name in rows.keys() - {"plain"}:
        assert (rows[name].failure is None) == (rows[name].psnr is not None) == (rows[name].speedup > 0)


def test_the_other_half_of_a_doubled_batch_is_refused() -> None:
    with pytest.raises(GraphCacheError, match="last half for the conditional one"):
        rivals()["FasterCache"](linear(), Situation(STEPS, "first", (2, 3, 4)))
