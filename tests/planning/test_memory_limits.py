"""The limits of memory of profiling and tuning are kept by the whole process, over what it held before."""

import os
import subprocess
import sys
from pathlib import Path

import tiny

PROFILED, TUNED = (40 << 20, 14 << 20), (28 << 20, 170 << 20)
"""Limits; under the first one everything fits, and what libraries load is loaded."""
PROCESS = r"""
import ctypes, gc
import torch, graphcache
from graphcache import Plan
from tiny import TinyDiT

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

def begin():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    print(status("VmRSS"), end=" ")  # and behind it, the most that it was since

def sampler(model, sample, steps):
    global calls
    calls += 1
    if calls == 2:  # the first one was for the capture
        begin()
    x = torch.randn(8, 128, 64, generator=torch.Generator().manual_seed(sample))
    for step in range(steps):
        x = x - model(x, torch.full((8,), 1 - step / 10), text) / steps
    return x

torch.set_num_threads(1)
torch.manual_seed(0)
text = torch.randn(8, 64)
model = TinyDiT(depth=6, dim=64).eval()
plan = graphcache.with_corrections(Plan.parse(
    "plan steps=4 preset=none\nf = fitted order=1\n"
    "range(0..1) ##f#\n  step 2 = 1.5 -0.5\n@mlp ###f\n  step 3 = 1.25 -0.25"))

for memory in PROFILED:
    calls = 0
    found = graphcache.profile(model, [0], steps=2, sampler=sampler, probes=1, memory=memory)
    print(status("VmHWM"), found.provenance.tokens)
for memory in TUNED:
    calls = 0
    found = graphcache.tune(model, plan, [0], [1], sampler=sampler, iterations=1, memory=memory)
    print(status("VmHWM"), hash(found.plan))
"""


def test_limits_are_kept_by_the_process_and_change_no_bit_of_tuning() -> None:
    freed_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    kit = str(Path(tiny.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{PROFILED=}; {TUNED=}\n{PROCESS}"],
        env={**os.environ, **freed_at_once, "PYTHONHASHSEED": "0", "PYTHONPATH": kit},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    for memory, (before, peak, _) in zip(PROFILED + TUNED, lines, strict=True):
        assert peak - before <= 1.1 * memory
    (_, _, all_tokens), (_, _, some_tokens), (_, _, plan), (_, _, other_plan) = lines
    assert some_tokens < all_tokens == 1
    assert plan == other_plan
