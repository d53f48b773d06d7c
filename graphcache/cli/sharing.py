"""Who works: a cluster's workers, each with samples of its own, or ranks that share every evaluation."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer

from graphcache.cli.console import console
from graphcache.ir.errors import GraphCacheError
from graphcache.planning.cluster import Cluster
from graphcache.presets.written import assignment
from graphcache.runtime.mesh import ranks_of

Ray = Annotated[
    str | None,
    typer.Option(help="shard over a Ray cluster: local, auto or host:port", metavar="ADDRESS"),
]
Mesh = Annotated[
    str | None,
    typer.Option(
        help="under torchrun: what its processes share out, tokens, guidance, or guidance=2,tokens=2",
        metavar="NAMES",
    ),
]


@contextmanager
def spread(mesh: str | None, ray: str | None, device: str | None) -> Iterator[tuple[Any, Any]]:
    """The DeviceMesh whose ranks share every evaluation, or None, and what maps functions over items.

    Raises:
        GraphCacheError: both are asked for, or what they need is not there.
    """
    with _shared(mesh, ray, device) as ranks, _mapping(ray, device) as run:
        yield ranks, run


@contextmanager
def _shared(names: str | None, ray: str | None, device: str | None) -> Iterator[Any]:
    """The DeviceMesh of torchrun's processes; None where nothing is shared. The first of them speaks.

    Raises:
        GraphCacheError: torchrun has started none, or others than are named.
    """
    if names is None:
        yield None
        return
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    if ray is not None:
        raise GraphCacheError(
            "--ray spreads samples over workers, each on one device, and --mesh shares each sample among "
            "ranks: leave out one of them"
        )
    if device is not None and ":" in device:
        raise GraphCacheError(f"--device {device}: ranks have devices of their own; leave the number out")
    if not distributed.is_torchelastic_launched():
        raise GraphCacheError(
            f"--mesh {names}: the ranks are processes that torchrun starts: torchrun --nproc-per-node 2 "
            "--module graphcache …"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group()
    quiet = console.quiet
    try:
        sizes = _sizes(names, distributed.get_world_size())
        kind = "cuda" if device is not None and device.startswith("cuda") else "cpu"
        mesh = init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        ranks_of(mesh)  # refuses other names
        console.quiet = distributed.get_rank() > 0
        yield mesh
    finally:
        console.quiet = quiet
        distributed.destroy_process_group()


@contextmanager
def _mapping(ray: str | None, device: str | None) -> Iterator[Any]:
    """What maps functions over items: a cluster, or this process."""
    if ray is None:
        yield map
        return
    if device is not None and ":" in device:
        raise GraphCacheError(f"--device {device}: workers have devices of their own; leave the number out")
    with Cluster(ray, gpus_per_task=int(device == "cuda")) as cluster:
        yield cluster.map


def _sizes(names: str, processes: int) -> dict[str, int]:
    """Ranks by what they share out."""
    sizes = {names: processes}
    if "=" in names or "," in names:
        given = dict(map(assignment, names.split(",")))
        sizes = {name: size for name, size in given.items() if isinstance(size, int) and size > 0}
        if sizes != given:
            raise GraphCacheError(f"--mesh {names}: say of each how many ranks, such as guidance=2,tokens=2")
    if math.prod(sizes.values()) != processes:
        raise GraphCacheError(f"--mesh {names}: torchrun has started {processes} processes, which are others")
    return sizes
