"""What is expected of each transformer class of diffusers: branches by role, where they end, or a refusal.

A class that the zoo cannot capture stands in `REFUSED` with a pattern of the message and the reason; once it
can, its entry goes and one in `EXPECTED` takes its place.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """The branches of a tiny model.

    `branches` counts them by role, as a source has them: one for each residual add of a block on a stream.
    `modules` is a pattern of the modules of which each ends a branch, so that a hook on them can hold it.
    """

    branches: str
    modules: str

    @property
    def roles(self) -> Mapping[str, int]:
        """How many branches have each role."""
        pairs = (item.split() for item in self.branches.split(", "))
        return {role: int(count) for count, role in pairs}


@dataclass(frozen=True)
class Refusal:
    """Why a class is refused: a pattern of what the message says, and the reason in words."""

    message: str
    reason: str


BASIC = r"transformer_blocks\.\d+\.(attn1|attn2|ff)"
JOINT = r"transformer_blocks\.\d+\.(attn|ff|ff_context)"
FLUX = JOINT + r"|single_transformer_blocks\.\d+\.proj_out"
WAN = r"blocks\.\d+\.(attn1|attn2|ffn)"

EXPECTED: dict[str, Expected] = {
    "AceStepTransformer1DModel": Expected(
        "2 self, 2 cross, 2 mlp", r"layers\.\d+\.(self_attn|cross_attn|mlp)"
    ),
    "AllegroTransformer3DModel": Expected("2 self, 2 cross, 2 mlp", BASIC),
    "AnyFlowTransformer3DModel": Expected("2 self, 2 cross, 2 mlp", WAN),
    "AuraFlowTransformer2DModel": Expected(
        "2 self, 2 joint, 2 joint.context, 4 mlp, 2 mlp.context",
        r"(joint|single)_transformer_blocks\.\d+\.(attn|ff|ff_context)",
    ),
    "BriaFibo2Transformer2DModel": Expected(
        "3 self, 1 cross, 3 mlp", r"(layers|noise_refiner)\.\d+\.(attention|cross_attention|feed_forward)"
    ),
    "BriaFiboTransformer2DModel": Expected(
        "2 joint, 2 joint.context, 2 mlp, 2 mlp.context, 2 parallel", FLUX
    ),
    "BriaTransformer2DModel": Expected("2 joint, 2 joint.context, 2 mlp, 2 mlp.context, 2 parallel", FLUX),
    "ChromaTransformer2DModel": Expected("2 joint, 2 joint.context, 2 mlp, 2 mlp.context, 2 parallel", FLUX),
    "ChronoEditTransformer3DModel": Expected("2 self, 2 cross, 2 mlp", WAN),
    "CogVideoXTransformer3DModel": Expected("2 joint, 2 joint.context, 2 mlp, 1 mlp.context", BASIC),
    "CogView3PlusTransformer2DModel": Expected("2 joint, 2 joint.context, 2 mlp, 1 mlp.context", BASIC),
    "CogView4Transformer2DModel": Expected("2 joint, 1 joint.context, 2 mlp, 1 mlp.context", BASIC),
    "ConsisIDTransformer3DModel": Expected(
        "2 cross, 2 joint, 2 joint.context, 2 mlp, 2 mlp.context", BASIC + r"|perceiver_cross_attention\.\d+"
    ),
    "Cosmos3OmniTransformer": Expected("2 self, 2 joint, 4 mlp", r"layers\.\d+\.(self_attn|mlp|mlp_moe_gen)"),
    "CosmosTransformer3DModel": Expected("2 self, 2 cross, 2 mlp", BASIC),
    "DiTTransformer2DModel": Expected("2 self, 2 mlp", BASIC),
    "DreamLiteTransformer2DModel": Expected("2 self, 2 cross, 2 mlp", BASIC),
    "EasyAnimateTransformer3DModel": Expected(
        "2 joint, 1 joint.context, 2 mlp, 1 mlp.context", r"transformer_blocks\.\d+\.(attn1|ff|txt_ff)"
    ),
    "ErnieImageTransformer2DModel": Expected("2 self, 2 mlp", r"layers\.\d+\.(self_attention|mlp)"),
    "Flux2Transformer2DModel": Expected(
        "2 joint, 2 joint.context, 2 mlp, 2 mlp.context, 2 parallel",
        JOINT + r"|single_transformer_blocks\.\d+\.attn",
    ),
    "Flux3Transformer2DModel": Expected(
        "4 parallel, 1 parallel.context", r"(mode_blocks\.image|single_transformer_blocks)\.\d+\.(attn|ff)"
    ),
    "FluxTransformer2DModel": Expected("2 joint, 2 joint.context, 2 mlp, 2 mlp.context, 2 parallel", FLUX),
    "GlmImageTransformer2DModel": Expected("2 joint, 1 joint.context, 2 mlp, 1 mlp.context", BASIC),
    "HeliosTransformer3DModel": Expected("2 self, 2 cross, 2 mlp", WAN),
    "HiDreamImageTransformer2DModel": Expected(
        "2 self, 2 joint, 2 joint.context, 4 mlp, 2 mlp.context",
        r"(double|single)_stream_blocks\.\d+\.block\.(attn1|ff_i|ff_t)",
    ),
    "HunyuanDiT2DModel": Expected("4 self, 4 cross, 4 mlp", r"blocks\.\d+\.(attn1|attn2|ff)"),
    "HunyuanImageTransformer2DModel": Expected(
        "2 joint, 2 joint.context, 2 mlp, 2 mlp.context, 2 parallel", FLUX
    ),
    "HunyuanVideo15Transformer3DModel": Expected("2 joint, 1 joint.context, 2 mlp, 1 mlp.context", JOINT),
    "HunyuanVideoFramepackTransformer3DModel": Expected(
        "2 joint, 2 joint.context, 2 mlp, 2 mlp.context, 2 parallel", FLUX
    ),
    "HunyuanVideoTransformer3DModel": Expected(
        "2 joint, 2 joint.context, 2 mlp, 2 mlp.context, 2 parallel", FLUX
    ),
    "Ideogram4Transformer2DModel": Expected("2 self, 2 mlp", r"layers\.\d+\.(attention|feed_forward)"),
    "JoyImageEditPlusTransformer3DModel": Expected(
        "2 joint, 1 joint.context, 2 mlp, 1 mlp.context", r"double_blocks\.\d+\.(attn|img_mlp|txt_mlp)"
    ),
    "JoyImageEditTransformer3DModel": Expected(
        "2 joint, 1 joint.context, 2 mlp, 1 mlp.context", r"double_blocks\.\d+\.(attn|img_mlp|txt_mlp)"
    ),
    "Kandinsky5Transformer3DModel": Expected(
        "2 self, 2 cross, 2 mlp",
        r"visual_transformer_blocks\.\d+\.(self_attention|cross_attention|feed_forward)",
    ),
    "Kandinsky6Transformer3DModel": Expected(
        "4 self, 8 cross, 4 mlp",
        r"visual_transformer_blocks\.\d+\.(\w+_cross_attention|(\w+_block)\.(self_attention|attn|cross_attention|feed_forward|\w*attn))",
    ),
    "Krea2Transformer2DModel": Expected("2 self, 2 mlp", r"transformer_blocks\.\d+\.(attn|ff)"),
    "LTX2VideoTransformer3DModel": Expected(
        "4 self, 8 cross, 4 mlp", r"transformer_blocks\.\d+\.(\w*attn\d?|ff|audio_ff)"
    ),
    "LTXVideoTransformer3DModel": Expected("2 self, 2 cross, 2 mlp", BASIC),
    "LatteTransformer3DModel": Expected(
        "2 self.spatial, 2 self.temporal, 2 cross, 4 mlp", r"(temporal_)?" + BASIC
    ),
    "LongCatAudioDiTTransformer": Expected(
        "2 self, 2 cross, 2 mlp", r"blocks\.\d+\.(self_attn|cross_attn|ffn)"
    ),
    "LongCatImageTransformer2DModel": Expected(
        "2 joint, 2 joint.context, 2 mlp, 2 mlp.context, 2 parallel", FLUX
    ),
    "Lumina2Transformer2DModel": Expected(
        "2 self, 2 mlp", r"(layers|noise_refiner)\.\d+\.(attn|feed_forward)"
    ),
    "LuminaNextDiT2DModel": Expected("2 self, 2 mlp", r"layers\.\d+\.(attn2\.to_out\.0|feed_forward)"),
    "MiniMaxH3Transformer3DModel": Expected("2 self, 2 mlp", r"transformer_blocks\.\d+\.(attn|ff)"),
    "MiniMaxMusic3RVQDepthDecoder": Expected("2 self, 2 mlp", r"layers\.\d+\.(attn|down_proj)"),
    "MiniMaxMusic3Transformer1DModel": Expected(
        "2 stem, 2 self, 2 mlp", r"transformer_blocks\.\d+\.(attn|ff_out)"
    ),
    "MochiTransformer3DModel": Expected(
        "2 joint, 1 joint.context, 2 mlp, 1 mlp.context", r"transformer_blocks\.\d+\.(attn1|ff|ff_context)"
    ),
    "MotifVideoTransformer3DModel": Expected(
        "2 joint, 2 joint.context, 2 mlp, 2 mlp.context, 2 parallel", FLUX
    ),
    "NucleusMoEImageTransformer2DModel": Expected(
        "3 self, 3 mlp", r"transformer_blocks\.\d+\.(attn|img_mlp)"
    ),
    "OmniGenTransformer2DModel": Expected("2 self, 2 mlp", r"layers\.\d+\.(self_attn|mlp)"),
    "OvisImageTransformer2DModel": Expected(
        "2 joint, 2 joint.context, 2 mlp, 2 mlp.context, 2 parallel", FLUX
    ),
    "PRXTransformer2DModel": Expected("2 self, 2 mlp", r"blocks\.\d+\.(attention|down_proj)"),
    "PixArtTransformer2DModel": Expected("2 self, 2 cross, 2 mlp", BASIC),
    "PriorTransformer": Expected("2 self, 2 mlp", BASIC),
    "QwenImage21Transformer2DModel": Expected("2 self, 2 mlp", r"transformer_blocks\.\d+\.(attn|img_mlp)"),
    "QwenImageTransformer2DModel": Expected(
        "2 joint, 1 joint.context, 2 mlp, 1 mlp.context", r"transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp)"
    ),
    "RFD4ProteinaTransformer": Expected(
        "2 stem, 4 self, 3 mlp",
        r"transformer_layers\.\d+\.(mhba\.mha\.to_out(\.0)?|transition\.transition\.linear_out)|pair_update_layers\.\d+\.(tri_mult_in|tri_mult_out|transition_out)",
    ),
    "SD3Transformer2DModel": Expected("2 joint, 1 joint.context, 2 mlp, 1 mlp.context", JOINT),
    "SanaTransformer2DModel": Expected("2 self, 2 cross, 2 mlp", BASIC),
    "SanaVideoTransformer3DModel": Expected("2 self, 2 cross, 2 mlp", BASIC),
    "SanaWMLTX2RefinerTransformer3DModel": Expected("2 self, 2 cross, 2 mlp", BASIC),
    "SanaWMTransformer3DModel": Expected("2 cross, 2 mlp, 2 parallel", r"blocks\.\d+\.(attn|cross_attn|mlp)"),
    "SkyReelsV2Transformer3DModel": Expected("2 self, 2 cross, 2 mlp", WAN),
    "StableAudio3DiTModel": Expected(
        "2 stem, 2 self, 2 cross, 2 mlp", r"transformer_blocks\.\d+\.(self_attn|cross_attn|ff)"
    ),
    "StableAudioDiTModel": Expected("2 stem, 2 self, 2 cross, 2 mlp", BASIC),
    "T5FilmDecoder": Expected(
        "2 self, 2 cross, 2 mlp", r"decoders\.\d+\.layer\.(0\.attention|1\.attention|2\.DenseReluDense)"
    ),
    "Transformer2DModel": Expected("2 self, 2 cross, 2 mlp", BASIC),
    "TransformerTemporalModel": Expected("4 self, 2 mlp", BASIC),
    "WanAnimateTransformer3DModel": Expected("2 self, 3 cross, 2 mlp", WAN + r"|face_adapter\.\d+"),
    "WanTransformer3DModel": Expected("2 self, 2 cross, 2 mlp", WAN),
    "WanVACETransformer3DModel": Expected(
        "4 self, 4 cross, 4 mlp", r"(vace_)?blocks\.\d+\.(attn1|attn2|ffn)"
    ),
    "ZImageTransformer2DModel": Expected(
        "3 self, 3 mlp", r"(layers|noise_refiner)\.\d+\.(attention|feed_forward)"
    ),
}

COMPILED = Refusal(
    r"lets code be compiled as a whole",
    "flex attention is compiled within forward, which PyTorch does not do while a call's writes are watched",
)
REFUSED: dict[str, Refusal] = {
    "AnyFlowFARTransformer3DModel": COMPILED,
    "Kandinsky6SRTransformer3DModel": COMPILED,
    "WanAnimate2Transformer3DModel": Refusal(
        r"changes its argument kv_cache",
        "the pass over the reference fills an object with keys and values; the steps that read it run flex "
        "attention, as above",
    ),
}
