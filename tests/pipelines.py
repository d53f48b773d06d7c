"""Tiny diffusers pipelines with random weights and no text encoders: prompts come as embeddings.

An entry of `PIPELINES` runs as its users run it: the scheduler of the published weights, guidance, image or
video inputs. All cost a second or less for a generation of six steps.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class TinyPipeline:
    """How to build a pipeline and how to call it.

    `arguments(batch, guided, large)` are those of `pipe(...)` beside the number of steps and the generator;
    `large` is the second of two resolutions. `start(steps)` is the index in the schedule of the first
    timestep that is run.

    Entries that tests set hooks on name the modules that end a branch, and the calls that a guided step makes
    of the transformer; one means that guidance doubles the batch.
    """

    build: Make
    arguments: Arguments
    start: Callable[[int], int] = lambda steps: 0
    branch_modules: str = ""
    branches: int = 1

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


def _pipeline(kind: str, scheduler: Make, **components: Any) -> Make:
    """Builds `diffusers.<kind>` from makers and plain values; every other component that it wants is None."""

    def build() -> Any:
        cls = getattr(diffusers, kind)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        absent = {item.name: None for item in parameters if item.default is item.empty}
        made = {name: item() if callable(item) else item for name, item in components.items()}
        return cls(**{**absent, **made, "scheduler": scheduler()})

    return build


def _model(kind: str, seed: int, **config: Any) -> Make:
    return lambda: randomise(getattr(diffusers, kind)(**config), seed)


def _variant(name: str, seed: int, **changes: Any) -> Make:
    """A model of the zoo with a changed configuration."""

    def make() -> nn.Module:
        model = CASES[name].make()
        return randomise(type(model).from_config({**model.config, **changes}), seed)

    return make


def _scheduler(kind: str, **config: Any) -> Make:
    return lambda: getattr(diffusers, kind)(**config)


_FLOW = _scheduler("FlowMatchEulerDiscreteScheduler")
_SHIFTED = _scheduler("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
_DDIM = _scheduler("DDIMScheduler")
_DPM = _scheduler("DPMSolverMultistepScheduler")
_FLOW_DPM = _scheduler(
    "DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
)
_UNIPC = _scheduler(
    "UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
)


def _image_vae(channels: int) -> Make:
    """A VAE whose latents are as large as its images, so that images can be tiny."""
    config = {"block_out_channels": (8,), "norm_num_groups": 4, "shift_factor": 0.1}
    return _model("AutoencoderKL", 31, latent_channels=channels, **config)


_COGVIDEOX_VAE = _model(
    "AutoencoderKLCogVideoX",
    33,
    block_out_channels=(8, 8, 8, 8),
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=2,
)
_WAN_VAE = _model(
    "AutoencoderKLWan",
    34,
    base_dim=4,
    z_dim=4,
    dim_mult=[1, 1, 1, 1],
    num_res_blocks=1,
    latents_mean=[0.0] * 4,
    latents_std=[1.0] * 4,
)
_DIT = _model(
    "DiTTransformer2DModel",
    32,
    num_attention_heads=HEADS,
    attention_head_dim=HEAD_DIM,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=1000,
)
_CHROMA = _model(
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
_FLUX_CONTROLNET = _model(
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
_SD3_CONTROLNET = _model(
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
_WAN_2 = _variant("wan", 38)
_WAN_WITH_IMAGE = _variant("wan", 39, in_channels=12, image_dim=16, added_kv_proj_dim=HEADS * HEAD_DIM)


def _image_encoder() -> nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return randomise(transformers.CLIPVisionModel(config), 40)


def _image_processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8)


def _arguments(*parts: Arguments, **fixed: Any) -> Arguments:
    def arguments(batch: int, guided: bool, large: bool) -> dict[str, Any]:
        merged = {"output_type": "latent", **fixed}
        for part in parts:
            merged.update(part(batch, guided, large))
        return merged

    return arguments


def _guidance(name: str = "guidance_scale") -> Arguments:
    return lambda batch, guided, large: {name: 4.0 if guided else 1.0}


def _size(pixels: int) -> Arguments:
    """Latents of 8 by 8 or 16 by 8, of which each covers this many pixels a side."""
    return lambda batch, guided, large: {"height": (16 if large else 8) * pixels, "width": 8 * pixels}


def _image(name: str, pixels: int, channels: int = 3, rows: int | None = None) -> Arguments:
    """An image of that size, one for each prompt unless `rows` says how many."""

    def image(batch: int, guided: bool, large: bool) -> dict[str, Any]:
        size = _size(pixels)(batch, guided, large).values()
        return {name: noise(rows or batch, channels, *size, seed=5).sigmoid()}

    return image


def _labels(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"class_labels": [7 * row + 3 for row in range(batch)]}


def _prompts(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, TEXT, TEXT_DIM),
        "negative_prompt_embeds": noise(batch, TEXT, TEXT_DIM, seed=2),
    }


def _long_prompts(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    """Wan finds the image's tokens by taking the last 512 for the text's."""
    return {
        "prompt_embeds": noise(batch, 512, TEXT_DIM),
        "negative_prompt_embeds": noise(batch, 512, TEXT_DIM, seed=2),
    }


def _pooled(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {
        "pooled_prompt_embeds": noise(batch, POOLED, seed=3),
        "negative_pooled_prompt_embeds": noise(batch, POOLED, seed=4),
    }


def _masks(dtype: torch.dtype) -> Arguments:
    def masks(batch: int, guided: bool, large: bool) -> dict[str, Any]:
        mask = padded(batch, TEXT).to(dtype)
        return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.flip(0)}

    return masks


def _short_negative_prompts(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    """Qwen-Image's branches differ in the text's length, and in whether a mask is left."""
    return {
        "prompt_embeds": noise(batch, TEXT, TEXT_DIM),
        "prompt_embeds_mask": padded(batch, TEXT),
        "negative_prompt_embeds": noise(batch, 2, TEXT_DIM, seed=2),
        "negative_prompt_embeds_mask": torch.ones(batch, 2, dtype=torch.bool),
    }


def _area(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"max_area": 8 * (16 if large else 8)}


def _video_latents(*axes: int) -> Arguments:
    """The latents of a video of three frames, its axes in this order of frames and channels."""
    return lambda batch, guided, large: {"latents": noise(batch, *axes, 16 if large else 8, 8, seed=6)}


def _image_start(steps: int) -> int:
    return int(steps - steps * STRENGTH)


def _video_start(steps: int) -> int:
    return steps - int(steps * STRENGTH)


_PIXART_CALL = _arguments(
    _prompts, _masks(torch.int64), _guidance(), _size(8), negative_prompt=None, use_resolution_binning=False
)
_FLUX_CALL = (_prompts, _pooled, _guidance("true_cfg_scale"))
_WAN_CALL = (_prompts, _guidance(), _size(8))

PIPELINES: dict[str, TinyPipeline] = {
    # its size is fixed
    "dit": TinyPipeline(
        _pipeline("DiTPipeline", _DDIM, transformer=_DIT, vae=_image_vae(4)),
        _arguments(_labels, _guidance(), output_type="pt"),
        branch_modules=r"transformer_blocks\.\d+\.(attn1|ff)",
    ),
    "pixart": TinyPipeline(
        _pipeline("PixArtAlphaPipeline", _DPM, transformer=CASES["pixart"].make),
        _PIXART_CALL,
        branch_modules=r"transformer_blocks\.\d+\.(attn1|attn2|ff)",
    ),
    "pixart_sigma": TinyPipeline(
        _pipeline("PixArtSigmaPipeline", _DPM, transformer=CASES["pixart"].make),
        _PIXART_CALL,
    ),
    "sd3": TinyPipeline(
        _pipeline("StableDiffusion3Pipeline", _FLOW, transformer=CASES["sd3"].make),
        _arguments(_prompts, _pooled, _guidance(), _size(8)),
    ),
    # a second call, with half the batch, at the steps in the middle
    "sd3_skip_layers": TinyPipeline(
        _pipeline("StableDiffusion3Pipeline", _FLOW, transformer=CASES["sd3"].make),
        _arguments(
            _prompts,
            _pooled,
            _guidance(),
            _size(8),
            skip_guidance_layers=[0],
            skip_layer_guidance_start=0.2,
            skip_layer_guidance_stop=0.8,
        ),
    ),
    "sd3_controlnet": TinyPipeline(
        _pipeline(
            "StableDiffusion3ControlNetPipeline",
            _FLOW,
            transformer=CASES["sd3"].make,
            controlnet=_SD3_CONTROLNET,
            vae=_image_vae(4),
        ),
        _arguments(_prompts, _pooled, _guidance(), _size(1), _image("control_image", 1)),
    ),
    "flux": TinyPipeline(
        _pipeline("FluxPipeline", _FLOW, transformer=CASES["flux"].make),
        _arguments(*_FLUX_CALL, _size(8)),
        branch_modules=r"transformer_blocks\.\d+\.(attn|ff|ff_context)|single_transformer_blocks\.\d+\.proj_out",
        branches=2,
    ),
    "flux_img2img": TinyPipeline(
        _pipeline("FluxImg2ImgPipeline", _SHIFTED, transformer=CASES["flux"].make, vae=_image_vae(2)),
        _arguments(*_FLUX_CALL, _size(1), _image("image", 1), strength=STRENGTH),
        start=_image_start,
    ),
    "flux_kontext": TinyPipeline(
        _pipeline("FluxKontextPipeline", _SHIFTED, transformer=CASES["flux"].make, vae=_image_vae(2)),
        _arguments(*_FLUX_CALL, _size(1), _area, _image("image", 1, channels=2)),
    ),
    "flux_controlnet": TinyPipeline(
        _pipeline(
            "FluxControlNetPipeline",
            _SHIFTED,
            transformer=CASES["flux"].make,
            controlnet=_FLUX_CONTROLNET,
            vae=_image_vae(2),
        ),
        _arguments(*_FLUX_CALL, _size(1), _image("control_image", 1)),
    ),
    "chroma": TinyPipeline(
        _pipeline("ChromaPipeline", _SHIFTED, transformer=_CHROMA),
        _arguments(_prompts, _masks(torch.bool), _guidance(), _size(8)),
    ),
    "qwen_image": TinyPipeline(
        _pipeline("QwenImagePipeline", _SHIFTED, transformer=CASES["qwen_image"].make),
        _arguments(_short_negative_prompts, _guidance("true_cfg_scale"), _size(8)),
    ),
    "sana": TinyPipeline(
        _pipeline("SanaPipeline", _FLOW_DPM, transformer=CASES["sana"].make),
        _arguments(
            _prompts,
            _masks(torch.int64),
            _guidance(),
            _size(32),
            negative_prompt=None,
            use_resolution_binning=False,
        ),
    ),
    "latte": TinyPipeline(
        _pipeline("LattePipeline", _DDIM, transformer=CASES["latte"].make),
        _arguments(_prompts, _guidance(), _size(8), negative_prompt=None, video_length=3),
    ),
    "allegro": TinyPipeline(
        _pipeline(
            "AllegroPipeline",
            _scheduler("EulerAncestralDiscreteScheduler"),
            transformer=CASES["allegro"].make,
        ),
        _arguments(_prompts, _masks(torch.int64), _guidance(), _size(8), negative_prompt=None, num_frames=9),
    ),
    "cogvideox": TinyPipeline(
        _pipeline(
            "CogVideoXPipeline", _scheduler("CogVideoXDDIMScheduler"), transformer=CASES["cogvideox"].make
        ),
        _arguments(_prompts, _guidance(), _size(8), num_frames=9),
    ),
    "cogvideox_i2v": TinyPipeline(
        _pipeline(
            "CogVideoXImageToVideoPipeline",
            _scheduler("CogVideoXDPMScheduler"),
            transformer=_variant("cogvideox", 41, in_channels=8),
            vae=_COGVIDEOX_VAE,
        ),
        _arguments(_prompts, _guidance(), _size(8), _image("image", 8), num_frames=9),
    ),
    "cogvideox_v2v": TinyPipeline(
        _pipeline(
            "CogVideoXVideoToVideoPipeline",
            _scheduler("CogVideoXDPMScheduler"),
            transformer=CASES["cogvideox"].make,
        ),
        _arguments(_prompts, _guidance(), _size(8), _video_latents(3, 4), strength=STRENGTH),
        start=_video_start,
    ),
    # timesteps that rise
    "mochi": TinyPipeline(
        _pipeline(
            "MochiPipeline",
            _scheduler("FlowMatchEulerDiscreteScheduler", invert_sigmas=True),
            transformer=CASES["mochi"].make,
        ),
        _arguments(_prompts, _masks(torch.bool), _guidance(), _size(8), num_frames=13),
    ),
    "hunyuan_video": TinyPipeline(
        _pipeline(
            "HunyuanVideoPipeline",
            _scheduler("FlowMatchEulerDiscreteScheduler", shift=7.0),
            transformer=CASES["hunyuan_video"].make,
        ),
        _arguments(
            _prompts, _pooled, _masks(torch.int64), _guidance("true_cfg_scale"), _size(8), num_frames=9
        ),
    ),
    "ltx": TinyPipeline(
        _pipeline("LTXPipeline", _SHIFTED, transformer=CASES["ltx"].make),
        _arguments(_prompts, _masks(torch.bool), _guidance(), _size(32), num_frames=17),
    ),
    "wan": TinyPipeline(
        _pipeline("WanPipeline", _FLOW, transformer=CASES["wan"].make),
        _arguments(*_WAN_CALL, num_frames=5),
        branch_modules=r"blocks\.\d+\.(attn1|attn2|ffn)",
        branches=2,
    ),
    "wan_i2v": TinyPipeline(
        _pipeline(
            "WanImageToVideoPipeline",
            _UNIPC,
            transformer=_WAN_WITH_IMAGE,
            vae=_WAN_VAE,
            image_encoder=_image_encoder,
            image_processor=_image_processor,
        ),
        _arguments(_long_prompts, _guidance(), _size(8), _image("image", 8, rows=1), num_frames=5),
    ),
    "wan_v2v": TinyPipeline(
        _pipeline("WanVideoToVideoPipeline", _UNIPC, transformer=CASES["wan"].make),
        _arguments(*_WAN_CALL, _video_latents(4, 3), strength=STRENGTH),
        start=_video_start,
    ),
    "wan_two_transformers": TinyPipeline(
        _pipeline(
            "WanPipeline",
            _UNIPC,
            transformer=CASES["wan"].make,
            transformer_2=_WAN_2,
            boundary_ratio=0.875,
        ),
        _arguments(*_WAN_CALL, num_frames=5),
    ),
    # a timestep for each token
    "wan_ti2v_text": TinyPipeline(
        _pipeline("WanPipeline", _UNIPC, transformer=CASES["wan"].make, expand_timesteps=True),
        _arguments(*_WAN_CALL, num_frames=5),
    ),
    "wan_ti2v_image": TinyPipeline(
        _pipeline(
            "WanImageToVideoPipeline",
            _UNIPC,
            transformer=CASES["wan"].make,
            vae=_WAN_VAE,
            expand_timesteps=True,
        ),
        _arguments(*_WAN_CALL, _image("image", 8, rows=1), num_frames=5),
    ),
}
