"""The judge of clips: it finds the digit of a frame wherever it is, and reads it."""

import torch

from examples.digits.data import load_split
from examples.digits.model import load_classifier
from examples.moving_digits.data import Clips
from examples.moving_digits.evaluate import clip_quality, digits_of


def test_held_out_clips_are_read_right() -> None:
    clips, labels = Clips(load_split("held_out")).batch(32, torch.Generator().manual_seed(7))
    classifier = load_classifier()
    right, wrong = (clip_quality(classifier, clips, asked) for asked in (labels, (labels + 1) % 10))
    assert right.accuracy > 0.98
    assert wrong.accuracy < 0.02
    noise = clip_quality(classifier, torch.rand_like(clips) * 2 - 1, labels)
    assert noise.frechet_distance > 3 * right.frechet_distance


def test_a_digit_is_cut_out_wherever_it_is() -> None:
    clips = torch.full((1, 1, 2, 32, 32), -1.0)
    shape = torch.rand(18, 18, generator=torch.Generator().manual_seed(0))
    clips[0, 0, 0, 2:20, 3:21] = clips[0, 0, 1, 11:29, 9:27] = shape
    first, second = digits_of(clips)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
