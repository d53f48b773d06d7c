"""One evaluation whose sites are looked at: stretch by stretch, forwards and on the way back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, fx

from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.program import Program
from graphcache.compiler.stretches import Stretch, Stretches
from graphcache.ir.graph import CacheWrite, Input
from graphcache.ir.history import OUTPUT, History
from graphcache.runtime.session import CallSlot

Tensors = tuple[Tensor, ...]


class Observer(Protocol):
    """Told of every site of every evaluation, and of every one again on the way back, last first."""

    def saw(self, step: int, branch: CallSlot, site: str, values: Tensors) -> None: ...

    def pulled(self, step: int, branch: CallSlot, site: str, values: Tensors, gradients: Tensors) -> None: ...


@dataclass(frozen=True)
class SiteNodes:
    """The nodes that a site's value is made of, and those whose gradients are the site's."""

    name: str
    values: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass
class Probed:
    """A program's graph that hands out its sites, in stretches.

    Attributes:
        program: that of the plain model.
        runnable: the whole graph, which says what it is fed.
        count: results of the model; the others are sites'.
        folded: tensors, by site and place, of which every sample has several rows in a row; known after the
            first evaluation.
    """

    program: Program
    runnable: Runnable
    count: int
    folded: frozenset[tuple[str, int]] | None = None
    _varying: dict[frozenset[str], frozenset[str]] = field(default_factory=dict)

    @cached_property
    def stretches(self) -> Stretches:
        return Stretches.of(self.runnable.step)

    @cached_property
    def sites(self) -> tuple[SiteNodes, ...]:
        """All sites; the model's result is one."""
        names = self.stretches.results
        parts: dict[History, list[str]] = {History(OUTPUT): list(names[: self.count])}
        for port, name in zip(self.runnable.step.outputs, names, strict=True):
            if isinstance(port, CacheWrite):
                parts.setdefault(port.history, []).append(name)
        values = {history.site: tuple(nodes) for history, nodes in parts.items() if history.is_value}
        return tuple(
            SiteNodes(site, nodes, tuple(parts.get(History(site, "handle"), nodes)))
            for site, nodes in values.items()
        )

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
        always = {*self.stretches.inputs, *self.stretches.results[: self.count]}
        found, pending = list[frozenset[str]](), frozenset(always)
        later = (*self.crossing[1:], frozenset[str]())
        for read, sites in zip(reversed(later), reversed(self.seen), strict=True):
            found.append(read | pending)
            pending |= {name for site in sites for name in site.values}
        return found[::-1]

    @cached_property
    def unsettled(self) -> list[frozenset[str]]:
        """For every stretch the nodes of sites whose gradients are whole before an earlier one."""
        found, pending = list[frozenset[str]](), frozenset[str]()
        for sites in self.pulled:
            found.append(pending)
            pending |= {name for site in sites for name in (*site.values, *site.sources)}
        return found

    @cached_property
    def sources(self) -> frozenset[str]:
        """The nodes whose gradients are some site's."""
        return frozenset(name for site in self.sites for name in site.sources)

    @property
    def latents(self) -> str:
        """The placeholder of the latents."""
        ports = zip(self.runnable.step.inputs, self.stretches.inputs, strict=True)
        return next(name for port, name in ports if isinstance(port, Input) and port.kind == "latent")

    def varying(self, changed: frozenset[str]) -> frozenset[str]:
        """The nodes that depend on some of the placeholders, these included."""
        if changed not in self._varying:
            found = set(changed)
            for node in self.runnable.step.graph.nodes:
                if any(item.name in found for item in node.all_input_nodes):
                    found.add(node.name)
            self._varying[changed] = frozenset(found)
        return self._varying[changed]


class _Run(NamedTuple):
    """A stretch that was run with gradients: what it was given, detached, and what it gave."""

    given: Mapping[str, Tensor]
    gave: Mapping[str, Tensor]


