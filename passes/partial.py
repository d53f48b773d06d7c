"""A site on a budget of tokens: its cached value with the chosen tokens computed anew."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.token_layout import halved
from graphcache.analysis.tokens import TokenCut
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import CacheRead, CacheWrite, Chosen, value_of
from graphcache.ir.history import History
from graphcache.ir.schedule import Action, Budget, Memory
from graphcache.passes.rewrite import Chain, Rewriter
from graphcache.passes.tokens import TokenWise, is_by_token

aten = ops.aten


@dataclass
class Partial:
    """One site in a phase's graph; `memory` says what stands for operands that it meets whole."""

    rewriter: Rewriter
    cut: TokenCut
    memory: Mapping[str, fx.Node]
    chain: Chain

    def value(self, histories: Sequence[History], action: Action, entries: Sequence[fx.Node]) -> fx.Node:
        """The newest value, in whole or in the halves of a batch that have histories of their own.

        Args:
            histories: the site's, one, or one for each half.
            action: of them all.
            entries: their newest values, to be written to.
        """
        assert action.budget is not None
        halves = len(histories)
        chosen = [self._chosen(history, action.budget, halves) for history in histories]
        known = [node for node in chosen if node is not None]
        if known:
            places = known[0] if halves == 1 else self.chain.emit(aten.cat.default, known)
            computed = TokenWise(self.rewriter, self.cut, places, self.chain, self.memory).value()
            rows = [computed] if halves == 1 else [self.chain.rows(computed, half) for half in range(halves)]
            each = zip(histories, entries, known, rows, strict=True)
            entries = [self._written(history, action, *rest) for history, *rest in each]
        return entries[0] if halves == 1 else self.chain.emit(aten.cat.default, list(entries))

    def _chosen(self, history: History, budget: Budget, halves: int) -> fx.Node | None:
        return chosen_tokens(self.rewriter, history, self.cut, budget, self.cut.rows // halves)

    def _written(
        self, history: History, action: Action, entry: fx.Node, chosen: fx.Node, computed: fx.Node
    ) -> fx.Node:
        tokens = TokenWise(self.rewriter, self.cut, chosen, self.chain)
        assert action.budget is not None
        if action.budget.blend is not None:
            if not is_by_token(self.cut):
                raise PlanError(
                    f"site {self.cut.site}: its value, node {self.cut.value.name}, is not (rows, tokens, "
                    "channels), of which clusters are made; choose tokens by random or norm"
                )
            value = value_of(entry)
            port = Chosen(history, clusters=True)
            clusters = self.rewriter.input(port, value, shape=value.shape[:2], dtype=torch.int64)
            entry = tokens.blend(entry, computed, clusters, action.budget.blend)
        layout = self.cut.layout
        if tokens.rows < self.cut.rows:
            layout = halved(layout, tokens.rows)
        result = tokens.scatter(entry, layout, computed)
        if action.patches:
            self.rewriter.write(CacheWrite(history.patched, 0), result)
        return result


def chosen_tokens(
    rewriter: Rewriter, history: History, cut: TokenCut, budget: Budget, rows: int
) -> fx.Node | None:
    """The input with the places of the tokens that a site computes; None where the budget is empty."""
    count = budget.among(cut.tokens)
    if not count:
        return None
    like = value_of(cut.gathered[0][0])
    return rewriter.input(Chosen(history), like, shape=(rows, count), dtype=torch.int64)


def uncovered(cuts: Collection[TokenCut]) -> list[TokenCut]:
    """The parts of an operand that are other streams' tokens, and no site's: they are computed whole."""
    own = {cut.layout for cut in cuts}
    others = {other.layout: other for cut in cuts for other in cut.beside}
    return [other for layout, other in others.items() if layout not in own]


def remembered(
    rewriter: Rewriter, memory: Memory, actions: Mapping[History, Action], cuts: Mapping[str, TokenCut]
) -> fx.Node | None:
    """Store an operand of attention whole, or write the chosen tokens' part into the stored one.

    Returns what stands for the operand, None where it is computed.
    """
    action, operand = actions[memory.history], rewriter.nodes[memory.node]
    if action.stores:
        rewriter.write(CacheWrite(memory.history, 0), rewriter.after(operand).copied(operand))
    if action.kind != "tokens":
        return None
    chain = rewriter.after(operand)
    whole = rewriter.input(CacheRead(memory.history, 0, 0, changed=True), value_of(operand))
    own = {
        site: next(cut for node, cut in cuts[site].memory.items() if node.name == memory.node)
        for site in memory.sites
    }
    for other in uncovered(own.values()):
        every = chain.emit(aten.arange.default, other.tokens, device=value_of(whole).device)
        every = chain.emit(aten.expand.default, every, [other.rows, other.tokens])
        tokens = TokenWise(rewriter, other, every, chain)
        whole = tokens.scatter(whole, other.layout, tokens.value())
    for site, cut in own.items():
        budget = actions[History(site)].budget
        if budget is None:
            continue
        chosen = chosen_tokens(rewriter, History(site), cut, budget, cut.rows)
        if chosen is not None:
            tokens = TokenWise(rewriter, cut, chosen, chain)
            whole = tokens.scatter(whole, cut.layout, tokens.value())
    return whole
