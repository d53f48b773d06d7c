"""Writes docs/models.md: what works with every transformer class and with the pipelines of diffusers.

All of it is data of the tests, but for the presets: those are tried, and read from the page where no run is
wanted.
"""

import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
STEPS = 12
sys.path[:0] = [str(PAGE.parent.parent), str(Path(__file__).parent)]

import graphcache  # noqa: E402
from every_pipeline import PIPELINES, REFUSED_PIPELINES  # noqa: E402
from graphcache import presets  # noqa: E402
from graphcache.analysis.coverage import coverage  # noqa: E402
from graphcache.ir.errors import GraphCacheError  # noqa: E402
from inside import engine_of  # noqa: E402
from zoo.classes import KINDS  # noqa: E402
from zoo.expected import EXPECTED, REFUSED  # noqa: E402

HEAD = """# Models and pipelines

Made by `make models`. `make test` tests a few of each, which `SEED` chooses, `make test-models` all. Models
are tiny and have random weights: this page tells what is captured, found and computed, nothing about quality.

## Transformer classes

Every class among the transformers of diffusers {version}. An all-compute plan gives the untouched model's
bits, `fora` those of the untouched model with hooks that hold the outputs of its attention and MLP modules.
The branches are those of a model with two blocks of each kind. Presets: *not* are those that are refused,
*little* those that speak of less than half of the FLOPs of attention or of MLPs.

{classes}

### Refused

{refused}

## Pipelines

Under an all-compute plan each gives the untouched pipeline's bits, under `fora` those of a reference
interpreter in the same pipeline, and after `restore` the untouched pipeline's again.

{pipelines}

### Refused pipelines

{refused_pipelines}
"""


def page(taken: Mapping[str, str]) -> str:
    """The whole page, given what each class makes of the presets."""
    import diffusers

    classes = [f"| `{name}` | {EXPECTED[name].branches} | {taken[name]} |" for name in sorted(EXPECTED)]
    kinds: dict[str, list[str]] = {}
    for name, tiny in sorted(PIPELINES.items()):
        kinds.setdefault(tiny.build.kind, []).append(name)
    return HEAD.format(
        version=diffusers.__version__,
        classes="\n".join(["| class | branches | presets |", "|---|---|---|", *classes]),
        refused=_refused({name: REFUSED[name].reason for name in REFUSED}, "class"),
        pipelines=", ".join(f"`{kind}`{_times(names)}" for kind, names in sorted(kinds.items())) + ".",
        refused_pipelines=_refused(
            {tiny.build.kind: why.reason for tiny, why in REFUSED_PIPELINES.values()}, "pipeline"
        ),
    )


def _refused(reasons: Mapping[str, str], what: str) -> str:
    rows = [f"| `{name}` | {reason} |" for name, reason in sorted(reasons.items())]
    return "\n".join([f"| {what} | reason |", "|---|---|", *rows])


def _times(names: list[str]) -> str:
    return f" ({len(names)} ways)" if len(names) > 1 else ""


def taken_in(text: str) -> dict[str, str]:
    """What a page says of each class's presets."""
    return dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE))


def tried(name: str) -> str:
    """What a class makes of the presets."""
    kind = KINDS[name]
    model = graphcache.transform(kind.make(), presets.compute(STEPS), **kind.says)
    program = engine_of(model).prepare(kind.generation(1)[0])
    refused, little = [], []
    for preset in presets.names():
        plan = getattr(presets, preset)(STEPS)
        try:
            program.check(plan, "only")
        except GraphCacheError:
            refused.append(preset)
        else:
            if any(part.share < 0.5 for part in coverage(program.captured.step, plan)):
                little.append(preset)
    said = [f"not {', '.join(refused)}"] * bool(refused) + [f"little: {', '.join(little)}"] * bool(little)
    return "; ".join(said) or "all"


def main() -> None:
    logging.disable(logging.WARNING)
    with torch.no_grad():
        PAGE.write_text(page({name: tried(name) for name in sorted(EXPECTED)}))


if __name__ == "__main__":
    main()
