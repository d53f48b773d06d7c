"""Scores of tokens, taken where a branch is computed whole: exact, without a map of tokens by tokens."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import Dataflow
from graphcache.analysis.token_layout import Layout
from graphcache.analysis.tokens import cut_tokens
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import Branch, value_of
from graphcache.ir.schedule import Measure
from graphcache.libraries.torch_private import CPU_ATTENTION, EFFICIENT_ATTENTION, FLASH_ATTENTION
from graphcache.passes.rewrite import Chain, Rewriter
from graphcache.passes.tokens import by_token

aten = ops.aten

MOST_BYTES = 2**26
"""Of a piece of a cross-attention map in fp32."""


Scores = dict[tuple[str, Measure], tuple[fx.Node, fx.Node]]
"""By attention: its keys' or queries' scores, and the node that further operations follow."""


def measured(
    rewriter: Rewriter,
    flow: Dataflow,
    known: Scores,
    name: str,
    measure: Measure,
    raw: fx.Node,
    half: int | None,
) -> fx.Node:
    """The score of each token of a site: fp32 (rows, tokens), of length 1 over the tokens.

    Args:
        rewriter: the graph that computes the site whole.
        flow: of the step that it is a copy of.
        known: scores made so far in this graph; grows.
        name: the site.
        measure: which score.
        raw: the site's value.
        half: 0 or 1 where the score is of one half of the batch alone.

    Raises:
        PlanError: the score needs attention that the site's block does not have.
    """
    site = next(b for b in rewriter.step.branches if b.name == name)
    cut = cut_tokens(flow, site)
    if measure.by == "norm":
        chain = rewriter.after(raw)
        wide = chain.cast(by_token(chain, raw, cut), torch.float32)
        scores = chain.emit(aten.linalg_vector_norm.default, wide, 2, [-1])
    else:
        branch = _attending(rewriter, site, measure)
        attention = _Attention.of(rewriter, flow, branch)
        # text and image of one attention share what it is asked
        key = attention.node.name, measure
        if key not in known:
            known[key] = attention.score(measure), attention.chain.last
        scores, last = known[key]
        chain = rewriter.after(last)
        if measure.by == "influence":
            last_token = attention.start + attention.tokens
            scores = chain.emit(aten.slice.Tensor, scores, 1, attention.start, last_token)
        if half is not None:
            scores = chain.rows(scores, half)
    if measure.shared and int(value_of(scores).shape[0]) == cut.rows // (1 if half is None else 2):
        total = chain.emit(aten.add.Tensor, chain.rows(scores, 0), chain.rows(scores, 1))
        scores = chain.emit(aten.mul.Tensor, total, 0.5)
    length = chain.emit(aten.linalg_vector_norm.default, scores, 2, [-1], True)
    return chain.emit(aten.div.Tensor, scores, chain.emit(aten.clamp_min.default, length, 1e-12))


def _attending(rewriter: Rewriter, site: Branch, measure: Measure) -> Branch:
    """The branch whose attention scores a site's tokens: its own, or that of its block."""
    roles = ("cross",) if measure.by == "entropy" else ("self", "joint", "parallel")
    for branch in (site, *rewriter.step.branches):
        fits = branch.role.partition(".")[0] in roles and branch.role != "parallel.mlp"
        fits = fits and branch.context == site.context
        if fits and branch.block == site.block:
            return branch
    kind = "cross-attention" if measure.by == "entropy" else "self-attention"
    raise PlanError(
        f"site {site.name}: tokens by {measure.by} need {kind} in the same block, which has none; "
        "choose them by random"
    )


def _is_plain(layout: Layout) -> bool:
    """Whether rows are the first of four dimensions, and tokens the third."""
    kinds = [[factor.kind for factor in dimension] for dimension in layout]
    wanted = (["row"], ["other"], ["token"], ["other"])
    return len(kinds) == 4 and all(found in ([], kind) for found, kind in zip(kinds, wanted, strict=True))


