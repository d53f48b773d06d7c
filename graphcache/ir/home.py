"""Weights that are kept elsewhere than on the device that computes with them."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch


@dataclass(eq=False)
class Home:
    """Where one weight is kept: in host memory or in a file.

    Attributes:
        device: what computes with it.
        unit: equal for weights that come together.
        read: gives it as it is kept.
    """

    device: torch.device
    unit: Hashable
    read: Callable[[], torch.Tensor]
