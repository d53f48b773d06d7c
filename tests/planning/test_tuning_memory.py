"""Tuning within a limit of memory: it is kept, and changes no bit."""

import os
import subprocess
import sys

import pytest

from graphcache import GraphCacheError, Plan, tune
from linear import Sampler, linear

PLAN = Plan.parse("""
    plan steps=6 preset=none
    f = fitted order=1
    @mlp  ##f#ff
      step 2 = 1.5 -0.5
      step 4 = 1.25 -0.25
      step 5 = 1.75 -0.5
""")
CHILD = """
import ctypes, gc, sys
import torch, graphcache
from diffusers import PixArtTransformer2DModel

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

calls = 0

def sampler(model, sample, steps):
    global calls
    calls += 1
    if calls == 2:  # the first one was for the capture
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        print(status("VmRSS"), end=" ")  # and below, the most that it was since
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(sample))
    added = {"resolution": None, "aspect_ratio": None}
    for step in range(steps):
        time = torch.full((2,), 900.0 - step)
        x = x - model(x, encoder_hidden_states=text, timestep=time, added_cond_kwargs=added).sample / steps
    return x

torch.set_num_threads(1)
torch.manual_seed(0)
text = torch.randn(2, 20, 64)
model = PixArtTransformer2DModel(
    num_attention_heads=2, attention_head_dim=32, num_layers=4, in_channels=4, out_channels=4,
    cross_attention_dim=64, caption_channels=64, sample_size=64).eval()
plan = graphcache.with_corrections(graphcache.Plan.parse(
    "plan steps=4 preset=none\\nf = fitted order=1\\n"
    "range(0..1) ##f#\\n  step 2 = 1.5 -0.5\\n@mlp ###f\\n  step 3 = 1.25 -0.25"))
for memory in map(int, sys.argv[1:]):
    calls = 0
    found = graphcache.tune(model, plan, [0], [1], sampler=sampler, iterations=1, memory=memory)
    print(status("VmHWM"), hash(found.plan))
"""


def test_the_limit_is_kept_by_the_process_and_changes_no_bit() -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    # the first one loads what libraries need
    limits = (44 << 20, 44 << 20, 300 << 20)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, *map(str, limits)],
        env={**environment, "PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    for memory, (before, peak, _) in zip(limits[1:], lines[1:], strict=True):
        assert peak - before <= 1.1 * memory
    assert len({plan for _, _, plan in lines}) == 1


def test_less_than_one_evaluation_needs_is_refused_with_what_would_do() -> None:
    with pytest.raises(GraphCacheError, match=r"memory=0 is less than tuning needs here: \d+ bytes") as told:
        tune(linear(), PLAN, [1], [7], sampler=Sampler(), iterations=1, memory=0)
    least = int(str(told.value).split(": ")[1].split()[0])
    with pytest.raises(GraphCacheError, match=f"needs here: {least} bytes"):
        tune(linear(), PLAN, [1], [7], sampler=Sampler(), iterations=1, memory=least - 1)
    found, whole = (
        tune(linear(), PLAN, [1], [7], sampler=Sampler(), iterations=2, every=1, memory=memory)
        for memory in (least, 1 << 30)
    )
    assert found.curve == whole.curve
