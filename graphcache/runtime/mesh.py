"""Several ranks with one plan: which part a process takes, and that all of them do the same at every call."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graphcache.compiler.backends import Backend, is_ahead, replays_cuda_graphs
from graphcache.compiler.exchanges import answered
from graphcache.ir.errors import GraphCacheError, StateError
from graphcache.ir.graph import as_bytes
from graphcache.ir.ranks import Ranks
from graphcache.libraries.torch_private import ALL_GATHER, WAIT
from graphcache.runtime.runner import BranchState

_SHARED = ("tokens", "guidance")
_SAMPLES = 64
"""Elements of each weight by which ranks tell whether theirs are the same."""


def ranks_of(
    mesh: Any, backend: Backend = None, sizes: str = "auto", streams: bool = False
) -> tuple[Ranks, ...]:
    """What the graphs have to know of a DeviceMesh.

    Raises:
        GraphCacheError: it is none, has other dimensions, or another option does not go with ranks.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise GraphCacheError(
            f"mesh= is a {type(mesh).__name__}: give torch.distributed.device_mesh.init_device_mesh(device, "
            '(ranks,), mesh_dim_names=("tokens",))'
        )
    names = mesh.mesh_dim_names or (("tokens",) if mesh.ndim == 1 else ())
    if len(names) != mesh.ndim or not set(names) <= set(_SHARED):
        raise GraphCacheError(
            f"mesh= has the dimensions {names or mesh.ndim}: mesh_dim_names= says what ranks share out, "
            '"tokens", "guidance" (the rows of the batch), or both'
        )
    if mesh.get_coordinate() is None:
        raise GraphCacheError("mesh= does not hold this process: transform the model on its ranks alone")
    if sizes == "any" or streams:
        what = 'sizes="any"' if sizes == "any" else "stream_weights=True"
        raise GraphCacheError(f"{what} does not go with mesh=: leave out one of them")
    refuse_for_ranks(backend)
    # rows first: what is behind the last block is gathered by tokens, and then by rows
    order = sorted(range(mesh.ndim), key=lambda dim: names[dim] == "tokens")
    found = [(mesh.get_group(dim), names[dim]) for dim in order]
    return tuple(
        Ranks(group.size(), group.rank(), group.group_name, "tokens" if name == "tokens" else "guidance")
        for group, name in found
        if group.size() > 1
    )


def refuse_for_ranks(backend: Backend) -> None:
    """Raise GraphCacheError if code compiled like this has no exchanges between ranks."""
    if backend is not None and (is_ahead(backend) or replays_cuda_graphs(backend)):
        raise GraphCacheError(
            f"backend={backend!r} does not go with mesh=: exchanges between ranks are no part of CUDA graphs "
            'and of code compiled ahead of time; take "inductor"'
        )


@contextmanager
def in_step(
    mesh: Sequence[Ranks], model: nn.Module, state: BranchState, slot: Any, tensors: Sequence[torch.Tensor]
) -> Iterator[None]:
    """Within, all ranks run the same step; `mesh` is empty where one process runs it.

    Raises:
        StateError: they were about to run different ones, or another rank does not answer.
    """
    if not mesh:
        yield
        return
    with answered(f"at step {state.step}"):
        agree(mesh, model, state, slot, tensors)
        yield


def refuse_gradients() -> None:
    """Raise StateError where results would have no gradients, though they are asked for."""
    if torch.is_grad_enabled():
        raise StateError(
            "a model under mesh= has no gradients: call it under torch.no_grad(); graphcache.profile and "
            "tune take mesh= themselves"
        )


def agree(
    mesh: Sequence[Ranks], model: nn.Module, state: BranchState, slot: Any, tensors: Sequence[torch.Tensor]
) -> None:
    """Raise StateError on every rank unless all ranks are at the same call of the same generation.

    The first call of a branch compares the plan, weights and all inputs, each later one the step and the
    inputs that change; a step on a budget also the tokens that were chosen for it. It waits for the device.
    """
    begins, fixed = not state.ran, {id(tensor) for tensor in state.constants}
    moving = [tensor for tensor in tensors if begins or id(tensor) not in fixed]
    lowered = (str(state.schedule), state.program.fingerprint) if begins else ()
    shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
    call = slot, state.step, lowered, shapes
    chosen = state.chosen.get(state.step, {}).values()
    places = [part.flatten() for choice in chosen for part in (choice.places, choice.clusters)]
    marks = {
        "step, branch, plan or shapes of the call": _mark([repr(call).encode()]),
        "inputs, such as latents or prompts": _mark(map(as_bytes, moving)),
        "weights": _weights(model) if begins else 0,
        "chosen tokens": _mark([as_bytes(torch.cat(places))]) if places else 0,
    }
    known = torch.tensor([[*marks.values()]], device=tensors[0].device)
    for ranks in mesh:
        known = WAIT(ALL_GATHER(known, ranks.count, ranks.group))
    same = (known == known[0]).all(0).tolist()
    differ = [name for name, agrees in zip(marks, same, strict=True) if not agrees]
    if differ:
        raise StateError(
            f"mesh=: ranks have different {differ[0]} at step {state.step}. Every rank makes the same calls "
            "with the same inputs and weights: seed generators alike, and broadcast what ranks compute each "
            "for itself"
        )


def _mark(parts: Iterable[bytes]) -> int:
    digest = hashlib.blake2b(digest_size=7)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "big")


def _weights(model: nn.Module) -> int:
    """A mark of some elements of every weight."""
    kinds = torch.Tensor, nn.Parameter, nn.Buffer
    held = [*model.parameters(), *model.buffers()]
    plain = [weight.detach() for weight in held if type(weight) in kinds and not weight.is_meta]
    return _mark(as_bytes(weight.flatten()[:: weight.numel() // _SAMPLES + 1]) for weight in plain)
