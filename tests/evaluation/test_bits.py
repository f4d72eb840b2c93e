"""Bounds in bits per subpixel, compared with a linear-Gaussian codec of known log-likelihood."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from tests.conftest import Start, finish, ranks, samples
from vaescale import distributed
from vaescale.data import stream
from vaescale.data.shards import write
from vaescale.evaluation.evaluate import evaluate
from vaescale.evaluation.metrics.bits import bits
from vaescale.interfaces import Batch, Bound

SIZE, LATENTS, NOISE = 16, 5, 0.2
PIXELS = 3 * SIZE**2


class Linear:
    """x/255 ~ N(W z + 1/2, NOISE² I), z ~ N(0, I), in float64; its posterior is the exact one moved by `off` posterior
    deviations. One latent moves nothing."""

    def __init__(self, off: float) -> None:
        self.off = off
        self.weight = torch.from_numpy(np.random.default_rng(0).normal(0, 0.05, (PIXELS, LATENTS)))
        self.weight[:, 0] = 0
        precision = torch.eye(LATENTS, dtype=torch.float64) + self.weight.T @ self.weight / NOISE**2
        self.covariance = torch.linalg.inv(precision)
        self.root = torch.linalg.cholesky(self.covariance)

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[torch.Tensor]:
        v = batch.x.flatten(1).double() / 255
        mean = (v - 0.5) @ self.weight @ self.covariance / NOISE**2
        return [mean + self.off * self.covariance.diagonal().sqrt()]

    def decode(self, latents: list[torch.Tensor], condition: object = None) -> torch.Tensor:
        return (latents[0] @ self.weight.T + 0.5).view(-1, 3, SIZE, SIZE)

    def bound(self, batch: Batch, draw: int = 0) -> Bound:
        (mean,) = self.encode(batch)
        epsilon = torch.stack([_noise(int(sample), draw) for sample in batch.sample])
        z = mean + epsilon @ self.root.T
        error = batch.x.double() / 255 - self.decode([z])
        density = -(error.flatten(1).square() / NOISE**2 + math.log(2 * math.pi * NOISE**2)).sum(1) / 2
        deviations = self.root.diagonal().log().sum()
        log_q = -epsilon.square().sum(1) / 2 - deviations
        rate = (mean.square().sum(1) + self.covariance.trace() - LATENTS) / 2 - deviations
        return Bound(-density, rate[None], -z.square().sum(1) / 2 - log_q)

    def exact(self, x: torch.Tensor) -> np.ndarray:
        """Returns log p(x) in nats, computed by scipy."""
        covariance = self.weight.numpy() @ self.weight.numpy().T + NOISE**2 * np.eye(PIXELS)
        return multivariate_normal(np.full(PIXELS, 0.5), covariance).logpdf(x.flatten(1).numpy() / 255)


def _noise(sample: int, draw: int) -> torch.Tensor:
    return torch.randn(LATENTS, generator=torch.Generator().manual_seed(1000 * draw + sample), dtype=torch.float64)


@pytest.fixture
def slices(pictures: Path) -> stream.ValidationSlices:
    return stream.ValidationSlices(stream.Config(root=str(pictures), size=SIZE, workers=0))


@pytest.fixture
def batch(slices: stream.ValidationSlices) -> Batch:
    return slices[range(11)].batch


def nats(values: torch.Tensor) -> np.ndarray:
    return values.numpy() * PIXELS * math.log(2)


@pytest.mark.parametrize("draws", [1, 7])
def test_with_the_exact_posterior_both_bounds_are_the_likelihood(batch: Batch, draws: int) -> None:
    codec = Linear(off=0.0)
    exact = -codec.exact(batch.x)
    values = bits(codec, batch, draws)
    assert ("bits_per_dim_iw" in values) == (draws > 1)
    if draws > 1:
        np.testing.assert_allclose(nats(values["bits_per_dim_iw"]), exact, rtol=1e-9)
    else:
        # The KL is in closed form, the distortion drawn: the ELBO has the draws' noise, whose mean is zero and whose
        # standard deviation is a nat or two an image.
        many = nats(bits(codec, batch, 200)["bits_per_dim"])
        np.testing.assert_allclose(many, exact, atol=5 * 2 / math.sqrt(200))
    torch.testing.assert_close(values["bits_per_dim"], values["rate"] + values["distortion"])


def test_the_importance_weighted_bound_lies_between_elbo_and_likelihood_and_rises(batch: Batch) -> None:
    """Burda et al. 2016, theorem 1: in expectation, here over many copies of the images, each with its own noise."""
    codec = Linear(off=1.0)
    copies = Batch(*(tensor.repeat_interleave(40, dim=0) for tensor in batch))
    copies = copies._replace(sample=torch.arange(len(copies.x)))
    exact = -codec.exact(batch.x).mean()
    elbo = nats(bits(codec, copies, 1)["bits_per_dim"]).mean()
    bounds = [elbo, *(nats(bits(codec, copies, draws)["bits_per_dim_iw"]).mean() for draws in (2, 8, 32))]
    print("nats above −log p(x): ELBO, IW-2, IW-8, IW-32:", *(f"{bound - exact:.3f}" for bound in bounds))
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] > exact
    # KL(q‖p(z|x)) of means that lie apart by `gap` in a common covariance is gapᵀ Σ⁻¹ gap / 2: what the ELBO loses.
    gap = codec.covariance.diagonal().sqrt()
    lost = float(gap @ torch.linalg.solve(codec.covariance, gap)) / 2
    assert elbo - exact == pytest.approx(lost, rel=0.1)


def test_a_rerun_and_another_batch_size_give_the_same_numbers(slices: stream.ValidationSlices) -> None:
    results = [evaluate(Linear(0.5), slices, torch.device("cpu"), micro, draws=5) for micro in (11, 11, 1, 4)]
    assert results[0] == results[1]
    for result in results[2:]:
        assert result == pytest.approx(results[0], rel=1e-12)


def test_active_units_are_numpys(slices: stream.ValidationSlices, batch: Batch) -> None:
    codec = Linear(0.5)
    variance = codec.encode(batch)[0].numpy().var(0)
    found = evaluate(codec, slices, torch.device("cpu"), 4)["active_units"]
    assert found == (variance > 0.01).sum()
    assert 0 < found < LATENTS


def test_several_levels_have_a_rate_each(batch: Batch) -> None:
    class Levels(Linear):
        def bound(self, batch: Batch, draw: int = 0) -> Bound:
            bound = super().bound(batch, draw)
            return bound._replace(rate=torch.cat([0.25 * bound.rate, 0.75 * bound.rate]))

    one, two = bits(Linear(1.0), batch, 3), bits(Levels(1.0), batch, 3)
    torch.testing.assert_close(two["rate/level0"], one["rate"] / 4)
    torch.testing.assert_close(two["rate/level0"] + two["rate/level1"], two["rate"])
    torch.testing.assert_close(two["bits_per_dim"], one["bits_per_dim"])


def test_images_too_small_for_ssim_have_the_rest(pictures: Path) -> None:
    class Grey:
        def encode(self, batch: Batch) -> list[torch.Tensor]:
            return [batch.x]

        def decode(self, latents: list[torch.Tensor], condition: object = None) -> torch.Tensor:
            return torch.full(latents[0].shape, 0.5)

    slices = stream.ValidationSlices(stream.Config(root=str(pictures), size=8, workers=0))
    assert evaluate(Grey(), slices, torch.device("cpu")).keys() == {"images", "psnr", "mse"}


def test_ranks_measure_what_one_process_does(pictures: Path, tmp_path: Path, start: Start) -> None:
    """Even if one of the ranks has no image."""
    write(tmp_path / "val", samples(1), 1, [])
    roots = [str(pictures), str(tmp_path)]
    alone = list(map(measured, roots))
    for process in ranks(start, 2, ["-m", "tests.evaluation.test_bits", *roots]):
        code, output = finish(process)
        assert code == 0, output
        for result, one in zip(json.loads(output.partition("RESULTS")[2].splitlines()[0]), alone, strict=True):
            assert result == pytest.approx(one, rel=1e-12)


def measured(root: str) -> dict[str, float]:
    slices = stream.ValidationSlices(stream.Config(root=root, size=SIZE, workers=0))
    return evaluate(Linear(0.5), slices, torch.device("cpu"), micro=4, draws=3)


if __name__ == "__main__":  # a rank of the test above
    distributed.init()
    print("RESULTS", json.dumps(list(map(measured, sys.argv[1:]))))
    distributed.finish()
