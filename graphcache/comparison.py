"""`compare`: plans, presets and fewer steps on one model, by time and by quality."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from graphcache.compile import Backend, compile_plainly
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.metrics import frechet_distance, psnr, ssim
from graphcache.sampling import Sampler, Sampling, refuse_random
from graphcache.transform import transform

Kind = Literal["plain", "plan", "fewer steps"]


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        steps: of a generation.
        seconds: of a generation, the median.
        speedup: the plain model's median by this one.
        ideal: the same ratio in FLOPs.
        psnr: mean over the samples to the plain model's results, in decibels; None of those themselves.
        spread: standard deviation of the generations' means.
        ssim: likewise; None where results are no images of 7x7 pixels or more.
        frechet: distance of the results' features to those of the plain results; None without features.
    """

    name: str
    kind: Kind
    steps: int
    seconds: float
    speedup: float
    ideal: float
    psnr: float | None
    spread: float | None
    ssim: float | None
    frechet: float | None


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
        ideal = steps / count
        if name in made:
            ideal = made[name].summary().branches[0].ideal_speedup
        kind: Kind = "plan" if name in made else "fewer steps" if name in counts else "plain"
        spent = statistics.median(seconds[name])
        speedup = statistics.median(seconds["plain"]) / spent
        quality = _quality(results[name], results["plain"], data_range, features)
        rows.append(
            Row(name, kind, count, spent, speedup, ideal, *(quality if name != "plain" else [None] * 4))
        )
    return tuple(rows)


def _run(sampling: Sampling, model: Any, steps: int) -> Callable[[Any], Tensor]:
    return lambda sample: sampling.generate(model, sample, steps)


def _quality(
    results: Sequence[Tensor],
    references: Sequence[Tensor],
    data_range: float,
    features: Callable[[Tensor], Tensor] | None,
) -> tuple[float, float, float | None, float | None]:
    """PSNR, its spread over generations, SSIM and Fréchet distance."""
    pairs = list(zip(results, references, strict=True))
    means = [float(psnr(result, target, data_range).mean()) for result, target in pairs]
    made, wanted = _frames(torch.cat(list(results))), _frames(torch.cat(list(references)))
    alike = None
    if made.dim() == 4 and min(made.shape[-2:]) >= 7:
        alike = float(ssim(made, wanted, data_range).mean())
    distance = None if features is None else frechet_distance(features(made), features(wanted))
    return statistics.fmean(means), statistics.pstdev(means), alike, distance


def _frames(results: Tensor) -> Tensor:
    """Images as they are; clips (N, C, T, H, W) frame by frame."""
    return results.transpose(1, 2).flatten(0, 1) if results.dim() == 5 else results
