import numpy as np
import torch

from vaescale.evaluation.latents import moments, sums


def test_moments_are_numpys_over_levels_and_uneven_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse, fine = torch.randn(20, 3, generator=generator), 5 + 2 * torch.randn(20, 2, 4, 4, generator=generator)
    coarse[:, 1] = 7  # says nothing
    parts = [slice(0, 9), slice(9, 18), slice(18, 20)]
    mean, variance = moments(torch.stack([sums([coarse[part], fine[part]]) for part in parts]).sum(0), 20)
    row = np.concatenate([coarse.numpy(), fine.numpy().reshape(20, -1)], 1).astype(np.float64)
    np.testing.assert_allclose(mean, row.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variance, row.var(0), rtol=1e-12, atol=1e-12)
    assert variance[1] == 0
