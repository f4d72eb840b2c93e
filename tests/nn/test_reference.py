"""The EMA quantiser against that of vector-quantize-pytorch, fed the same batches."""

import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import VectorQuantize

from tests.nn.test_quantize import batches, place_codes
from vaescale.nn.codebook import LAPLACE
from vaescale.nn.quantize import Config, VectorQuantizer


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_codebook_is_that_of_vector_quantize_pytorch(metric: str) -> None:
    """100 steps from the same codebook, no k-means, no resets. Both begin with counts of one and the codes as sums,
    smooth counts by Laplace's rule with the same ε, and with the cosine metric normalise rows before they are summed
    and codes after the division, never the sums.

    They differ in when codes move: theirs in `forward`, ours in `update`; here once after each forward. And ours begin
    with step 1, after the initialisation of step 0, of which theirs have none.
    """
    generator = torch.Generator().manual_seed(1)
    codebook = 3 * torch.randn(32, 8, generator=generator)
    if metric == "cosine":
        codebook = F.normalize(codebook, dim=1)
    ours = VectorQuantizer(Config(codebook_size=32, dim=8, ema_decay=0.9, metric=metric, reset_every=0))
    place_codes(ours, codebook)
    theirs = VectorQuantize(8, 32, decay=0.9, eps=LAPLACE, use_cosine_sim=metric == "cosine", threshold_ema_dead_code=0)
    theirs.codebook = codebook
    theirs._codebook.embed_avg.copy_(codebook)  # `codebook` sets the codes alone
    for step, z in enumerate(batches(100, 400, 8), start=1):
        codes = ours(z).codes
        ours.update(step, lr=0.0)
        assert torch.equal(codes, theirs(z)[1]), step
        # Codes are of order 1: the absolute part is for entries that happen to lie near zero.
        torch.testing.assert_close(ours.codebook, theirs.codebook, rtol=1e-5, atol=1e-6)
    assert (ours.codebook - codebook).norm() > 1  # codes moved
    torch.testing.assert_close(ours.learner.counts, theirs._codebook.cluster_size[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.learner.sums, theirs._codebook.embed_avg[0], rtol=1e-5, atol=1e-5)
