"""Another process, which imports what the tests import."""

import os
import subprocess
import sys


def printed(text: str, *arguments: str, seed: int = 1) -> list[str]:
    """The words that it prints; its sets have the order of the seed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": str(seed)}
    command = [sys.executable, "-c", text, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.split()
