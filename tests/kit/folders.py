"""Whole tiny pipelines on disk: text encoders, tokenizers and decoders with random weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from every_pipeline import PIPELINES
from every_pipeline.more_images import QWEN_VAE
from tiny_pipelines import COGVIDEOX_VAE, POOLED, TEXT, TEXT_DIM, WAN_VAE, image_vae

SMALL = {"hidden_size": TEXT_DIM, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
GROUPED = {**SMALL, "num_key_value_heads": 2, "vocab_size": 8}


@dataclass(frozen=True)
class Folder:
    """A pipeline by its name in `every_pipeline`, the parts that it lacks there, and how it is called.

    `pixels` is what a latent covers, `options` are further ones of the command line.
    """

    name: str
    parts: Mapping[str, Callable[[], Any]]
    pixels: int
    call: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    def saved(self, folder: Path) -> str:
        """Where it was written."""
        torch.manual_seed(0)
        parts = PIPELINES[self.name].make()
        components = {**parts.components, **{name: make() for name, make in self.parts.items()}}
        settings = {name: parts.config[name] for name in ("boundary_ratio",) if name in parts.config}
        type(parts)(**components, **settings).save_pretrained(folder)
        return str(folder)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of a call, beside the prompt."""
        return {"height": 8 * self.pixels, "width": 8 * self.pixels, **self.call}


def tokenizer(length: int = TEXT) -> Any:
    """Of four words, for prompts of so many."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "fox": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **special)
    made.chat_template = "{{ messages[0].content }}"
    return made


def t5(kind: str = "T5") -> Any:
    sizes = {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(vocab_size=8, d_model=TEXT_DIM, **sizes)
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def clip(width: int, projected: int = 0) -> Any:
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    config = transformers.CLIPTextConfig(
        **{**SMALL, "hidden_size": width}, vocab_size=8, max_position_embeddings=TEXT, eos_token_id=1,
        **({"projection_dim": projected} if projected else {}),
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def qwen_vl() -> Any:
    rotary = {"rope_type": "default", "type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
    text = {**GROUPED, "rope_scaling": rotary, "rope_parameters": rotary}
    seeing = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config={**seeing, "out_hidden_size": TEXT_DIM}
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3() -> Any:
    return transformers.Qwen3Model(transformers.Qwen3Config(**GROUPED, head_dim=8)).eval()


def a_decoder() -> Any:
    return diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip


_T5 = {"tokenizer": tokenizer, "text_encoder": t5}
_SHORT = {"max_sequence_length": TEXT}
_WAN = {"tokenizer": tokenizer, "text_encoder": lambda: t5("UMT5"), "vae": WAN_VAE}
_LAST = ("--conditional", "last")

FOLDERS: dict[str, Folder] = {
    "pixart": Folder(
        "pixart", {**_T5, "vae": a_decoder}, 2,
        {**_SHORT, "use_resolution_binning": False, "clean_caption": False}, _LAST,
    ),
    "wan_2_2": Folder("wan_two_transformers", _WAN, 8, {**_SHORT, "num_frames": 5}),
    "wan_2_1": Folder("wan", _WAN, 8, {**_SHORT, "num_frames": 5}),
    "sd3": Folder(
        "sd3",
        {
            "tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": tokenizer,
            "text_encoder": lambda: clip(8, 8), "text_encoder_2": lambda: clip(16, POOLED - 8),
            "text_encoder_3": t5, "vae": image_vae(4),
        },
        2, _SHORT, _LAST,
    ),
    "flux": Folder(
        "flux",
        {
            "tokenizer": tokenizer, "tokenizer_2": tokenizer, "text_encoder": lambda: clip(POOLED),
            "text_encoder_2": t5, "vae": image_vae(2),
        },
        2, _SHORT,
    ),
    "qwen_image": Folder(
        "qwen_image", {"tokenizer": lambda: tokenizer(64), "text_encoder": qwen_vl, "vae": QWEN_VAE}, 2,
        {"negative_prompt": "the"},
    ),
    "cogvideox": Folder("cogvideox", {**_T5, "vae": COGVIDEOX_VAE}, 8, {**_SHORT, "num_frames": 9}, _LAST),
    "latte": Folder(
        "latte", {**_T5, "vae": image_vae(4)}, 1, {"video_length": 3, "clean_caption": False}, _LAST
    ),
    "stable_diffusion": Folder(
        "stable_diffusion", {"tokenizer": tokenizer, "text_encoder": lambda: clip(TEXT_DIM)}, 1, {}, _LAST
    ),
    "z_image": Folder(
        "z_image", {"tokenizer": tokenizer, "text_encoder": qwen3, "vae": image_vae(4)}, 2, _SHORT
    ),
}  # fmt: skip
