"""One evaluation as a function of its inputs: stretch by stretch, forwards and on the way back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphcache.compiler.exchanges import is_first, total
from graphcache.compiler.stretches import Stretch
from graphcache.ir.graph import Input, Output
from graphcache.ir.history import OUTPUT
from graphcache.ir.ranks import Ranks
from graphcache.planning.holdings import Holding, Rows
from graphcache.planning.in_stretches import InStretches, SiteNodes

Tensors = tuple[Tensor, ...]


class _Run(NamedTuple):
    """A stretch that was run with gradients: what it was given, detached, and what it gave."""

    given: dict[str, Tensor]
    gave: dict[str, Tensor]


def _unseen(*given: object) -> None:
    """Nobody looks."""


@dataclass
class Evaluation:
    """One evaluation as a function of its inputs.

    Attributes:
        graph: what is evaluated.
        feed: the graph's inputs by name.
        asked: by their numbers among the inputs of whoever asks, the placeholders of those with a gradient.
        autocast: the state that it runs under.
        stride: stretches between those whose inputs are kept on the way back, where all run again; 0 if all
            of them with what their gradients need.
        repeats: whether there may be several ways back.
        mesh: the ranks that share it, each of which runs its part. The gradients of the results, and of the
            call's tensors, are the same on all of them; those within add up, see `exchanges`.
        saw: told of every site, its values, and the rank's parts of them on the way forwards.
        pulled: told of every site, its values, their gradients and their rows on the way back, last first.
        held: its stretches with what their gradients need, or None: then they are run again.
    """

    graph: InStretches
    feed: dict[str, Tensor]
    asked: Mapping[int, str]
    autocast: torch.autocast
    stride: int = 1
    repeats: bool = True
    mesh: Sequence[Ranks] = ()
    saw: Callable[[str, Tensors, Sequence[Holding]], None] = _unseen
    pulled: Callable[[str, Tensors, Tensors, Sequence[Rows]], None] = _unseen
    held: list[_Run] | None = None

    def run(self, hold: bool) -> list[Tensor]:
        """The results; every site is seen. What is held is there for the way back."""
        runs = list[_Run]()
        env = dict(self.feed)
        for number, run in self._forwards(env, hold):
            runs += [run] if run else []
            for site in self.graph.seen[number]:
                self.saw(site.name, self._joined(site, _of(site.values, env)), site.holdings)
        self.held = runs if hold else None
        return [env[name] for name in self.graph.results]

    def back(self, gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """The gradients of what was asked for, from those of the results; every site's is seen."""
        known: dict[str, Tensor] = {}
        outputs = self.graph.runnable.step.outputs[: self.graph.count]
        for port, name, gradient in zip(outputs, self.graph.results, gradients, strict=True):
            if gradient is not None:
                share = self._own(gradient) if isinstance(port, Output) else gradient
                known[name] = known[name] + share if name in known else share
        values: dict[str, Tensor] = {}
        for number, run in self._backwards():
            self._pull(self._parts[number], run, known)
            values |= {name: value.detach() for name, value in run.gave.items()}
            del run
            for site in self.graph.pulled[number]:
                own = {**self.feed, **values}
                found = _of(site.values, own)
                pulled = tuple([_or_zero(known.get(name), own[name]) for name in site.sources])
                rows = self._rows(site, found)
                found, pulled = (self._by_sample(site, tensors, rows) for tensors in (found, pulled))
                rows = rows if len(found) == len(rows) else [Rows.of(tensor) for tensor in found]
                self.pulled(site.name, found, pulled, rows)
            self._forget(number, values, known)
        given = {number: name for number, name in self.asked.items() if name in known}
        return {number: self._summed(name, known[name]) for number, name in given.items()}

    def _own(self, gradient: Tensor) -> Tensor:
        """A rank's share of a gradient that all of them have."""
        return gradient if is_first(self.mesh) else torch.zeros_like(gradient)

    def _summed(self, name: str, gradient: Tensor) -> Tensor:
        """The whole gradient of one of the call's tensors; others than these stay as they are."""
        ports = dict(zip(self.graph.stretches.inputs, self.graph.runnable.step.inputs, strict=True))
        return total(gradient, self.mesh) if isinstance(ports[name], Input) else gradient

    def folding(self) -> frozenset[tuple[str, int]]:
        """The tensors, by site and place, of which every sample has several rows in a row: those whose first
        rows alone move when the first sample's latents do.
        """
        first, *others = self.graph.latents
        changed = self.feed[first].clone()
        (changed if others else changed[0]).add_(1)
        before, after = dict(self.feed), {**self.feed, first: changed}
        samples, moved = self._samples, dict[tuple[str, int], Tensor]()
        runs = (self._forwards(env, with_gradients=False) for env in (before, after))
        for (number, _), _ in zip(*runs, strict=True):
            for site in self.graph.seen[number]:
                for place, name in enumerate(site.values):
                    rows = Rows.of(before[name], _holding(site, place))
                    if rows.amount > samples and rows.amount % samples == 0:
                        moved[site.name, place] = _moved(before[name], after[name], rows)
        if not moved:
            return frozenset()
        flags, sizes = total(torch.cat([*moved.values()]), self.mesh), [*map(len, moved.values())]
        apart = torch.split_with_sizes(flags, sizes)
        grouped = [rows.reshape(samples, -1).any(1).tolist() for rows in apart]
        pairs = zip(moved, grouped, strict=True)
        return frozenset(key for key, (first, *others) in pairs if first and not any(others))

    @property
    def _parts(self) -> tuple[Stretch, ...]:
        return self.graph.stretches.parts

    @property
    def _stays(self) -> bool:
        """Whether what is held is needed once more."""
        return self.repeats and self.held is not None

    @property
    def _varying(self) -> frozenset[str]:
        return self.graph.varying(self.asked.values())

    def _forwards(self, env: dict[str, Tensor], with_gradients: bool) -> Iterator[tuple[int, _Run | None]]:
        """Run stretch by stretch: what each gave is in `env` until the next one has run."""
        for number, part in enumerate(self._parts):
            run = self._with_gradients(part, env) if with_gradients else None
            env |= {name: v.detach() for name, v in run.gave.items()} if run else _called(part, env)
            yield number, run
            self._drop(env, number)

    def _drop(self, env: dict[str, Tensor], number: int) -> None:
        """Forget what nobody awaits behind a stretch."""
        for name in env.keys() - self.graph.awaited[number]:
            del env[name]

    def _with_gradients(self, part: Stretch, env: Mapping[str, Tensor]) -> _Run:
        given = {name: env[name].detach() for name in part.reads}
        for name in self._varying & given.keys():
            if given[name].is_floating_point() or given[name].is_complex():
                given[name].requires_grad_()
        with torch.enable_grad(), self.autocast:
            return _Run(given, _called(part, given))

    def _backwards(self) -> Iterator[tuple[int, _Run]]:
        """The stretches with gradients, last one first: as they are held, or run again."""
        runs = self.held
        if runs is None and not self.stride:
            runs = [run for _, run in self._forwards(dict(self.feed), with_gradients=True) if run]
        if runs is not None:
            runs = [*runs] if self._stays else runs
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
                    kept[number] = {name: env[name] for name in self.graph.crossing[number]}
                if number < last:
                    env |= _called(part, env)
                    self._drop(env, number)
        return kept

    def _pull(self, part: Stretch, run: _Run, known: dict[str, Tensor]) -> None:
        """Take the gradients of a stretch's values from those of what it gave."""
        given = [(run.gave[name], known[name]) for name in part.gives if name in known]
        given = [(value, gradient) for value, gradient in given if value.requires_grad]
        sources = self.graph.sources & run.gave.keys()
        tensors = {name: run.gave[name] for name in sources}
        tensors = {name: value for name, value in (tensors | run.given).items() if value.requires_grad}
        if not given or not tensors:
            return
        roots, gradients = zip(*given, strict=True)
        pulled = torch.autograd.grad(
            roots, [*tensors.values()], gradients, retain_graph=self._stays, allow_unused=True
        )
        for name, gradient in zip(tensors, pulled, strict=True):
            if gradient is None:
                continue
            # a node's own gradient comes out whole, one of what was read is added to that of later readers
            known[name] = gradient if name in sources or name not in known else known[name] + gradient

    def _forget(self, number: int, values: dict[str, Tensor], known: dict[str, Tensor]) -> None:
        """Drop values and gradients that nothing before this stretch has to do with."""
        pending = self.graph.unsettled[number]
        for name in values.keys() - pending:
            del values[name]
        for name in known.keys() - pending - self.graph.crossing[number] - {*self.asked.values()}:
            del known[name]

    def _by_sample(self, site: SiteNodes, tensors: Tensors, rows: Sequence[Rows]) -> Tensors:
        """The same with the samples of the latents outermost, where they can be told apart."""
        folded = self.graph.folded or ()
        pairs = zip(tensors, rows, strict=True)
        apart = tuple(
            tensor.reshape(len(own), -1, *tensor.shape[1:]) if (site.name, place) in folded else tensor
            for place, (tensor, (_, own)) in enumerate(pairs)
        )
        return self._joined(site, apart)

    def _rows(self, site: SiteNodes, tensors: Tensors) -> list[Rows]:
        """Those of a site's tensors; the rows of a sample are one where there are several."""
        folded, found = self.graph.folded or (), list[Rows]()
        for place, tensor in enumerate(tensors):
            rows = Rows.of(tensor, _holding(site, place))
            found.append(rows.of_samples(self._samples) if (site.name, place) in folded else rows)
        return found

    @property
    def _samples(self) -> int:
        """How many there are in the latents."""
        names = self.graph.latents
        return len(names) if len(names) > 1 else len(self.feed[names[0]])

    def _joined(self, site: SiteNodes, tensors: Tensors) -> Tensors:
        """The same with results that are a list, as the latents are, as one tensor."""
        listed = len(self.graph.latents)
        alike = len({tensor.shape for tensor in tensors}) == 1
        if site.name == OUTPUT and alike and len(tensors) == listed > 1:
            return (torch.stack(tensors),)
        return tensors


