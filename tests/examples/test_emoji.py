"""How the emoji model's pictures are judged."""

import torch

from examples.emoji.evaluate import ranks


def test_a_rank_is_the_number_of_closer_emoji() -> None:
    emoji = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    pictures = torch.tensor([0.1, 0.1, 0.9]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert ranks(pictures, emoji, torch.tensor([0, 2, 0])).tolist() == [0, 2, 1]
