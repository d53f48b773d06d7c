"""Pipelines whose model cannot be captured, with a pattern of the message and the reason."""

from every_pipeline.images import of_kind
from every_pipeline.videos import WAN_CALL
from tiny_pipelines import WAN_VAE, TinyPipeline, call_of, pipeline_of, scheduler_of
from zoo.expected import REFUSED, Refusal

PIPELINES: dict[str, tuple[TinyPipeline, Refusal]] = {
    "anyflow_far": (
        TinyPipeline(
            pipeline_of(
                "AnyFlowFARPipeline",
                scheduler_of("FlowMapEulerDiscreteScheduler"),
                transformer=of_kind("AnyFlowFARTransformer3DModel"),
                vae=WAN_VAE,
            ),
            call_of(*WAN_CALL, num_frames=9, chunk_partition=[1, 2]),
        ),
        REFUSED["AnyFlowFARTransformer3DModel"],
    ),
}
