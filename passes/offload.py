"""Keep cache entries in host memory: fetched one site ahead of their use, sent as soon as they are made."""

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import fx

from graphcache.ir.graph import CacheRead, CacheWrite, StepGraph, fake_mode, value_of
from graphcache.ir.history import History
from graphcache.passes.rewrite import Rewriter
from graphcache.passes.transfer import ARRIVE, FETCH, SEND


@dataclass(frozen=True)
class Offload:
    """Turn reads and writes of these histories into transfers.

    A site's entries are on the device from the site before it on, until their last use.
    """

    histories: Set[History]

    def __call__(self, step: StepGraph) -> StepGraph:
        rewriter = Rewriter(step)
        order = {node: place for place, node in enumerate(rewriter.graph.nodes)}
        reads = {
            node: port.history
            for port, node in rewriter.loaded.items()
            if isinstance(port, CacheRead) and port.history in self.histories and _is_on_device(node)
        }
        groups: dict[History, list[fx.Node]] = {}
        for node in sorted(reads, key=lambda node: min(order[user] for user in node.users)):
            groups.setdefault(reads[node], []).append(node)
        place: fx.Node | None = None
        for entries in groups.values():
            first = min((user for node in entries for user in node.users), key=order.__getitem__)
            place = _fetched(rewriter, entries, place, first)
        for index, port in enumerate(rewriter.outputs):
            value = rewriter.results[index]
            is_sent = value.target is SEND
            if isinstance(port, CacheWrite) and port.history in self.histories and not is_sent:
                rewriter.results[index] = rewriter.emit(value, SEND, value)
        return rewriter.finished()


def _is_on_device(node: fx.Node) -> bool:
    """Whether nothing was done to an entry yet."""
    return all(user.target is not FETCH for user in node.users)


def _fetched(rewriter: Rewriter, entries: list[fx.Node], place: fx.Node | None, first: fx.Node) -> fx.Node:
    """Ask for entries behind `place`, where those of the site before arrive, and wait for them at `first`."""
    chain = rewriter.after(place or _last_input(rewriter))
    made = []
    for node in entries:
        users, value = list(node.users), value_of(node)
        with fake_mode(value):
            node.meta["val"] = torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format)
        made.append(chain.emit(FETCH, node, value.device))
        for user in users:
            user.replace_input_with(node, made[-1])
    with rewriter.graph.inserting_before(first):
        arrived = rewriter.graph.call_function(ARRIVE, (made,))
    arrived.meta["val"] = None
    return arrived


def _last_input(rewriter: Rewriter) -> fx.Node:
    *_, last = rewriter.graph.find_nodes(op="placeholder")
    assert isinstance(last, fx.Node)
    return last
