"""Clips of a moving digit: FasterCache and PAB, which know kinds of attention and branches of guidance."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from examples import moving_digits
from examples.demo import animation
from examples.demo.methods import Method
from examples.demo.part import Extent, Part
from examples.digits.evaluate import balanced_labels
from examples.moving_digits.model import flow_scheduler, load_model
from examples.moving_digits.sample import sample
from graphcache import Plan, presets

STEPS = 50
PLANS = Path(moving_digits.__file__).parent / "plans"
"""Found for this model by `examples.benchmark_search`."""


def video_part(extent: Extent, folder: Path, console: Console) -> Part:
    """The clips' part."""
    plans = {"searched": Plan.load(PLANS / "2.0.txt")}
    if extent.presets:
        plans |= {"FasterCache": presets.fastercache("latte", STEPS), "PAB": presets.pab(STEPS)}
    return Part(
        sample="clip",
        plain=Method("uncached", load_model(), sample, flow_scheduler, STEPS),
        plans=plans,
        fewer={"fewer steps": flow_scheduler},
        # some phases come only late
        warm_up_steps=STEPS,
        labels=balanced_labels(extent.choose(1, 2, 2)),
        rounds=extent.choose(1, 2, 2),
        shown=min(2, len(plans)),
        judge=None,
        draw=animation.draw,
        files=("video.gif", "video.txt", "video.json"),
    )
