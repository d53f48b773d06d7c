"""Serve a diffusers pipeline under a plan.

python -m examples.server FOLDER --plan plan.txt [--call '{"height": 512, "width": 512}'] [--port 8000]
python -m examples.server FOLDER --plan taylorseer:20:interval=3
curl -N localhost:8000/pictures -H 'Content-Type: application/json' -d '{"prompt": "a fox", "seed": 1}'
"""

import argparse
import json

import uvicorn
from diffusers import DiffusionPipeline

from examples.server.app import application
from examples.server.studio import Studio
from graphcache.presets.written import plan_argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--plan", required=True, help="a file, or preset:steps[:key=value,…]")
    parser.add_argument("--steps", type=int, help="of a preset, where it does not say")
    parser.add_argument("--call", type=json.loads, default={}, help="arguments of every call, as JSON")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--workers", type=int, default=2, help="generations at a time")
    parser.add_argument("--waiting", type=int, default=8, help="requests that may wait; more are refused")
    parser.add_argument("--every", type=int, default=5, help="steps between previews; 0 for none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(given.folder, local_files_only=True).to(given.device)
    plan = plan_argument(given.plan, given.steps)
    studio = Studio(pipe, plan, given.backend, given.workers, given.waiting, given.every)
    uvicorn.run(application(studio, given.call), host="127.0.0.1", port=given.port)


if __name__ == "__main__":
    main()
