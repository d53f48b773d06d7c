"""The conditional half of a doubled batch: the inputs that carry the batch, and a capture for half of it."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import fx, nn

from graphcache.compiler.captured import Captured
from graphcache.ir.call import CallSpec
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import Input, StepGraph, has_static_shape
from graphcache.libraries.quiet import quiet_shapes
from graphcache.passes.base import Observer
from graphcache.passes.transfer import here
from graphcache.tracing.conditions import Conditions

_SAMPLED = 1024
"""Elements of each row that are compared."""
_TOLERANCE = 0.1
"""Relative: far above what kernels round differently for another batch, far below another sample's."""


@dataclass(frozen=True)
class Rows:
    """Half of a batch: the first or the last rows of those inputs that carry it."""

    carriers: frozenset[int]
    first: bool

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """The half's rows of a value that holds the samples outermost, as a view."""
        count = value.shape[0] // 2
        return value[:count] if self.first else value[count:]

    def inputs(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The half's inputs, leaf by leaf."""
        return [self.of(tensor) if i in self.carriers else tensor for i, tensor in enumerate(tensors)]

    def shuffled(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs, but the other half has this one's values in another order, and its masks at random."""
        generator = torch.Generator().manual_seed(0)
        result = []
        for index, tensor in enumerate(tensors):
            if index in self.carriers:
                own = self.of(tensor)
                flat = own.reshape(own.shape[0], -1)
                order = torch.randperm(flat.shape[1], generator=generator).to(tensor.device)
                other = flat[:, order].view(own.shape)
                if _is_mask(own):
                    other = torch.randint(0, 2, own.shape, generator=generator).to(own)
                tensor = torch.cat([own, other] if self.first else [other, own])
            result.append(tensor)
        return result


Filled = Callable[[Sequence[torch.Tensor], Rows], Captured | None]


@dataclass(frozen=True)
class Half:
    """A step captured for half a batch, beside the one of the whole batch.

    `shared` are the hoisted values, by name, that hold no samples; of the others the half has its rows.
    `mixed` are values of the whole batch in which the samples do not lie one half after the other,
    `conditions` those of its own inputs that it is right for.
    """

    step: StepGraph
    strides: tuple[tuple[int, ...], ...]
    rows: Rows
    hoisted: frozenset[str]
    shared: frozenset[str]
    mixed: frozenset[str]
    conditions: Conditions | None = None

    def hoisted_rows(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The half's hoisted values: views of the whole batch's."""
        return {
            name: values[name] if name in self.shared else self.rows.of(values[name]) for name in self.hoisted
        }


def is_doubled(latents: Sequence[torch.Tensor]) -> bool:
    """Whether both halves of a batch are the same latents, as guidance makes them; waits for the device."""
    return all(map(_is_doubled, latents))


def _is_doubled(latents: torch.Tensor) -> bool:
    if not latents.dim() or latents.shape[0] % 2:
        return False
    first, second = latents.chunk(2)
    return torch.equal(first, second)


def is_listed_twice(latents: Sequence[torch.Tensor]) -> bool:
    """Whether the latents are a list of samples of which the second half repeats the first."""
    count = len(latents) // 2
    return len(latents) == 2 * count > 0 and all(map(torch.equal, latents[:count], latents[count:]))


def capture_half(
    model: nn.Module,
    whole: Captured,
    held: Sequence[str],
    tensors: Sequence[torch.Tensor],
    conditional: str,
    observers: Sequence[Observer] = (),
    filled: Filled | None = None,
    before: Rows | None = None,
) -> Half:
    """The step for the conditional half of a batch.

    An input carries the batch if its outermost dimension has the batch's size, or a multiple of it. Which of
    those do is tried, the likely ones first: with the right ones the model can be captured, and both graphs
    compute the same for the half's samples, whatever the other half holds.

    Args:
        model: what was captured.
        whole: the capture of the whole batch.
        held: names of its values that are computed once per generation.
        tensors: the whole batch's inputs.
        conditional: which half, "first" or "last".
        observers: told of every pass.
        filled: finds a capture without tracing at this size, where it can.
        before: what was right for another size, which is tried first.

    Raises:
        CaptureError: the half cannot run alone.
    """
    batch = tensors[whole.call.latents[0]].shape[0]
    reason = None
    guesses = [
        Rows(frozenset(carriers), conditional == "first") for carriers in _hypotheses(whole.call, tensors)
    ]
    for rows in sorted(guesses, key=lambda rows: rows != before):
        try:
            with quiet_shapes():
                inputs = [tensor.contiguous() for tensor in rows.inputs(tensors)]
                captured = (filled and filled(inputs, rows)) or whole.again(model, inputs, observers)
            return _compared(whole.step, held, captured, rows, tensors)
        except CaptureError as error:
            reason = reason or error
    raise CaptureError(
        f"row guidance: the conditional half of a batch of {batch} cannot run alone ({reason}); compute "
        "guidance at every step, or call the branches one by one, each in its model.cache_context('cond') or "
        "('uncond')"
    ) from reason


def _hypotheses(call: CallSpec, tensors: Sequence[torch.Tensor]) -> Iterator[set[int]]:
    """All inputs of the batch's size carry it; all but those of one or two arguments; larger ones as well."""
    latents = set(call.latents)
    batch = tensors[call.latents[0]].shape[0]
    outer = {i: tensor.shape[0] for i, tensor in enumerate(tensors) if tensor.dim() and i not in latents}
    likely = {i for i, size in outer.items() if size == batch}
    folded = {i for i, size in outer.items() if size % batch == 0} - likely
    yield likely | latents
    for count in (1, 2):
        for chosen in combinations(_by_argument(call, likely), count):
            yield (likely | latents).difference(*chosen)
        for chosen in combinations(_by_argument(call, folded), count):
            yield (likely | latents).union(*chosen)


def _by_argument(call: CallSpec, leaves: set[int]) -> list[set[int]]:
    """Leaves of one argument carry the batch together or not at all."""
    groups: dict[str, set[int]] = {}
    for leaf in sorted(leaves):
        groups.setdefault(re.split(r"[.\[]", call.leaf_names[leaf])[0], set()).add(leaf)
    return list(groups.values())


def _compared(
    whole: StepGraph, held: Sequence[str], captured: Captured, rows: Rows, tensors: Sequence[torch.Tensor]
) -> Half:
    """Evaluate both graphs, hold the half's values against its rows of the whole batch's."""
    half: StepGraph = captured.step
    ours, theirs = whole.nodes(), half.nodes()
    common = [name for name in held if name in theirs and has_static_shape(theirs[name])]
    pairs = [*_values(whole, half), *((name, name) for name in common)]
    inputs = rows.shuffled(tensors)
    found = _samples(whole, {name for name, _ in pairs}, inputs, rows)
    expected = _samples(half, {name for _, name in pairs}, rows.inputs(inputs), None)
    differing = {name for name, other in pairs if not _is_close(found[name].half, expected[other].whole)}
    if not differing.isdisjoint(node.name for node in whole.results()):
        raise CaptureError("its result does not hold the samples of both branches one half after the other")
    sampled = _depend(whole, rows.carriers)
    shared = {name for name in common if ours[name] not in sampled and found[name].is_close(expected[name])}
    hoisted = frozenset(set(common) - differing | shared)
    return Half(
        half,
        captured.strides,
        rows,
        hoisted,
        frozenset(shared),
        frozenset(differing - set(common)),
        captured.conditions,
    )


def _depend(step: StepGraph, leaves: frozenset[int]) -> set[fx.Node]:
    """The nodes that are computed from one of these inputs."""
    found = {node for port, node in step.ports() if isinstance(port, Input) and port.index in leaves}
    for node in step.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _values(whole: StepGraph, half: StepGraph) -> list[tuple[str, str]]:
    """Names, in both graphs, of all that may be cached and of the results."""
    if [branch.name for branch in whole.branches] != [branch.name for branch in half.branches]:
        raise CaptureError("the model has other sites when half the batch runs")
    pairs = list(zip((n.name for n in whole.results()), (n.name for n in half.results()), strict=True))
    for ours, theirs in zip(whole.branches, half.branches, strict=True):
        pairs += [(ours.value, theirs.value), (ours.merge, theirs.merge)]
    return pairs


@dataclass(frozen=True)
class _Sample:
    """Some elements of a value, of all its rows and of one half of them."""

    shape: torch.Size
    whole: torch.Tensor
    half: torch.Tensor

    def is_close(self, other: "_Sample") -> bool:
        return self.shape == other.shape and _is_close(self.whole, other.whole)


def _samples(
    step: StepGraph, names: set[str], tensors: Sequence[torch.Tensor], rows: Rows | None
) -> dict[str, _Sample]:
    """Evaluate a graph and keep a few elements of the named values."""
    kept: dict[str, _Sample] = {}

    class Sampler(fx.Interpreter):
        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            return here(step, str(target))

        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in names:
                half = rows.of(value) if rows and value.dim() else value
                kept[n.name] = _Sample(value.shape, _sample(value), _sample(half))
            return value

    try:
        with torch.no_grad():
            Sampler(step.module).run(*tensors)
    except Exception as error:
        raise CaptureError(f"the graph of half the batch fails: {error}") from error
    return kept


def _is_mask(value: torch.Tensor) -> bool:
    return not value.is_floating_point() and bool(((value == 0) | (value == 1)).all())


def _sample(value: torch.Tensor) -> torch.Tensor:
    """A few elements of each row, the same ones for values of the same shape."""
    value = torch.view_as_real(value) if value.is_complex() else value
    flat = value.reshape(value.shape[0] if value.dim() else 1, -1)
    return flat[:, :: max(1, flat.shape[1] // _SAMPLED)].double().clone()


def _is_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    ours, theirs = (torch.nan_to_num(value, nan=0.0, posinf=1e3, neginf=-1e3) for value in (ours, theirs))
    scale = ours.norm() + theirs.norm()
    return bool((ours - theirs).norm() <= _TOLERANCE * scale)
