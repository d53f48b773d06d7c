"""`compare`: plans, presets and fewer steps on one model, by time and by quality."""

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from graphcache.compile import Backend, compile_plainly
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.ir.plantext import read_bytes
from graphcache.metrics import frechet_distance, psnr, ssim
from graphcache.sampling import Sampler, Sampling, refuse_random
from graphcache.transform import transform

Kind = Literal["preset", "searched", "fewer steps", "plain"]
KINDS: tuple[Kind, ...] = ("preset", "searched", "fewer steps", "plain")


@dataclass(frozen=True)
class Row:
    """One measured contender.

    Attributes:
        name: also that of its picture.
        kind: where it comes from; `plain` is the untouched model, which the others are compared with.
        speedup: the plain model's median time by this one's.
        psnr: dB to the plain model's results, mean over the samples; None of those themselves.
        ssim: likewise; None where results are no images of 7x7 pixels or more.
        frechet: Fréchet distance of the results' features; None where it was not measured.
        ms: milliseconds of one generation, the median.
        steps: of a generation.
        ideal: speed-up in FLOPs.
        spread: standard deviation of the generations' mean PSNR.
    """

    name: str
    kind: Kind
    speedup: float
    psnr: float | None
    ssim: float | None = None
    frechet: float | None = None
    ms: float | None = None
    steps: int | None = None
    ideal: float | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GraphCacheError(f"row {self.name}: kind={self.kind!r}; kinds are {', '.join(KINDS)}")


def load_rows(path: str | os.PathLike[str]) -> tuple[Row, ...]:
    """Read what `graphcache compare --output` wrote.

    Raises:
        GraphCacheError: the file holds something else.
    """
    try:
        return tuple(msgspec.json.decode(read_bytes(path), type=list[Row]))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise GraphCacheError(f"{os.fspath(path)}: no comparison in JSON: {error}") from None


def compare(
    model_or_pipe: Any,
    plans: Mapping[str, Plan],
    samples: Sequence[Any],
    *,
    steps: int,
    sampler: Sampler | None = None,
    fewer: Mapping[str, tuple[Sampler | None, int]] | None = None,
    backend: Backend = "inductor",
    timestep: str = "timestep",
    data_range: float = 2.0,
    features: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Row, ...]:
    """Time whole generations, interleaved, and measure results against the plain model's.

    Args:
        model_or_pipe: as for `graphcache.profile`.
        plans: contenders by name.
        samples: one generation each; take others than were profiled or tuned on.
        steps: of the plain model's generation.
        sampler: runs a bare module through a generation.
        fewer: the plain model with other numbers of steps, by name: a sampler, None for the same, and steps.
        backend: compiles the plain model and the plans' phases.
        timestep: the name of the timestep argument.
        data_range: largest minus smallest value of a result.
        features: results -> (N, D), for Fréchet distances.
        progress: told what is done now.

    Raises:
        GraphCacheError: the sampler is random, or a plan does not fit.
    """
    if not samples:
        raise GraphCacheError("samples is empty: a comparison needs at least one")
    sampling = Sampling.of(model_or_pipe, sampler)
    refuse_random(sampling, samples[0], steps)
    plain = compile_plainly(sampling.model, backend)
    runs: dict[str, Callable[[Any], Tensor]] = {}
    made: dict[str, Any] = {}
    runs["plain"] = lambda sample: sampling.generate(plain, sample, steps)  # type: ignore[arg-type]
    for name, plan in plans.items():
        made[name] = transform(sampling.model, plan, backend=backend, timestep=timestep)
        runs[name] = _run(sampling, made[name], steps)
    for name, (other, count) in (fewer or {}).items():
        solver = Sampling(sampling.model, other or sampling.sampler, sampling.pipe)
        runs[name] = _run(solver, plain, count)
    counts = {name: count for name, (_, count) in (fewer or {}).items()}
    for name, run in runs.items():
        progress(f"compiling {name}")
        run(samples[0])
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, list[Tensor]] = {name: [] for name in runs}
    for turn, sample in enumerate(samples):
        progress(f"sample {turn + 1} of {len(samples)}")
        for name in random.Random(turn).sample(list(runs), len(runs)):
            start = time.perf_counter()
            result = runs[name](sample)
            if result.is_cuda:
                torch.cuda.synchronize(result.device)
            seconds[name].append(time.perf_counter() - start)
            results[name].append(result)
    rows = []
    for name in runs:
        count = counts.get(name, steps)
        ideal, kind = steps / count, _kind(name, plans, counts)
        if name in made:
            ideal = made[name].summary().branches[0].ideal_speedup
        spent = statistics.median(seconds[name])
        row = Row(name, kind, statistics.median(seconds["plain"]) / spent, None)
        if kind != "plain":
            row = _judged(row, results[name], results["plain"], data_range, features)
        rows.append(replace(row, ms=1e3 * spent, steps=count, ideal=ideal))
    return tuple(rows)


def _kind(name: str, plans: Mapping[str, Plan], counts: Mapping[str, int]) -> Kind:
    if name in counts:
        return "fewer steps"
    if name not in plans:
        return "plain"
    return "searched" if plans[name].preset is None else "preset"


def _run(sampling: Sampling, model: Any, steps: int) -> Callable[[Any], Tensor]:
    return lambda sample: sampling.generate(model, sample, steps)


def _judged(
    row: Row,
    results: Sequence[Tensor],
    references: Sequence[Tensor],
    data_range: float,
    features: Callable[[Tensor], Tensor] | None,
) -> Row:
    pairs = list(zip(results, references, strict=True))
    means = [float(psnr(result, target, data_range).mean()) for result, target in pairs]
    made, wanted = _frames(torch.cat(list(results))), _frames(torch.cat(list(references)))
    alike = None
    if made.dim() == 4 and min(made.shape[-2:]) >= 7:
        alike = float(ssim(made, wanted, data_range).mean())
    distance = None if features is None else frechet_distance(features(made), features(wanted))
    mean, spread = statistics.fmean(means), statistics.pstdev(means)
    return replace(row, psnr=mean, spread=spread, ssim=alike, frechet=distance)


def _frames(results: Tensor) -> Tensor:
    """Images as they are; clips (N, C, T, H, W) frame by frame."""
    return results.transpose(1, 2).flatten(0, 1) if results.dim() == 5 else results
