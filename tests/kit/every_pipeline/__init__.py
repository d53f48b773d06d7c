"""Tiny pipelines of as many of diffusers' kinds as can be built without text encoders."""

from every_pipeline import (
    adapted,
    animated,
    edits,
    further,
    images,
    more_images,
    others,
    pixels,
    refused,
    sounds,
    unets,
    videos,
)
from pipelines import PIPELINES as FEW
from tiny_pipelines import TinyPipeline

MORE: dict[str, TinyPipeline] = {
    **images.PIPELINES,
    **more_images.PIPELINES,
    **videos.PIPELINES,
    **others.PIPELINES,
    **further.PIPELINES,
    **unets.PIPELINES,
    **adapted.PIPELINES,
    **animated.PIPELINES,
    **pixels.PIPELINES,
    **edits.PIPELINES,
    **sounds.PIPELINES,
}
PIPELINES: dict[str, TinyPipeline] = {**FEW, **MORE}
REFUSED_PIPELINES = refused.PIPELINES
