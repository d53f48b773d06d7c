"""Diffusion transformers in plain PyTorch, each in another hand, with no code shared between them."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, index, noise, padded, randomise, thousand, unit


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, frequencies: int = 16) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequencies = frequencies

    def forward(self, t: Tensor) -> Tensor:
        powers = torch.arange(self.frequencies, device=t.device, dtype=torch.float32) / self.frequencies
        args = t[:, None].float() * torch.exp(-math.log(10000) * powers)[None]
        return self.mlp(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))


class FusedAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class ChunkedBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = FusedAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.adaLN = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN(c).chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale_a.unsqueeze(1)) + shift_a.unsqueeze(1)
        x = x + gate_a.unsqueeze(1) * self.attn(h)
        h = self.norm2(x) * (1 + scale_m.unsqueeze(1)) + shift_m.unsqueeze(1)
        return x + gate_m.unsqueeze(1) * self.mlp(h)


class ChunkedDiT(nn.Module):
    """A class-conditional DiT: adaLN chunks, a fused qkv projection, SDPA."""

    def __init__(self, dim: int = 32, depth: int = 2, num_heads: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, dim, kernel_size=2, stride=2)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, dim))
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = nn.Embedding(classes + 1, dim)
        self.blocks = nn.ModuleList(ChunkedBlock(dim, num_heads) for _ in range(depth))
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaLN_final = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.linear = nn.Linear(dim, 2 * 2 * 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        B, _, H, W = x.shape
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.adaLN_final(c).chunk(2, dim=-1)
        x = self.linear(self.norm_final(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        x = x.reshape(B, H // 2, W // 2, 2, 2, 4)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(B, 4, H, W)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[None, None], angles.sin()[None, None]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    out = torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, dim=-1), v)
    return out.permute(0, 2, 1, 3).flatten(2)


def to_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).permute(0, 2, 1, 3)


class Stream(nn.Module):
    """The weights that one stream of a double block owns."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, 6 * dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_weight = nn.Parameter(torch.ones(dim // heads))
        self.k_weight = nn.Parameter(torch.ones(dim // heads))
        self.to_out = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.heads = heads

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)
        q, k, v = torch.split(self.to_qkv(h), x.shape[-1], dim=-1)
        q = rms(to_heads(q, self.heads), self.q_weight)
        k = rms(to_heads(k, self.heads), self.k_weight)
        return q, k, to_heads(v, self.heads)

    def feed_forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        h = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class DoubleBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.image = Stream(dim, heads)
        self.text = Stream(dim, heads)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        mod_i = self.image.modulation(F.silu(vec))[:, None].tensor_split(6, dim=-1)
        mod_t = self.text.modulation(F.silu(vec))[:, None].tensor_split(6, dim=-1)
        image = self.image.project(img, mod_i[0], mod_i[1])
        text = self.text.project(txt, mod_t[0], mod_t[1])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, image, strict=True))
        joint = attention(rotate(q, angles), rotate(k, angles), v)
        length = txt.shape[1]
        txt = txt + mod_t[2] * self.text.to_out(joint[:, :length])
        img = img + mod_i[2] * self.image.to_out(joint[:, length:])
        txt = txt + mod_t[5] * self.text.feed_forward(txt, mod_t[3], mod_t[4])
        img = img + mod_i[5] * self.image.feed_forward(img, mod_i[3], mod_i[4])
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, 3 * dim)
        self.linear1 = nn.Linear(dim, 3 * dim + 4 * dim)
        self.linear2 = nn.Linear(dim + 4 * dim, dim)
        self.q_weight = nn.Parameter(torch.ones(dim // heads))
        self.k_weight = nn.Parameter(torch.ones(dim // heads))
        self.heads = heads

    def forward(self, x: Tensor, vec: Tensor, angles: Tensor) -> Tensor:
        dim = x.shape[-1]
        shift, scale, gate = self.modulation(F.silu(vec))[:, None].tensor_split(3, dim=-1)
        h = (1 + scale) * F.layer_norm(x, (dim,)) + shift
        q, k, v, mlp = torch.split(self.linear1(h), [dim, dim, dim, 4 * dim], dim=-1)
        q = rotate(rms(to_heads(q, self.heads), self.q_weight), angles)
        k = rotate(rms(to_heads(k, self.heads), self.k_weight), angles)
        attn = attention(q, k, to_heads(v, self.heads))
        return x + gate * self.linear2(torch.cat([attn, F.gelu(mlp, approximate="tanh")], dim=-1))


class FunctionalMMDiT(nn.Module):
    """Double-stream, then single-stream blocks; attention is written out as two einsums and a softmax."""

    def __init__(self, dim: int = 32, heads: int = 2, text_dim: int = 24, pooled_dim: int = 20) -> None:
        super().__init__()
        self.img_in = nn.Linear(8, dim)
        self.txt_in = nn.Linear(text_dim, dim)
        self.time_in = nn.ModuleList([nn.Linear(32, dim), nn.Linear(dim, dim)])
        self.vector_in = nn.Linear(pooled_dim, dim)
        self.double_blocks = nn.ModuleList(DoubleBlock(dim, heads) for _ in range(2))
        self.single_blocks = nn.ModuleList(SingleBlock(dim, heads) for _ in range(2))
        self.last_modulation = nn.Linear(dim, 2 * dim)
        self.last = nn.Linear(dim, 8)
        self.half = dim // heads // 2

    def angles(self, length: int, device: torch.device) -> Tensor:
        rates = 100.0 ** (-torch.arange(self.half, device=device) / self.half)
        return torch.outer(torch.arange(length, device=device).float(), rates)

    def embed(self, t: Tensor, pooled: Tensor) -> Tensor:
        waves = t[:, None] * 1000 * 10000.0 ** (-torch.arange(16, device=t.device) / 16)
        h = self.time_in[0](torch.cat([waves.sin(), waves.cos()], dim=-1))
        return self.time_in[1](F.silu(h)) + self.vector_in(pooled)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, pooled: Tensor) -> Tensor:
        img, txt, vec = self.img_in(x), self.txt_in(y), self.embed(t, pooled)
        angles = self.angles(txt.shape[1] + img.shape[1], x.device)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, angles)
        both = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            both = block(both, vec, angles)
        shift, scale = self.last_modulation(F.silu(vec))[:, None].tensor_split(2, dim=-1)
        img = F.layer_norm(both[:, txt.shape[1] :], both.shape[-1:])
        return self.last(img * (1 + scale) + shift)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    freqs = torch.pow(10000.0, -torch.arange(0, dim, 2, dtype=torch.float32, device=t.device) / dim)
    angles = t.float().unsqueeze(-1) * freqs
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.q = nn.Linear(hidden_size, hidden_size)
        self.k = nn.Linear(hidden_size, hidden_size)
        self.v = nn.Linear(hidden_size, hidden_size)
        self.o = nn.Linear(hidden_size, hidden_size)
        self.norm_q = nn.RMSNorm(hidden_size // num_heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(hidden_size // num_heads, eps=1e-6)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.norm_q(self.q(x).view(batch, tokens, self.num_heads, -1)).transpose(1, 2)
        k = self.norm_k(self.k(x).view(batch, tokens, self.num_heads, -1)).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).contiguous().view(batch, tokens, -1))


class FactorisedBlock(nn.Module):
    """Attends within a frame, or over the frames at one place; cross-attention and MLP see all tokens."""

    def __init__(self, hidden_size: int, num_heads: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(hidden_size, num_heads)
        self.cross_attn = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(4 * hidden_size, hidden_size),
        )
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def attend(self, x: Tensor, frames: int) -> Tensor:
        B, N, C = x.shape
        S = N // frames
        if self.temporal:
            x = x.view(B, frames, S, C).transpose(1, 2).reshape(B * S, frames, C)
            return self.attn(x).view(B, S, frames, C).transpose(1, 2).reshape(B, N, C)
        return self.attn(x.view(B * frames, S, C)).view(B, N, C)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, padding: Tensor, frames: int) -> Tensor:
        table = self.scale_shift_table[None] + t.reshape(x.shape[0], 6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
        x_m = self.norm1(x) * (1 + scale_msa) + shift_msa
        x = x + gate_msa * self.attend(x_m, frames)
        x = x + self.cross_attn(x, y, y, key_padding_mask=padding, need_weights=False)[0]
        x_m = self.norm2(x) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * self.mlp(x_m)


class FactorisedDiT(nn.Module):
    """A video transformer with alternating spatial and temporal blocks and a learned variance."""

    def __init__(
        self, hidden_size: int = 32, num_heads: int = 2, depth: int = 2, caption_dim: int = 24
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.patch = nn.Conv3d(4, hidden_size, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.spatial_position = nn.Parameter(torch.zeros(16, hidden_size))
        self.temporal_position = nn.Parameter(torch.zeros(3, hidden_size))
        self.time = nn.Sequential(nn.Linear(32, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.fps = nn.Linear(32, hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.caption = nn.Sequential(
            nn.Linear(caption_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.spatial_blocks = nn.ModuleList(
            FactorisedBlock(hidden_size, num_heads, False) for _ in range(depth)
        )
        self.temporal_blocks = nn.ModuleList(
            FactorisedBlock(hidden_size, num_heads, True) for _ in range(depth)
        )
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.final_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)
        self.final = nn.Linear(hidden_size, 4 * 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor, fps: Tensor) -> Tensor:
        B, _, T, H, W = x.shape
        x = self.patch(x).flatten(3).permute(0, 2, 3, 1)
        x = x + self.spatial_position + self.temporal_position[:, None]
        x = x.reshape(B, -1, self.hidden_size)
        emb = self.time(sinusoid(t, 32).to(y)) + self.fps(sinusoid(fps, 32).to(y))
        t6, y = self.t_block(emb), self.caption(y)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, y, t6, ~mask, T)
            x = temporal(x, y, t6, ~mask, T)
        shift, scale = (self.final_table[None] + emb[:, None]).chunk(2, dim=1)
        x = self.final(self.norm_final(x) * (1 + scale) + shift)
        x = x.view(B, T, H // 2, W // 2, 2, 2, 8).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(B, 8, T, H, W)


class PerFrameBlock(nn.Module):
    """Frame by frame joint attention with the text, then attention over the frames, then an MLP a stream."""

    def __init__(self, dim: int, heads: int, last: bool) -> None:
        super().__init__()
        self.heads, self.last = heads, last
        self.modulation = nn.Linear(dim, 5 * dim)
        self.image_qkv, self.text_qkv = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)
        self.image_out, self.text_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.frame_qkv, self.frame_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.image_mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        self.text_mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def heads_of(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return tuple(to_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        shift, scale, gate_a, gate_t, gate_m = self.modulation(vec)[:, None].chunk(5, dim=-1)
        normed = F.layer_norm(img, img.shape[-1:]) * (1 + scale) + shift
        parts = zip(
            self.heads_of(self.text_qkv(F.layer_norm(txt, txt.shape[-1:]))),
            self.heads_of(self.image_qkv(normed)),
            strict=True,
        )
        joint = F.scaled_dot_product_attention(*(torch.cat(pair, dim=2) for pair in parts))
        joint = joint.transpose(1, 2).flatten(2)
        length, (folded, places, dim) = txt.shape[1], img.shape
        txt = txt + self.text_out(joint[:, :length])
        img = img + gate_a * self.image_out(joint[:, length:])
        across = F.layer_norm(img, (dim,)).view(-1, frames, places, dim).transpose(1, 2)
        q, k, v = self.heads_of(self.frame_qkv(across.reshape(-1, frames, dim)))
        mixed = self.frame_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        mixed = mixed.view(-1, places, frames, dim).transpose(1, 2).reshape(folded, places, dim)
        img = img + gate_t * mixed
        img = img + gate_m * self.image_mlp(F.layer_norm(img, (dim,)))
        return img, txt if self.last else txt + self.text_mlp(F.layer_norm(txt, (dim,)))


class PerFrameMMDiT(nn.Module):
    """A video MM-DiT with the frames folded into the batch, as in Vchitect-2.0."""

    def __init__(self, dim: int = 32, heads: int = 2, depth: int = 2, text_dim: int = 24) -> None:
        super().__init__()
        self.img_in = nn.Conv2d(4, dim, kernel_size=2, stride=2)
        self.txt_in = nn.Linear(text_dim, dim)
        self.time_in = nn.Linear(32, dim)
        self.blocks = nn.ModuleList(PerFrameBlock(dim, heads, i == depth - 1) for i in range(depth))
        self.out = nn.Linear(dim, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batch, _, frames, height, width = x.shape
        img = self.img_in(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        txt = self.txt_in(y).repeat_interleave(frames, dim=0)
        vec = F.silu(self.time_in(sinusoid(t, 32).to(y))).repeat_interleave(frames, dim=0)
        for block in self.blocks:
            img, txt = block(img, txt, vec, frames)
        out = self.out(F.layer_norm(img, img.shape[-1:]))
        out = out.view(batch, frames, height // 2, width // 2, 4, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        return out.reshape(batch, 4, frames, height, width)


def _maker(cls: Callable[[], nn.Module], seed: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return randomise(cls(), seed)

    return make


def _chunked_static(batch: int) -> dict[str, Any]:
    return {"y": torch.arange(batch) * 3 + 1}


# Two blocks of two adds: gate_a * attn and gate_m * mlp.
CHUNKED = Case(
    name="chunked_dit",
    make=_maker(ChunkedDiT, seed=21),
    static=_chunked_static,
    latent="x",
    shape=(4, 8, 8),
    timestep="t",
    clock=index,
    roles={"self": 2, "mlp": 2},
    blocks=2,
)


def _functional_static(batch: int) -> dict[str, Any]:
    return {"y": noise(batch, 6, 24), "pooled": noise(batch, 20, seed=2)}


# Two double blocks of four adds, text and image; the streams are concatenated once, and each of two single
# blocks adds linear2(cat([attn, gelu(mlp)])) to the concatenation. Every text add reaches the image through
# a later attention, except the last single block's, which is the same node as the image's.
FUNCTIONAL = Case(
    name="functional_mmdit",
    make=_maker(FunctionalMMDiT, seed=22),
    static=_functional_static,
    latent="x",
    shape=(16, 8),
    timestep="t",
    clock=unit,
    roles={"joint": 2, "joint.context": 2, "mlp": 2, "mlp.context": 2, "parallel": 2},
    blocks=4,
)


def _factorised_static(batch: int) -> dict[str, Any]:
    return {"y": noise(batch, 6, 24), "mask": padded(batch, 6), "fps": torch.full((batch,), 24.0)}


# Two spatial and two temporal blocks of three adds: the block's self-attention, cross-attention to the
# caption (ungated) and the MLP.
FACTORISED = Case(
    name="factorised_dit",
    make=_maker(FactorisedDiT, seed=23),
    static=_factorised_static,
    latent="x",
    shape=(4, 3, 8, 8),
    timestep="t",
    clock=thousand,
    roles={"self.spatial": 2, "self.temporal": 2, "cross": 4, "mlp": 4},
    blocks=4,
)


def _per_frame_static(batch: int) -> dict[str, Any]:
    return {"y": noise(batch, 6, 24)}


# Two blocks of four adds, text and image joined, frames, image MLP; a text MLP in all but the last, whose
# text reaches nothing.
PER_FRAME = Case(
    name="per_frame_mmdit",
    make=_maker(PerFrameMMDiT, seed=24),
    static=_per_frame_static,
    latent="x",
    shape=(4, 3, 8, 8),
    timestep="t",
    clock=thousand,
    roles={"joint": 2, "joint.context": 1, "self.temporal": 2, "mlp": 2, "mlp.context": 1},
    blocks=2,
)

CASES = (CHUNKED, FUNCTIONAL, FACTORISED, PER_FRAME)
