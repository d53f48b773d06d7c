"""Models that take turns in a generation: each begins with empty caches where it takes over."""

from collections.abc import Sequence

import numpy as np


def turns(steps: int, handovers: Sequence[int]) -> np.ndarray:
    """int (steps,): how many handovers lie behind each step's beginning.

    Steps of one number can read each other's values; those of two are of two models, or of one that was away.

    Args:
        steps: of the generation.
        handovers: the steps at which another model takes over, in their order.
    """
    return np.searchsorted(handovers, np.arange(steps), side="right")
