"""Small transformers that lay their tokens out, rotate, repeat and join them in many ways."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, TEXT = 12, 3, 5
SIZE = WIDTH // HEADS
Attend = Callable[["Attending", Tensor, Tensor], Tensor]
ATTENTIONS: dict[str, Attend] = {}


def attention(attend: Attend) -> Attend:
    ATTENTIONS[attend.__name__] = attend
    return attend


class Attending(nn.Module):
    """Blocks of one of the attentions below and an MLP, on (batch, tokens, channels)."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.time, self.words = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qkv, self.kv, self.out = (nn.Linear(WIDTH, n * WIDTH) for n in (3, 2, 1))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.pointwise = nn.Conv2d(WIDTH, WIDTH, 1)

    def heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values, (3, batch, heads, tokens, channels)."""
        return self.qkv(x).view(*x.shape[:2], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)

    def joined(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = x + self.time(timestep[:, None])[:, None]
        for _ in range(2):
            x = x + self.attend(self, F.layer_norm(x, (WIDTH,)), text)
            x = x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))
        return x


class Fused(Attending):
    """Image and text in one stream, attention and MLP in one linear layer, the image's queries rotated."""

    def __init__(self) -> None:
        super().__init__(rotated_by_halves)
        self.both, self.after = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = x + self.time(timestep[:, None])[:, None]
        count = x.shape[1]
        stream = torch.cat([x, self.words(text)], 1)
        for _ in range(2):
            qkv, mlp = self.both(F.layer_norm(stream, (WIDTH,))).split([3 * WIDTH, 2 * WIDTH], -1)
            q, k, v = qkv.unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
            q, k = (torch.cat([halves(t[:, :, :count]), t[:, :, count:]], 2) for t in (q, k))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            stream = stream + self.after(torch.cat([y, F.gelu(mlp)], -1))
        return stream[:, :count]


class SequenceFirst(Attending):
    """The samples are the stream's second dimension."""

    def __init__(self) -> None:
        super().__init__(tokens_first)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = (x + self.time(timestep[:, None])[:, None]).transpose(0, 1).contiguous()
        for _ in range(2):
            x = x + self.attend(self, F.layer_norm(x, (WIDTH,)).transpose(0, 1), text).transpose(0, 1)
            x = x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))
        return x.transpose(0, 1)


def angles(tokens: int, channels: int) -> Tensor:
    return torch.arange(tokens)[:, None] * torch.linspace(0.1, 1, channels)


def halves(x: Tensor) -> Tensor:
    """Rotated by a table of (tokens, channels), which all samples and heads share."""
    first, second = x.chunk(2, -1)
    table = angles(x.shape[-2], x.shape[-1])
    return x * table.cos() + torch.cat([-second, first], -1) * table.sin()


