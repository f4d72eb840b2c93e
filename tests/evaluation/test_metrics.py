import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vaescale.data import stream
from vaescale.evaluation import metrics
from vaescale.evaluation.evaluate import evaluate
from vaescale.interfaces import Batch, Usage


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (5, 3, 32, 40), generator=generator, dtype=torch.uint8)
    noise = torch.randn(x.shape, generator=generator) * torch.tensor([1, 5, 20, 60, 120])[:, None, None, None]
    return x, (x + noise).clamp(0, 255).to(torch.uint8)


def test_psnr_is_scikit_images(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    for x, y, ours in zip(*pair, metrics.psnr(*pair), strict=True):
        assert float(ours) == pytest.approx(peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255), abs=1e-9)


def test_ssim_is_scikit_images(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """With the settings of Wang et al.: Gaussian window, σ 1.5, population covariance, borders left out."""
    for x, y, ours in zip(*pair, metrics.ssim(*pair), strict=True):
        theirs = structural_similarity(
            x.numpy() / 255, y.numpy() / 255, channel_axis=0, data_range=1.0,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert float(ours) == pytest.approx(theirs, abs=1e-5)  # theirs is in float64, ours in float32


def test_equal_images_have_a_finite_psnr() -> None:
    x = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert metrics.psnr(x, x).isfinite().all()
    y = x.clone()
    y[0, 0, 0, 0] = 1
    assert metrics.psnr(x, y)[0] == metrics.psnr(x, x)[0]


class Halves:
    """A codec that any reader can compute: codes are rounded halves of the mean, the reconstruction is the code."""

    def encode(self, batch: Batch) -> list[torch.Tensor]:
        return [batch.x.float().mean(dim=(1, 2, 3)).div(2).round().long()[:, None, None]]

    def decode(self, latents: list[torch.Tensor], label: object = None, temperature: float = 1.0) -> torch.Tensor:
        return (2 * latents[0] / 255)[:, None].expand(-1, 3, 16, 16)

    def usage(self, clear: bool) -> dict[str, Usage]:
        return {"codebook": Usage(*torch.zeros(len(Usage._fields), 128).long())}

    def quantizers(self) -> dict[str, None]:
        return {"codebook": None}


def test_evaluate_is_a_mean_over_images(pictures: object) -> None:
    """Whatever the batch size, the last one short."""
    slices = stream.ValidationSlices(stream.Config(root=str(pictures), size=16, workers=0))
    results = [evaluate(Halves(), slices, torch.device("cpu"), micro) for micro in (1, 4, 100)]
    x = slices[range(11)].batch.x.numpy().astype(np.float64)
    codes = np.round(x.mean((1, 2, 3)) / 2).astype(int)
    y = np.clip(2 * codes, 0, 255)[:, None, None, None]
    mse = ((x - y) ** 2).mean((1, 2, 3)) / 255**2
    share = np.bincount(codes) / 11
    share = share[share > 0]
    expected = {
        "images": 11,
        "mse": mse.mean(),
        "psnr": (-10 * np.log10(mse)).mean(),
        "usage": len(share) / 128,
        "perplexity": np.exp(-(share * np.log(share)).sum()),
    }
    for result in results:
        for name, value in expected.items():
            assert result[name] == pytest.approx(value, rel=1e-6), name
        assert result["ssim"] == pytest.approx(results[0]["ssim"], rel=1e-5)
