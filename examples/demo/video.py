"""Clips of a moving digit: FasterCache and PAB, which know kinds of attention and branches of guidance."""

from __future__ import annotations

from examples.demo import animation
from examples.demo.methods import Method
from examples.demo.part import Part
from examples.digits.evaluate import balanced_labels
from examples.moving_digits.model import flow_scheduler, load_model
from examples.moving_digits.sample import sample
from graphcache import Plan, presets


def video_part(small: bool) -> Part:
    """The clips' part with 50 steps, or 20 and fewer plans if `small`."""
    steps = 20 if small else 50
    return Part(
        sample="clip",
        plain=Method("uncached", load_model(), sample, flow_scheduler, steps),
        plans=plans(steps, small),
        fewer={"fewer steps": flow_scheduler},
        # some phases come only late
        warm_up_steps=steps,
        labels=balanced_labels(2 if small else 3),
        rounds=2 if small else 3,
        shown=1,
        judge=None,
        draw=animation.draw,
        files=("video.gif", "video.txt", "video.json"),
    )


def plans(steps: int, small: bool) -> dict[str, Plan]:
    """The plans shown, by the name they have in the table."""
    published = {"FasterCache": presets.fastercache("latte", steps)}
    generic = {} if small else {"FasterCache generic": presets.fastercache(steps)}
    return {**published, **generic, "PAB": presets.pab(steps)}