@dataclass
class Evaluation:
    """One evaluation as a function of its inputs.

    Attributes:
        step, branch: which one it is.
        observer: is told of its sites.
        probed: its graph.
        feed: the graph's inputs by name.
        asked: by their numbers among the call's leaves, the placeholders of those with a gradient.
        autocast: the state that it runs under.
        stride: stretches between those whose inputs are kept on the way back, where all run again; 0 if all
            of them with what their gradients need.
        held: its stretches with what their gradients need, or None: then they are run again.
    """

    step: int
    branch: CallSlot
    observer: Observer
    probed: Probed
    feed: dict[str, Tensor]
    asked: Mapping[int, str]
    autocast: torch.autocast
    stride: int = 1
    held: list[_Run] | None = None

    def run(self, hold: bool) -> list[Tensor]:
        """The model's results; the observer sees every site. What is held is there for the way back."""
        runs = list[_Run]()
        env = dict(self.feed)
        for number, run in self._forwards(env, hold):
            runs += [run] if run else []
            for site in self.probed.seen[number]:
                self.observer.saw(self.step, self.branch, site.name, _of(site.values, env))
        self.held = runs if hold else None
        # samplers may change these in place
        return [env[name].clone() if hold else env[name] for name in self._results]

    def back(self, gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """The gradients of what was asked for, from those of the results; the observer sees every site's."""
        known = {
            name: pulled for name, pulled in zip(self._results, gradients, strict=True) if pulled is not None
        }
        varying = self.probed.varying(frozenset((*self.asked.values(), self.probed.latents)))
        values: dict[str, Tensor] = {}
        for number, run in self._backwards():
            self._pull(self._parts[number], run, known, varying)
            values |= {name: value.detach() for name, value in run.gave.items()}
            del run
            for site in self.probed.pulled[number]:
                own = {**self.feed, **values}
                found = self._by_sample(site, _of(site.values, own))
                pulled = [_or_zero(known.get(name), own[name]) for name in site.sources]
                by_sample = self._by_sample(site, tuple(pulled))
                self.observer.pulled(self.step, self.branch, site.name, found, by_sample)
            self._forget(number, values, known)
        return {leaf: known[name] for leaf, name in self.asked.items() if name in known}

    def folding(self) -> frozenset[tuple[str, int]]:
        """The tensors, by site and place, of which every sample has several rows in a row: those whose first
        rows alone move when the first sample's latents do.
        """
        latents = self.feed[self.probed.latents]
        changed = latents.clone()
        changed[0] += 1
        before, after = dict(self.feed), {**self.feed, self.probed.latents: changed}
        samples, found = len(latents), set()
        runs = (self._forwards(env, with_gradients=False) for env in (before, after))
        for (number, _), _ in zip(*runs, strict=True):
            for site in self.probed.seen[number]:
                for place, name in enumerate(site.values):
                    if _is_folded(before[name], after[name], samples):
                        found.add((site.name, place))
        return frozenset(found)

    @property
    def _parts(self) -> tuple[Stretch, ...]:
        return self.probed.stretches.parts

    @property
    def _results(self) -> tuple[str, ...]:
        return self.probed.stretches.results[: self.probed.count]

    def _forwards(self, env: dict[str, Tensor], with_gradients: bool) -> Iterator[tuple[int, _Run | None]]:
        """Run stretch by stretch: what each gave is in `env` until the next one has run."""
        for number, part in enumerate(self._parts):
            run = self._with_gradients(part, env) if with_gradients else None
            env |= {name: v.detach() for name, v in run.gave.items()} if run else _called(part, env)
            yield number, run
            self._drop(env, number)

    def _drop(self, env: dict[str, Tensor], number: int) -> None:
        """Forget what nobody awaits behind a stretch."""
        for name in env.keys() - self.probed.awaited[number]:
            del env[name]

    def _with_gradients(self, part: Stretch, env: Mapping[str, Tensor]) -> _Run:
        given = {name: env[name].detach() for name in part.reads}
        for value in given.values():
            if value.is_floating_point() or value.is_complex():
                value.requires_grad_()
        with torch.enable_grad(), self.autocast:
            return _Run(given, _called(part, given))

    def _backwards(self) -> Iterator[tuple[int, _Run]]:
        """The stretches with gradients, last one first: as they are held, or run again."""
        if self.held is not None:
            yield from reversed([*enumerate(self.held)])
            return
        if not self.stride:
            runs = [run for _, run in self._forwards(dict(self.feed), with_gradients=True) if run]
            while runs:
                yield len(runs) - 1, runs.pop()
            return
        kept = self._kept()
        for first, crossing in reversed([*kept.items()]):
            del kept[first]
            numbers = range(first, min(first + self.stride, len(self._parts)))
            given, env = list[dict[str, Tensor]](), {**self.feed, **crossing}
            with torch.no_grad(), self.autocast:
                for number in numbers:
                    given.append({name: env[name] for name in self._parts[number].reads})
                    if number != numbers[-1]:
                        env |= _called(self._parts[number], env)
                        self._drop(env, number)
            del env, crossing
            for number in reversed(numbers):
                yield number, self._with_gradients(self._parts[number], given.pop())

    def _kept(self) -> dict[int, dict[str, Tensor]]:
        """What stretches that stand so far apart, and those behind them, read of those before."""
        kept: dict[int, dict[str, Tensor]] = {}
        env, last = dict(self.feed), (len(self._parts) - 1) // self.stride * self.stride
        with torch.no_grad(), self.autocast:
            for number, part in enumerate(self._parts[: last + 1]):
                if number % self.stride == 0:
                    kept[number] = {name: env[name] for name in self.probed.crossing[number]}
                if number < last:
                    env |= _called(part, env)
                    self._drop(env, number)
        return kept

    def _pull(self, part: Stretch, run: _Run, known: dict[str, Tensor], varying: frozenset[str]) -> None:
        """Take the gradients of a stretch's values from those of what it gave."""
        given = [(run.gave[name], known[name]) for name in part.gives if name in known]
        given = [(value, gradient) for value, gradient in given if value.requires_grad]
        sources = self.probed.sources & run.gave.keys()
        tensors = {name: run.gave[name] for name in sources}
        tensors |= {name: value for name, value in run.given.items() if name in varying}
        tensors = {name: value for name, value in tensors.items() if value.requires_grad}
        if not given or not tensors:
            return
        roots, gradients = zip(*given, strict=True)
        pulled = torch.autograd.grad(
            roots, [*tensors.values()], gradients, retain_graph=self.held is not None, allow_unused=True
        )
        for name, gradient in zip(tensors, pulled, strict=True):
            if gradient is None:
                continue
            # a node's own gradient comes out whole, one of what was read is added to that of later readers
            known[name] = gradient if name in sources or name not in known else known[name] + gradient

    def _forget(self, number: int, values: dict[str, Tensor], known: dict[str, Tensor]) -> None:
        """Drop values and gradients that nothing before this stretch has to do with."""
        pending = self.probed.unsettled[number]
        for name in values.keys() - pending:
            del values[name]
        for name in known.keys() - pending - self.probed.crossing[number] - {*self.asked.values()}:
            del known[name]

    def _by_sample(self, site: SiteNodes, tensors: Tensors) -> Tensors:
        """The same with the samples of the latents outermost, where they can be told apart."""
        samples, folded = len(self.feed[self.probed.latents]), self.probed.folded or ()
        return tuple(
            tensor.reshape(samples, -1, *tensor.shape[1:]) if (site.name, place) in folded else tensor
            for place, tensor in enumerate(tensors)
        )


def _called(part: Stretch, env: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(part.gives, part.call(*[env[name] for name in part.reads]), strict=True))


def _of(names: Sequence[str], env: Mapping[str, Tensor]) -> Tensors:
    return tuple([env[name] for name in names])


def _is_folded(before: Tensor, after: Tensor, samples: int) -> bool:
    if not (before.dim() and len(before) > samples and len(before) % samples == 0):
        return False
    moved = (before != after).reshape(samples, -1).any(dim=1)
    return bool(moved[0] and not moved[1:].any())


def _or_zero(gradient: Tensor | None, value: Tensor) -> Tensor:
    return torch.zeros_like(value) if gradient is None else gradient