def in_stretches(
    graph: InStretches, fed: Sequence[Tensor], stride: int, hold: bool, mesh: Sequence[Ranks] = ()
) -> Tensors:
    """A graph's results, with gradients for what it is fed that is computed.

    Args:
        graph: what is run, once forwards and once back.
        fed: one tensor for each of its inputs.
        stride: as for `Evaluation`.
        hold: whether what its gradients need is held.
        mesh: the ranks that share it.
    """
    names = graph.stretches.inputs
    asked = {place: names[place] for place, tensor in enumerate(fed) if tensor.grad_fn is not None}
    feed = {name: tensor.detach() for name, tensor in zip(names, fed, strict=True)}
    evaluation = Evaluation(graph, feed, asked, ambient(fed[0]), stride, repeats=False, mesh=mesh)
    results: Tensors = _InStretches.apply(evaluation, hold, *fed)  # type: ignore[no-untyped-call]
    return results


class _InStretches(torch.autograd.Function):
    """An evaluation without its graph, which is held, or made again on the way back."""

    @staticmethod
    def forward(ctx: Any, evaluation: Evaluation, hold: bool, *fed: Tensor) -> Tensors:
        ctx.set_materialize_grads(False)
        ctx.evaluation, ctx.amount = evaluation, len(fed)
        # autograd notes itself at what it is given, which may be what was fed
        return tuple([result.detach() for result in evaluation.run(hold)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        found = ctx.evaluation.back(gradients)
        return None, None, *(found.get(place) for place in range(ctx.amount))


def ambient(like: Tensor) -> torch.autocast:
    """The present state of autocast for a tensor's device, to be entered again."""
    kind = like.device.type
    enabled = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, torch.get_autocast_dtype(kind) if enabled else None, enabled)


def _called(part: Stretch, env: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(part.gives, part.call(*[env[name] for name in part.reads]), strict=True))


def _of(names: Sequence[str], env: Mapping[str, Tensor]) -> Tensors:
    return tuple([env[name] for name in names])


def _holding(site: SiteNodes, place: int) -> Holding | None:
    return site.holdings[place] if site.holdings else None


def _moved(before: Tensor, after: Tensor, rows: Rows) -> Tensor:
    """1 for every row of the whole in which two tensors differ."""
    found = before.new_zeros(rows.amount, dtype=torch.int32)
    found[list(rows.own)] = (before != after).reshape(len(rows.own), -1).any(dim=1).int()
    return found


def _or_zero(gradient: Tensor | None, value: Tensor) -> Tensor:
    return torch.zeros_like(value) if gradient is None else gradient
