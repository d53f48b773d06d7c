"""What tiny diffusers pipelines are made of: models with random weights, schedulers, arguments of a call."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from zoo import CASES
from zoo.case import noise, padded, randomise

TEXT, TEXT_DIM, POOLED = 6, 24, 20
HEADS, HEAD_DIM = 2, 16
STRENGTH = 0.7

Make = Callable[[], Any]
Arguments = Callable[[int, bool, bool], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Built:
    """Builds `diffusers.<kind>` from makers and plain values; every other component that it wants is None.

    `attributes` are set on what was built: sizes and texts that a pipeline makes itself, and that are large.
    """

    kind: str
    components: Mapping[str, Any]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        cls = getattr(diffusers, self.kind)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        absent = {item.name: None for item in parameters if item.default is item.empty}
        made = {name: item() if callable(item) else item for name, item in self.components.items()}
        pipe = cls(**{**absent, **made})
        vars(pipe).update(self.attributes)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval()  # models that a pipeline makes of others are in training mode
        return pipe


@dataclass(frozen=True)
class TinyPipeline:
    """How to build a pipeline and how to call it.

    `arguments(batch, guided, large)` are those of `pipe(...)` beside the number of steps and the generator;
    `large` is the second of two resolutions. `start(steps)` is the index in the schedule of the first
    timestep that is run.

    Entries that tests set hooks on name the modules that end a branch, and the calls that a guided step makes
    of the transformer; one means that guidance doubles the batch.

    `parts` are the attributes that hold denoisers, `left_out` the timesteps at the schedule's end that are
    not run, `options` what `transform` has to be told. `calls` are those of a step where the scheduler's own
    steps do not tell it, since copies of it are stepped or it is set back.
    """

    build: Built
    arguments: Arguments
    start: Callable[[int], int] = lambda steps: 0
    branch_modules: str = ""
    branches: int = 1
    parts: tuple[str, ...] = ("transformer", "transformer_2")
    left_out: int = 0
    calls: int = 0
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def make(self) -> Any:
        """A new pipeline; the weights are the same each time."""
        pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def generate(
        self,
        pipe: Any,
        steps: int,
        batch: int = 1,
        guided: bool = True,
        large: bool = False,
        callback: Any = None,
    ) -> Tensor:
        """What a fixed seed gives: latents, or pixels where a pipeline always decodes."""
        generator = torch.Generator().manual_seed(0)
        arguments = self.arguments(batch, guided, large)
        if callback is not None:
            arguments["callback_on_step_end"] = callback
        with torch.random.fork_rng(devices=[]):
            # SD3's ControlNet pipeline encodes its image without the generator
            torch.manual_seed(0)
            result = pipe(**arguments, num_inference_steps=steps, generator=generator, return_dict=False)
        return result[0]


def pipeline_of(kind: str, scheduler: Make, **components: Any) -> Built:
    return Built(kind, {**components, "scheduler": scheduler})


def set_on(build: Built, **attributes: Any) -> Built:
    return replace(build, attributes=attributes)


def model_of(kind: str, seed: int, **config: Any) -> Make:
    return lambda: randomise(getattr(diffusers, kind)(**config), seed)


def variant_of(name: str, seed: int, **changes: Any) -> Make:
    """A model of the zoo with a changed configuration."""
    return another(CASES[name].make, seed, **changes)


def another(make: Make, seed: int, **changes: Any) -> Make:
    """A model made anew from its configuration and changes to that."""

    def made() -> nn.Module:
        model = make()
        # what was left to its default when the model was made is listed there, and would stay so
        config = {**model.config, **changes, "_use_default_values": []}
        return randomise(type(model).from_config(config), seed)

    return made


def scheduler_of(kind: str, **config: Any) -> Make:
    return lambda: getattr(diffusers, kind)(**config)


FLOW = scheduler_of("FlowMatchEulerDiscreteScheduler")
SHIFTED = scheduler_of("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
DDIM = scheduler_of("DDIMScheduler")
DPM = scheduler_of("DPMSolverMultistepScheduler")
FLOW_DPM = scheduler_of(
    "DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
)
UNIPC = scheduler_of(
    "UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
)


def image_vae(channels: int) -> Make:
    """A VAE whose latents are as large as its images, so that images can be tiny."""
    config = {"block_out_channels": (8,), "norm_num_groups": 4, "shift_factor": 0.1}
    return model_of("AutoencoderKL", 31, latent_channels=channels, **config)


COGVIDEOX_VAE = model_of(
    "AutoencoderKLCogVideoX",
    33,
    block_out_channels=(8, 8, 8, 8),
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=2,
)
WAN_VAE = model_of(
    "AutoencoderKLWan",
    34,
    base_dim=4,
    z_dim=4,
    dim_mult=[1, 1, 1, 1],
    num_res_blocks=1,
    latents_mean=[0.0] * 4,
    latents_std=[1.0] * 4,
)
DIT = variant_of("dit", 32, num_embeds_ada_norm=1000)
CHROMA = model_of(
    "ChromaTransformer2DModel",
    35,
    in_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=HEAD_DIM,
    num_attention_heads=HEADS,
    joint_attention_dim=TEXT_DIM,
    axes_dims_rope=(4, 6, 6),
    approximator_num_channels=16,
    approximator_hidden_dim=16,
    approximator_layers=2,
)
FLUX_CONTROLNET = model_of(
    "FluxControlNetModel",
    36,
    in_channels=8,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=HEAD_DIM,
    num_attention_heads=HEADS,
    joint_attention_dim=TEXT_DIM,
    pooled_projection_dim=POOLED,
    axes_dims_rope=(4, 6, 6),
)
SD3_CONTROLNET = model_of(
    "SD3ControlNetModel",
    37,
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    attention_head_dim=HEAD_DIM,
    num_attention_heads=HEADS,
    joint_attention_dim=TEXT_DIM,
    caption_projection_dim=HEADS * HEAD_DIM,
    pooled_projection_dim=POOLED,
    pos_embed_max_size=8,
)
WAN_2 = variant_of("wan", 38)
WAN_WITH_IMAGE = variant_of("wan", 39, in_channels=12, image_dim=16, added_kv_proj_dim=HEADS * HEAD_DIM)


def image_encoder() -> nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return randomise(transformers.CLIPVisionModel(config), 40)


def image_processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8)


def call_of(*parts: Arguments, **fixed: Any) -> Arguments:
    def arguments(batch: int, guided: bool, large: bool) -> dict[str, Any]:
        merged = {"output_type": "latent", **fixed}
        for part in parts:
            merged.update(part(batch, guided, large))
        return merged

    return arguments


def guided_by(name: str = "guidance_scale") -> Arguments:
    return lambda batch, guided, large: {name: 4.0 if guided else 1.0}


def sized(pixels: int) -> Arguments:
    """Latents of 8 by 8 or 16 by 8, of which each covers this many pixels a side."""
    return lambda batch, guided, large: {"height": (16 if large else 8) * pixels, "width": 8 * pixels}


def an_image(name: str, pixels: int, channels: int = 3, rows: int | None = None) -> Arguments:
    """An image of that size, one for each prompt unless `rows` says how many."""

    def image(batch: int, guided: bool, large: bool) -> dict[str, Any]:
        size = sized(pixels)(batch, guided, large).values()
        return {name: noise(rows or batch, channels, *size, seed=5).sigmoid()}

    return image


def labels(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"class_labels": [7 * row + 3 for row in range(batch)]}


def prompts(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, TEXT, TEXT_DIM),
        "negative_prompt_embeds": noise(batch, TEXT, TEXT_DIM, seed=2),
    }


def long_prompts(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    """Wan finds the image's tokens by taking the last 512 for the text's."""
    return {
        "prompt_embeds": noise(batch, 512, TEXT_DIM),
        "negative_prompt_embeds": noise(batch, 512, TEXT_DIM, seed=2),
    }


def pooled(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {
        "pooled_prompt_embeds": noise(batch, POOLED, seed=3),
        "negative_pooled_prompt_embeds": noise(batch, POOLED, seed=4),
    }


def masked(dtype: torch.dtype) -> Arguments:
    def masks(batch: int, guided: bool, large: bool) -> dict[str, Any]:
        mask = padded(batch, TEXT).to(dtype)
        return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.flip(0)}

    return masks


def short_negative_prompts(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    """Qwen-Image's branches differ in the text's length, and in whether a mask is left."""
    return {
        "prompt_embeds": noise(batch, TEXT, TEXT_DIM),
        "prompt_embeds_mask": padded(batch, TEXT),
        "negative_prompt_embeds": noise(batch, 2, TEXT_DIM, seed=2),
        "negative_prompt_embeds_mask": torch.ones(batch, 2, dtype=torch.bool),
    }


def area(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"max_area": 8 * (16 if large else 8)}


def video_latents(*axes: int) -> Arguments:
    """The latents of a video of three frames, its axes in this order of frames and channels."""
    return lambda batch, guided, large: {"latents": noise(batch, *axes, 16 if large else 8, 8, seed=6)}


def image_start(steps: int) -> int:
    return int(steps - steps * STRENGTH)


def video_start(steps: int) -> int:
    return steps - int(steps * STRENGTH)