def numbers(x: Tensor) -> Tensor:
    """The same by complex numbers."""
    table = angles(x.shape[-2], x.shape[-1] // 2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(table), table)[None, None]).flatten(3)


def pairs(x: Tensor) -> Tensor:
    """The same by pairs that are taken apart and stacked."""
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    table = angles(x.shape[-2], x.shape[-1])
    return x * table.cos() + torch.stack([-second, first], -1).flatten(-2) * table.sin()


@attention
def rotated_by_halves(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = model.heads(x)
    return model.joined(F.scaled_dot_product_attention(halves(q), halves(k), v))


@attention
def rotated_by_numbers(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = model.heads(x)
    return model.joined(F.scaled_dot_product_attention(numbers(q), numbers(k), v))


@attention
def rotated_by_pairs(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = model.heads(x)
    return model.joined(F.scaled_dot_product_attention(pairs(q), pairs(k), v))


@attention
def rotated_in_part(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = model.heads(x)
    q, k = (torch.cat([t[:, :, :4], halves(t[:, :, 4:9]), t[:, :, 9:]], 2) for t in (q, k))
    return model.joined(F.scaled_dot_product_attention(q, k, v))


@attention
def rotated_in_place(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = model.heads(x)
    q, k = q.clone(), k.clone()
    for made in (q, k):
        made[:, :, 4:] = halves(made[:, :, 4:])
    return model.joined(F.scaled_dot_product_attention(q, k, v))


@attention
def beside_text(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    """Text that no block updates is attended to beside the image, whose queries alone are rotated."""
    q, k, v = model.heads(torch.cat([model.words(text), x], 1))
    q, k = (torch.cat([t[:, :, :TEXT], halves(t[:, :, TEXT:])], 2) for t in (q, k))
    return model.joined(F.scaled_dot_product_attention(q, k, v))[:, TEXT:]


@attention
def padded(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = (F.pad(t, (0, 0, 2, 1)) for t in model.heads(x))
    return model.joined(F.scaled_dot_product_attention(q, k, v)[:, :, 2:-1])


@attention
def samples_in_one_sequence(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    batch, count, _ = x.shape
    q, k, v = model.qkv(x).view(1, batch * count, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
    mask = torch.block_diag(*[torch.ones(count, count)] * batch).bool()
    return model.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape))


@attention
def across_samples_in_one_sequence(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    batch, count, _ = x.shape
    q = model.qkv(x)[..., :WIDTH].reshape(1, -1, HEADS, SIZE).transpose(1, 2)
    k, v = model.kv(text).view(1, -1, 2, HEADS, SIZE).transpose(1, 3).unbind(2)
    mask = torch.block_diag(*[torch.ones(count, TEXT)] * batch).bool()
    return model.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape))


@attention
def heads_among_samples(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, x.shape[1], SIZE) for t in model.heads(x))
    bias = angles(x.shape[1], x.shape[1])
    scores = torch.baddbmm(bias, q, k.mT, beta=0.1, alpha=0.5).softmax(-1)
    return model.joined(torch.bmm(scores, v).unflatten(0, (-1, HEADS)))


@attention
def multiplied(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = model.heads(x)
    return model.joined((q @ k.mT * 0.5).softmax(-1) @ v)


@attention
def summed_by_letters(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = model.heads(x)
    scores = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return model.joined(torch.einsum("bhij,bhjd->bhid", scores, v))


@attention
def tokens_first(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = model.qkv(x.movedim(0, 1)).unflatten(-1, (3, HEADS, SIZE)).permute(2, 1, 3, 0, 4)
    y = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)
    return model.out(y).swapaxes(0, 1)


@attention
def few_keys_for_many_queries(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = model.heads(x)
    k, v = k[:, :1].repeat_interleave(HEADS, 1), v[:, :1].expand(-1, HEADS, -1, -1)
    return model.joined(F.scaled_dot_product_attention(q, k, v))


@attention
def on_a_grid(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    """Rows and columns of the picture apart, turned, scaled by tables of their own, and mixed by channel."""
    y = model.heads(x)[0].transpose(1, 2).flatten(2).unflatten(1, (4, -1))
    y = y * angles(4, 1)[:, None] + angles(y.shape[2], 1)
    y = model.pointwise(y.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
    return model.out(y.flatten(1, 2))


@attention
def repeated(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    y = model.heads(x)[0].transpose(1, 2).flatten(2)
    y = y.repeat(1, 1, 2)[..., WIDTH:] + y.repeat_interleave(2, -1)[..., ::2] + y.tile(2)[..., :WIDTH]
    return model.out(y.roll(3, -1).flip(-1))


@attention
def tokens_rolled(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    return model.out(F.gelu(model.words(x)).roll(3, 1))


@attention
def tokens_flipped(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    return model.out(F.gelu(model.words(x)).flip(1))


@attention
def in_windows(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = (t.unflatten(2, (4, -1)).transpose(1, 2) for t in model.heads(x))
    return model.joined(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2, 3))


@attention
def causal(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    return model.joined(F.scaled_dot_product_attention(*model.heads(x), is_causal=True))


@attention
def pooled(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    return model.out(model.words(x) * x.mean(1, keepdim=True))


@attention
def pieces_in_another_order(model: Attending, x: Tensor, text: Tensor) -> Tensor:
    y = model.words(x)
    return model.out(torch.cat([y[:, 4:], y[:, :4]], 1))


def made(name: str) -> Attending:
    """A model with fixed weights."""
    whole: dict[str, type[Fused | SequenceFirst]] = {"fused": Fused, "sequence_first": SequenceFirst}
    return (whole[name]() if name in whole else Attending(ATTENTIONS[name])).eval()


def arguments(batch: int) -> dict[str, Any]:
    """What stays the same through a generation."""
    return {"text": torch.randn(batch, TEXT, WIDTH, generator=torch.Generator().manual_seed(7))}