@dataclass
class _Attention:
    """A branch's attention in the graph; the chain emits behind it."""

    rewriter: Rewriter
    branch: Branch
    node: fx.Node
    start: int
    tokens: int

    def __post_init__(self) -> None:
        self.chain: Chain = self.rewriter.after(self.node)
        arguments: list[Any] = list(self.node.args)
        self.query, self.key, self.value = arguments[:3]
        named = dict(zip(("attn_mask", "dropout_p", "is_causal"), arguments[3:], strict=False))
        named |= self.node.kwargs
        self.mask: fx.Node | None = named.get("attn_mask")
        given: Any = named.get("scale")
        self.scale = float(given) if given is not None else value_of(self.query).shape[-1] ** -0.5

    @staticmethod
    def of(rewriter: Rewriter, flow: Dataflow, branch: Branch) -> "_Attention":
        cut = cut_tokens(flow, branch)
        found = [node for node in cut.computed if node.target in ops.ATTENTION]
        if len(found) != 1:
            raise PlanError(
                f"site {branch.name}: its attention is no single scaled_dot_product_attention, whose map "
                "could score tokens; choose them by random"
            )
        key: Any = found[0].args[1]
        layouts = [cut.computed[found[0]].layout, *(cut.memory[key].layout for _ in range(key in cut.memory))]
        if not all(map(_is_plain, layouts)):
            raise PlanError(
                f"site {branch.name}: its attention is not (rows, heads, tokens, channels), of which tokens "
                "could be scored; choose them by random or norm"
            )
        start = layouts[-1][2][-1].held.start if key in cut.memory and layouts[-1][2] else 0
        return _Attention(rewriter, branch, rewriter.nodes[found[0].name], start, cut.tokens)

    def score(self, measure: Measure) -> fx.Node:
        if measure.by == "influence":
            return self.influence(measure.queries)
        return self.entropy(measure.shared)

    def influence(self, queries: float) -> fx.Node:
        """The attention that each key receives, summed over queries, mean of the heads.

        With the log-sum-exp of each query's row from the ordinary call, a second call with queries and keys
        in each other's place, whose scores are lowered by it, has the sums over columns as its own.
        """
        if self.mask is not None or value_of(self.query).dim() != 4:
            raise PlanError(
                f"site {self.branch.name}: attention under a mask does not score tokens by influence; choose "
                "them by random"
            )
        lse = self._log_sum_exp()
        every = max(1, round(1 / queries))
        query = self._every(self.query, every)
        shift = self.chain.emit(aten.mul.Tensor, self._every(lse, every), -1 / self.scale)
        sums = self._attend(self._extended(self.key, None), self._extended(query, shift))[1]
        sums = self.chain.emit(aten.exp.default, sums)
        return self.chain.emit(aten.mean.dim, sums, [1])

    def entropy(self, shared: bool) -> fx.Node:
        """One more than the entropy of each token's mean map over heads, and over both halves if `shared`."""
        rows, heads, tokens, _ = (int(n) for n in value_of(self.query).shape)
        texts = int(value_of(self.key).shape[-2])
        size = max(1, MOST_BYTES // (4 * rows * heads * texts))
        wanted = -(-tokens // size)
        # each piece has tokens from everywhere, so that of each a rank can compute a part
        count = next((n for n in range(wanted, min(2 * wanted, tokens) + 1) if tokens % n == 0), None)
        if count is not None:
            strided = [self._entropy((i, 2**62, count), shared) for i in range(count)]
            whole = strided[0]
            if count > 1:
                whole = self.chain.emit(aten.stack.default, strided, 2)
                whole = self.chain.emit(aten.reshape.default, whole, [value_of(whole).shape[0], tokens])
        else:
            runs = [self._entropy((i, i + size, 1), shared) for i in range(0, tokens, size)]
            whole = self.chain.emit(aten.cat.default, runs, 1)
        return self.chain.emit(aten.add.Tensor, whole, 1.0)

    def _entropy(self, some: tuple[int, int, int], shared: bool) -> fx.Node:
        """Of some tokens: the first, the end and every how many."""
        emit = self.chain.emit
        query = self.chain.cast(emit(aten.slice.Tensor, self.query, 2, *some), torch.float32)
        key = emit(aten.transpose.int, self.chain.cast(self.key, torch.float32), -2, -1)
        scores = emit(aten.mul.Tensor, emit(aten.matmul.default, query, key), self.scale)
        if self.mask is not None:
            scores = emit(aten.add.Tensor, scores, self._additive(some))
        mean = emit(aten.mean.dim, emit(aten.softmax.int, scores, -1), [1])
        if shared:
            mean = emit(
                aten.mul.Tensor, emit(aten.add.Tensor, *(self.chain.rows(mean, i) for i in (0, 1))), 0.5
            )
        surprise = emit(aten.log.default, emit(aten.add.Tensor, mean, 1e-7))
        return emit(aten.neg.default, emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, mean, surprise), [-1]))

    def _additive(self, some: tuple[int, int, int]) -> fx.Node:
        mask = self.mask
        assert mask is not None
        if value_of(mask).shape[-2] > 1:
            mask = self.chain.emit(aten.slice.Tensor, mask, value_of(mask).dim() - 2, *some)
        if value_of(mask).dtype != torch.bool:
            return self.chain.cast(mask, torch.float32)
        hidden = self.chain.emit(aten.logical_not.default, mask)
        return self.chain.emit(aten.mul.Tensor, self.chain.cast(hidden, torch.float32), -1e9)

    def _log_sum_exp(self) -> fx.Node:
        """Of the ordinary call, whose result then comes from the call that gives both."""
        out, lse = self._attend(self.query, self.key, self.value)
        kept = self.chain.made
        self.node.replace_all_uses_with(out, delete_user_cb=lambda user: user not in kept)
        return lse

    def _attend(self, query: fx.Node, key: fx.Node, value: fx.Node | None = None) -> tuple[fx.Node, fx.Node]:
        """Result and log-sum-exp, fp32 (rows, heads, queries), of PyTorch's fused attention."""
        like = value_of(query)
        further: tuple[Any, ...] = ()
        count = int(like.shape[-2])
        if like.device.type != "cuda":
            target: Any = CPU_ATTENTION
        elif like.dtype == torch.float32:
            target, further = EFFICIENT_ATTENTION, (None, True)
        else:
            target = FLASH_ATTENTION
        values = key if value is None else value
        both = self.chain.several(target, query, key, values, *further, scale=self.scale)
        lse = self.chain.emit(aten.slice.Tensor, both[1], 2, 0, count)
        return both[0], self.chain.cast(lse, torch.float32)

    def _every(self, node: fx.Node, step: int) -> fx.Node:
        return node if step == 1 else self.chain.emit(aten.slice.Tensor, node, 2, 0, 2**62, step)

    def _extended(self, node: fx.Node, shift: fx.Node | None) -> fx.Node:
        """Queries or keys with further channels: ones, or the shift in parts that their dtype can hold."""
        value = value_of(node)
        narrow = value.dtype != torch.float32
        parts = 3 if narrow else 1
        padded = math.ceil((value.shape[-1] + parts) / 8) * 8 - value.shape[-1] - parts
        if shift is None:
            one = self.chain.emit(aten.slice.Tensor, node, -1, 0, 1)
            extra = [self.chain.emit(aten.ones_like.default, one)] * parts
        else:
            extra, rest = [], self.chain.emit(aten.unsqueeze.default, shift, -1)
            for _ in range(parts):
                extra.append(self.chain.cast(rest, value.dtype))
                if narrow:
                    rest = self.chain.emit(aten.sub.Tensor, rest, self.chain.cast(extra[-1], torch.float32))
        joined = self.chain.emit(aten.cat.default, [node, *extra], -1)
        return self.chain.emit(aten.constant_pad_nd.default, joined, [0, padded]) if padded else joined
