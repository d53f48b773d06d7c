"""``python -m examples.demo``: find a plan for a model, and sample three models under several plans."""

from __future__ import annotations

import argparse
import shutil
import warnings
from pathlib import Path

from rich.console import Console

from examples.demo.images import image_part
from examples.demo.part import Extent
from examples.demo.video import video_part
from examples.demo.words import word_part

README_IMAGES = Path(__file__).parents[2] / "docs" / "images"
PARTS = {"images": image_part, "video": video_part, "words": word_part}


def main() -> None:
    arguments = _parse_arguments()
    # torch's own compile cache triggers it; nothing here or in the model can change that.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    console = Console()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or PARTS:
        part = PARTS[name](Extent(arguments.small, arguments.presets), arguments.output, console)
        written = part.run(arguments.output, arguments.seed, console)
        if arguments.readme:
            README_IMAGES.mkdir(parents=True, exist_ok=True)
            written.append(Path(shutil.copy(written[0], README_IMAGES)))
        console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--small", action="store_true", help="fewer samples and rounds")
    parser.add_argument("--presets", action="store_true", help="also FasterCache, PAB and ToCa; takes longer")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="leave the other parts out")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0, help="of the noise of the first round")
    parser.add_argument("--readme", action="store_true", help="also write the pictures in docs/images")
    return parser.parse_args()


if __name__ == "__main__":
    main()
