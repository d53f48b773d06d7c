"""Clips of a moving digit: FasterCache and PAB, which know kinds of attention and branches of guidance."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from examples import moving_digits
from examples.demo import animation
from examples.demo.methods import Method
from examples.demo.part import Part
from examples.digits.evaluate import balanced_labels
from examples.moving_digits.model import flow_scheduler, load_model
from examples.moving_digits.sample import sample
from graphcache import Plan, presets

STEPS = 50
PLANS = Path(moving_digits.__file__).parent / "plans"
"""Found for this model by `examples.benchmark_search`."""


def video_part(small: bool, folder: Path, console: Console) -> Part:
    """The clips' part, or fewer of them if `small`."""
    return Part(
        sample="clip",
        plain=Method("uncached", load_model(), sample, flow_scheduler, STEPS),
        plans={
            "searched": Plan.load(PLANS / "2.0.txt"),
            "FasterCache": presets.fastercache("latte", STEPS),
            "PAB": presets.pab(STEPS),
        },
        fewer={"fewer steps": flow_scheduler},
        # some phases come only late
        warm_up_steps=STEPS,
        labels=balanced_labels(1 if small else 3),
        rounds=1 if small else 3,
        shown=2,
        judge=None,
        draw=animation.draw,
        files=("video.gif", "video.txt", "video.json"),
    )
