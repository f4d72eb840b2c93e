"""Noise that only the seed and the sample number decide."""

import numpy as np
import scipy.stats
import torch

from vaescale.data import order
from vaescale.nn import noise


def test_the_hash_is_that_of_the_data_order() -> None:
    g = np.array([0, 1, 7, 2**40, 2**62])
    words = noise.mix(3, 1, torch.from_numpy(g)[:, None], torch.arange(9)).numpy()
    assert np.array_equal(words.view(np.uint64), order.mix(3, 1, g[:, None], np.arange(9)))


def test_a_sample_draws_the_same_in_any_batch() -> None:
    together = noise.normal(torch.arange(100, 112), (3, 4), 5, 0)
    for part in (slice(0, 1), slice(4, 12), slice(11, 12)):
        torch.testing.assert_close(noise.normal(torch.arange(100, 112)[part], (3, 4), 5, 0), together[part])


def test_it_is_normal_and_independent_over_samples_places_and_keys() -> None:
    draws = torch.stack([noise.normal(torch.arange(2000), (8,), seed, key) for seed in (0, 1) for key in (0, 1)])
    assert scipy.stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
    columns = draws.permute(0, 2, 1).reshape(32, 2000)
    correlations = torch.corrcoef(torch.cat([columns[:, 1:], columns[:, :-1]])) - torch.eye(64)
    assert correlations.abs().max() < 5.5 / 2000**0.5  # 2016 pairs of independent numbers stay below 4.5 of 1/√n


def test_uniform_is_uniform_and_never_an_end() -> None:
    draws = noise.uniform(torch.arange(50_000), (), 2, 1)
    assert draws.shape == (50_000,)
    assert 0 < draws.min() < draws.max() < 1
    assert scipy.stats.kstest(draws.numpy(), "uniform").pvalue > 1e-3
