"""Profiling within a limit of memory: the most that a process holds beside what it held once captured.

python -m examples.benchmark_profiling [--blocks 12 --width 768 --steps 6] [--json FILE]

Every limit runs in a process of its own, in which glibc gives freed memory back at once.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

import graphcache
from examples.benchmark_overhead import timed
from examples.records import Cell, Column, add_json_option, report
from graphcache.ir.units import size

COLUMNS = (
    Column("limit"),
    Column("detail"),
    Column("most held", "MiB", 0),
    Column("of the limit", None, 2),
    Column("tokens of branches", None, 2),
    Column("time", "uncached runs", 1),
)
MIB = 1 << 20
HEAD_WIDTH, TEXT = 64, 20
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def pixart(blocks: int, width: int) -> nn.Module:
    """With random weights, for 64 × 64 latents: 1,024 tokens."""
    torch.manual_seed(0)
    model: nn.Module = PixArtTransformer2DModel(
        num_attention_heads=width // HEAD_WIDTH, attention_head_dim=HEAD_WIDTH, num_layers=blocks,
        in_channels=4, out_channels=4, cross_attention_dim=width, caption_channels=width, sample_size=64,
    )  # fmt: skip
    return model.eval()


def sample(model: Any, seed: int, steps: int) -> Tensor:
    """Euler's steps from seeded noise."""
    made, width = torch.Generator().manual_seed(seed), model.config.caption_channels
    x, text = torch.randn(1, 4, 64, 64, generator=made), torch.randn(1, TEXT, width, generator=made)
    added = {"resolution": None, "aspect_ratio": None}
    for step in range(steps):
        t = torch.full((1,), 999.0 * (1 - step / steps))
        x = x - model(x, encoder_hidden_states=text, timestep=t, added_cond_kwargs=added).sample / steps
    return x


def status(key: str) -> int:
    """A size of this process in bytes, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


class Base:
    """What the process held once the model was captured; from then on its peak counts."""

    held = 0

    def __call__(self, done: int, total: int) -> None:
        if not done:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            self.held = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")


def measure(arguments: argparse.Namespace) -> None:
    """Profile in this process and print what it took."""
    model, base = pixart(arguments.blocks, arguments.width), Base()
    with torch.no_grad():
        plain = timed(lambda: sample(model, 0, arguments.steps), times=3)
    began = time.perf_counter()
    found = graphcache.profile(
        model, [0], steps=arguments.steps, sampler=sample, detail=arguments.detail, memory=arguments.limit,
        progress=base,
    )  # fmt: skip
    runs = (time.perf_counter() - began) / plain
    figures = {"held": status("VmHWM") - base.held, "tokens": found.provenance.tokens, "runs": runs}
    print(json.dumps(figures))


def row(arguments: argparse.Namespace, limit: int, detail: str) -> list[Cell]:
    """Measured in a new process."""
    given = {
        "blocks": arguments.blocks, "width": arguments.width, "steps": arguments.steps, "detail": detail,
        "limit": limit,
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in given.items()]
    done = subprocess.run(
        [sys.executable, "-m", "examples.benchmark_profiling", *options],
        env={**os.environ, **GIVES_BACK}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    share = None if detail == "steps" else found["tokens"]
    return [size(limit), detail, found["held"] / MIB, found["held"] / limit, share, found["runs"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--detail", default="tokens")
    parser.add_argument("--limit", type=int, help="bytes; measure in this process")
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.limit:
        measure(arguments)
        return
    limits = ((256 * MIB, "steps"), (512 * MIB, "tokens"), (2048 * MIB, "tokens"))
    rows = [row(arguments, limit, detail) for limit, detail in limits]
    report("Profiling within a limit", COLUMNS, rows, arguments.json)


if __name__ == "__main__":
    main()
