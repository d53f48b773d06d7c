"""A graph that runs in stretches, and which of its values somebody looks at or waits for."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.stretches import Stretches
from graphcache.ir.graph import CacheWrite, Input, value_of
from graphcache.ir.history import OUTPUT, History
from graphcache.passes.shard import Shard
from graphcache.planning.holdings import Cut, Holding


@dataclass(frozen=True)
class SiteNodes:
    """The nodes that a site's value is made of, and those whose gradients are the site's.

    `holdings` are the ranks' parts of them; without any they are whole.
    """

    name: str
    values: tuple[str, ...]
    sources: tuple[str, ...]
    holdings: tuple[Holding, ...] = ()


@dataclass
class InStretches:
    """A graph that is run, and run backwards, stretch by stretch.

    Attributes:
        runnable: the whole graph, which says what it is fed.
        count: results that are handed out; the others are sites'.
        sites: what is looked at on the way.
        folded: tensors, by site and place, of which every sample has several rows in a row; known after the
            first evaluation.
    """

    runnable: Runnable
    count: int
    sites: tuple[SiteNodes, ...] = ()
    folded: frozenset[tuple[str, int]] | None = None
    _varying: dict[frozenset[str], frozenset[str]] = field(default_factory=dict)

    @staticmethod
    def probed(runnable: Runnable, count: int, shards: Sequence[Shard] = ()) -> "InStretches":
        """A graph whose first `count` results are the model's, and whose others are looked at; the model's
        result is looked at too. `shards` made it one rank's part.
        """
        nodes = runnable.step.results()
        names = [node.name for node in nodes]
        parts: dict[History, list[str]] = {History(OUTPUT): names[:count]}
        held = dict[str, list[Holding]]()
        for port, node in zip(runnable.step.outputs, nodes, strict=True):
            if isinstance(port, CacheWrite):
                parts.setdefault(port.history, []).append(node.name)
                if shards and port.history.is_value:
                    site, entry = port.history.site, (port.history, port.part)
                    cuts = [Cut(shard.ranks, shard.entries.get(entry)) for shard in shards]
                    held.setdefault(site, []).append(Holding.of(value_of(node).shape, cuts))
        values = {history.site: tuple(nodes) for history, nodes in parts.items() if history.is_value}
        sites = [
            SiteNodes(site, own, tuple(parts.get(History(site, "handle"), own)), tuple(held.get(site, ())))
            for site, own in values.items()
        ]
        return InStretches(runnable, count, tuple(sites))

    @cached_property
    def stretches(self) -> Stretches:
        return Stretches.of(self.runnable.step)

    @property
    def results(self) -> tuple[str, ...]:
        """The nodes that are handed out."""
        return self.stretches.results[: self.count]

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """The graph's nodes by name."""
        return self.runnable.step.nodes()

    @cached_property
    def seen(self) -> list[list[SiteNodes]]:
        """For every stretch the sites whose values are whole behind it."""
        return self._by_stretch(lambda site: max(self._made_in(name) for name in site.values))

    @cached_property
    def pulled(self) -> list[list[SiteNodes]]:
        """For every stretch the sites whose gradients are whole before it."""
        return self._by_stretch(
            lambda site: min(self._made_in(name) for name in (*site.values, *site.sources))
        )

    def _by_stretch(self, place: Callable[[SiteNodes], int]) -> list[list[SiteNodes]]:
        found: list[list[SiteNodes]] = [[] for _ in self.stretches.parts]
        for site in self.sites:
            found[place(site)].append(site)
        return found

    def _made_in(self, name: str) -> int:
        return self._places.get(name, 0)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, part in enumerate(self.stretches.parts) for name in part.gives}

    @cached_property
    def crossing(self) -> list[frozenset[str]]:
        """For every stretch the values from before it that it or a later one reads."""
        return self.stretches.crossing()

    @cached_property
    def awaited(self) -> list[frozenset[str]]:
        """For every stretch what is still needed behind it on the way forwards: by later stretches, of sites
        that are not whole yet, and the inputs and results.
        """
        always = {*self.stretches.inputs, *self.results}
        found, pending = list[frozenset[str]](), frozenset(always)
        later = (*self.crossing[1:], frozenset[str]())
        for read, sites in zip(reversed(later), reversed(self.seen), strict=True):
            found.append(read | pending)
            pending |= {name for site in sites for name in site.values}
        return found[::-1]

    @cached_property
    def unsettled(self) -> list[frozenset[str]]:
        """For every stretch the results of those before it, and the nodes of sites whose gradients are whole
        before one of them.
        """
        found, pending = list[frozenset[str]](), frozenset[str]()
        for number, sites in enumerate(self.pulled):
            found.append(pending)
            pending |= {name for name in self.results if self._made_in(name) == number}
            pending |= {name for site in sites for name in (*site.values, *site.sources)}
        return found

    @cached_property
    def sources(self) -> frozenset[str]:
        """The nodes whose gradients are some site's."""
        return frozenset(name for site in self.sites for name in site.sources)

    @cached_property
    def latents(self) -> tuple[str, ...]:
        """The placeholders of the latents: one, or where they are a list one a sample."""
        ports = zip(self.runnable.step.inputs, self.stretches.inputs, strict=True)
        return tuple(name for port, name in ports if isinstance(port, Input) and port.kind == "latent")

    def varying(self, asked: Iterable[str]) -> frozenset[str]:
        """The nodes that depend on some placeholders, these included, and on the latents where sites are
        looked at.
        """
        changed = frozenset((*asked, *self.latents)) if self.sites else frozenset(asked)
        if changed not in self._varying:
            found = set(changed)
            for node in self.runnable.step.graph.nodes:
                if any(item.name in found for item in node.all_input_nodes):
                    found.add(node.name)
            self._varying[changed] = frozenset(found)
        return self._varying[changed]
