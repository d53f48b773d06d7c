"""Pipelines that give Stable Diffusion's UNets layers over frames, and one around a UNet for clips."""

from typing import Any

from PIL import Image

from every_pipeline.adapted import image_vectors, unchecked
from every_pipeline.unets import BEGUN, CALL, CONTROLNET, IMAGE, TOLD, XL_CALL, built_xl, pag
from tiny_pipelines import (
    STRENGTH,
    TEXT_DIM,
    Arguments,
    TinyPipeline,
    another,
    call_of,
    image_processor,
    image_vae,
    model_of,
    pipeline_of,
    scheduler_of,
    sized,
)

FRAMES = 3
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
MOTION = model_of(
    "MotionAdapter",
    301,
    block_out_channels=(8, 16),
    motion_layers_per_block=1,
    motion_num_attention_heads=2,
    motion_norm_num_groups=4,
    motion_max_seq_length=8,
)
SPARSE = model_of(
    "SparseControlNetModel",
    305,
    down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
    cross_attention_dim=TEXT_DIM,
    attention_head_dim=4,
    motion_num_attention_heads=2,
    motion_max_seq_length=8,
    conditioning_embedding_out_channels=(8,),
    **BLOCKS,
)
SPATIOTEMPORAL = model_of(
    "UNetSpatioTemporalConditionModel",
    307,
    sample_size=8,
    num_frames=FRAMES,
    down_block_types=("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
    up_block_types=("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
    block_out_channels=(32, 32),
    layers_per_block=1,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24,
    cross_attention_dim=16,
    num_attention_heads=(2, 2),
)


def clip(name: str) -> Arguments:
    """Frames of one colour each."""
    frames = [Image.new("RGB", (8, 8), (60 * frame, 100, 50)) for frame in range(FRAMES)]
    return lambda batch, guided, large: {name: frames}


def counted(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"num_frames": FRAMES}


CONTROL = clip("conditioning_frames")
PIPELINES: dict[str, TinyPipeline] = {
    "animatediff": TinyPipeline(
        unchecked("AnimateDiffPipeline", motion_adapter=MOTION), call_of(*CALL, counted), **TOLD
    ),
    "animatediff_pag": TinyPipeline(
        unchecked("AnimateDiffPAGPipeline", motion_adapter=MOTION, pag_applied_layers=pag),
        call_of(*CALL, counted),
        **TOLD,
    ),
    "animatediff_controlnet": TinyPipeline(
        unchecked("AnimateDiffControlNetPipeline", motion_adapter=MOTION, controlnet=CONTROLNET),
        call_of(*CALL, CONTROL, counted),
        **TOLD,
    ),
    "animatediff_video": TinyPipeline(
        unchecked("AnimateDiffVideoToVideoPipeline", motion_adapter=MOTION),
        call_of(*CALL, clip("video"), strength=STRENGTH),
        **BEGUN,
    ),
    "animatediff_video_controlnet": TinyPipeline(
        unchecked("AnimateDiffVideoToVideoControlNetPipeline", motion_adapter=MOTION, controlnet=CONTROLNET),
        call_of(*CALL, clip("video"), CONTROL, strength=STRENGTH),
        **BEGUN,
    ),
    "animatediff_sparse": TinyPipeline(
        unchecked("AnimateDiffSparseControlNetPipeline", motion_adapter=MOTION, controlnet=SPARSE),
        call_of(*CALL, CONTROL, counted, controlnet_frame_indices=list(range(FRAMES))),
        **TOLD,
    ),
    "animatediff_xl": TinyPipeline(
        built_xl("AnimateDiffSDXLPipeline", motion_adapter=another(MOTION, 306)),
        call_of(*XL_CALL, counted),
        **TOLD,
    ),
    "stable_video": TinyPipeline(
        pipeline_of(
            "StableVideoDiffusionPipeline",
            scheduler_of("EulerDiscreteScheduler"),
            unet=SPATIOTEMPORAL,
            vae=image_vae(4),
            image_encoder=image_vectors,
            feature_extractor=image_processor,
        ),
        call_of(sized(1), IMAGE),
        **TOLD,
    ),
}
