"""Moments of bytes, against integers and against numpy in fp64."""

import numpy as np
import torch

from vaescale.nn.covariance import MIDDLE, Moments, covariance


def summed(rows: torch.Tensor, counted: torch.Tensor, batch: int) -> Moments:
    moments = Moments(rows.shape[1])
    for part, mask in zip(rows.split(batch), counted.split(batch), strict=True):
        moments.add(part, mask)
    return moments


def test_sums_are_those_of_integers_in_any_order() -> None:
    """5,000 rows of 0 and 255, the farthest from the middle: in one call, which has several chunks, or in many."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 2, (5000, 12), generator=generator).mul(255).to(torch.uint8)
    counted = torch.rand(5000, generator=generator) < 0.9
    whole = rows[counted].numpy().astype(np.int64) - MIDDLE
    shuffled = torch.randperm(5000, generator=generator)
    for moments in (
        summed(rows, counted, 5000),
        summed(rows, counted, 7),
        summed(rows[shuffled], counted[shuffled], 100),
    ):
        assert int(moments.count) == len(whole)
        assert np.array_equal(moments.sum.numpy(), whole.sum(0))
        assert np.array_equal(moments.second.numpy(), whole.T @ whole)


def test_a_large_mean_costs_no_digits() -> None:
    """Nearly white images: variances of half a grey level and less beside squares of 62,500."""
    rng = np.random.default_rng(0)
    rows = (250 + (rng.random((20_000, 10)) < rng.uniform(0.001, 0.5, 10))).astype(np.uint8)
    moments = summed(torch.from_numpy(rows), torch.ones(len(rows), dtype=torch.bool), 512)
    mean, matrix = covariance(**moments.over_ranks())
    np.testing.assert_allclose(mean, rows.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(matrix, np.cov(rows.astype(np.float64), rowvar=False), rtol=0, atol=2e-12)
