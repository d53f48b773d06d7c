"""Metrics against closed forms and re-derivations in numpy and scipy."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import correlate1d

from graphcache import GraphCacheError
from graphcache.planning.metrics import frechet_distance, ssim
from graphcache.runtime.closeness import psnr


def images(seed=0, shape=(5, 1, 16, 16)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def whitened(count, width, seed):
    """Features with mean 0 and covariance 1, exactly."""
    values = np.random.default_rng(seed).normal(size=(count, width))
    values -= values.mean(axis=0)
    factor = np.linalg.cholesky(np.linalg.inv(np.cov(values.T)))
    return torch.from_numpy(values @ factor)


def test_identical_images():
    reference = images()
    assert torch.isposinf(psnr(reference, reference)).all()
    torch.testing.assert_close(ssim(reference, reference), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("offset", [0.5, 0.02])
@pytest.mark.parametrize("data_range", [1.0, 2.0, 255.0])
def test_psnr_of_a_constant_offset(offset, data_range):
    reference = images(shape=(3, 2, 8, 8)).double()
    expected = 20 * math.log10(data_range / offset)
    torch.testing.assert_close(
        psnr(reference + offset, reference, data_range), torch.full((3,), expected, dtype=torch.float64)
    )


def test_psnr_is_per_image():
    reference = torch.zeros(2, 1, 4, 4)
    changed = reference.clone()
    changed[1, 0, 0, 0] = 2.0
    assert psnr(changed, reference).tolist() == pytest.approx([math.inf, 10 * math.log10(16)])


def test_ssim_of_constants_is_the_luminance_term():
    first, second, data_range = 0.25, -0.5, 2.0
    c1 = (0.01 * data_range) ** 2
    expected = (2 * first * second + c1) / (first**2 + second**2 + c1)
    value = ssim(torch.full((2, 1, 16, 16), first), torch.full((2, 1, 16, 16), second))
    assert value.tolist() == pytest.approx([expected] * 2, abs=1e-9)


def ssim_in_numpy(first, second, data_range, sigma):
    radius = int(3.5 * sigma + 0.5)
    window = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    window /= window.sum()

    def mean(values):
        return correlate1d(correlate1d(values, window, axis=0, mode="mirror"), window, axis=1, mode="mirror")

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    a, b = mean(first), mean(second)
    var_a, var_b, both = mean(first**2) - a**2, mean(second**2) - b**2, mean(first * second) - a * b
    return np.mean((2 * a * b + c1) * (2 * both + c2) / ((a**2 + b**2 + c1) * (var_a + var_b + c2)))


@pytest.mark.parametrize("sigma", [0.75, 1.5])
@pytest.mark.parametrize("count", [1, 3])
def test_ssim_against_numpy(sigma, count):
    first, second = images(1, (count, 1, 16, 16)), images(2, (count, 1, 16, 16))
    second = 0.7 * first + 0.3 * second
    expected = [
        ssim_in_numpy(a[0].double().numpy(), b[0].double().numpy(), 2.0, sigma)
        for a, b in zip(first, second, strict=True)
    ]
    value = ssim(first, second, sigma=sigma)
    assert value.shape == (count,)
    assert value.tolist() == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_of_gaussians_with_known_moments():
    base, scale = whitened(50, 4, 0), torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    shift = torch.tensor([1.0, 0.0, -2.0, 0.5]).double()
    other = whitened(70, 4, 1) * scale + shift
    expected = float(shift.square().sum() + (1 - scale).square().sum())
    assert frechet_distance(base, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, base) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_equal_moments_is_zero():
    assert frechet_distance(whitened(50, 4, 0), whitened(60, 4, 1)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("counts", [(40, 60), (500, 300)])
def test_frechet_distance_against_scipy(counts):
    random = np.random.default_rng(3)
    first = random.normal(size=(counts[0], 6)) @ random.normal(size=(6, 6))
    second = random.normal(size=(counts[1], 6)) @ random.normal(size=(6, 6)) + 1
    a, b = np.cov(first.T), np.cov(second.T)
    gap = first.mean(axis=0) - second.mean(axis=0)
    expected = gap @ gap + np.trace(a + b - 2 * sqrtm(a @ b).real)
    value = frechet_distance(torch.from_numpy(first), torch.from_numpy(second))
    assert value == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_with_fewer_samples_than_features():
    features = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 1) == pytest.approx(12, rel=1e-5)


def test_frechet_distance_in_one_dimension():
    first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [7.0]])
    assert frechet_distance(first, second) == pytest.approx(9 + (math.sqrt(2) - math.sqrt(18)) ** 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psnr(images(), images()[:2]), "shapes differ"),
        (lambda: psnr(images(), images(), data_range=0), "data_range=0"),
        (lambda: psnr(torch.zeros(3), torch.zeros(3)), "batch of images"),
        (lambda: ssim(images()[..., :5], images()[..., :5]), "at least 7x7"),
        (lambda: frechet_distance(torch.zeros(3, 2), torch.zeros(3, 4)), "features"),
        (lambda: frechet_distance(torch.zeros(1, 2), torch.zeros(3, 2)), "two samples"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(GraphCacheError, match=message):
        call()


def test_ssim_without_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(GraphCacheError, match=r"pip install graphcache-dit\[examples\]"):
        ssim(images(), images())
