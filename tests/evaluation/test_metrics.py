from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vaescale.data import stream
from vaescale.evaluation import metrics, tables
from vaescale.evaluation.evaluate import evaluate, protocol
from vaescale.evaluation.metrics.metric import Metric, Number, Seen
from vaescale.evaluation.metrics.reconstruction import psnr, ssim
from vaescale.interfaces import Batch, Usage


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (5, 3, 32, 40), generator=generator, dtype=torch.uint8)
    noise = torch.randn(x.shape, generator=generator) * torch.tensor([1, 5, 20, 60, 120])[:, None, None, None]
    return x, (x + noise).clamp(0, 255).to(torch.uint8)


def test_psnr_is_scikit_images(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    for x, y, ours in zip(*pair, psnr(*pair), strict=True):
        assert float(ours) == pytest.approx(peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255), abs=1e-9)


def test_ssim_is_scikit_images(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """With the settings of Wang et al.: Gaussian window, σ 1.5, population covariance, no borders."""
    for x, y, ours in zip(*pair, ssim(*pair), strict=True):
        theirs = structural_similarity(
            x.numpy() / 255, y.numpy() / 255, channel_axis=0, data_range=1.0,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert float(ours) == pytest.approx(theirs, abs=1e-12)


def test_equal_images_have_a_finite_psnr() -> None:
    x = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert psnr(x, x).isfinite().all()
    y = x.clone()
    y[0, 0, 0, 0] = 1
    assert psnr(x, y)[0] == psnr(x, x)[0]


class Halves:
    """A codec that is easy to compute by hand: codes are rounded halves of the mean, the reconstruction is the code."""

    def encode(self, batch: Batch) -> list[torch.Tensor]:
        return [batch.x.float().mean(dim=(1, 2, 3)).div(2).round().long()[:, None, None]]

    def decode(self, latents: list[torch.Tensor], label: object = None, temperature: float = 1.0) -> torch.Tensor:
        return (2 * latents[0] / 255)[:, None].expand(-1, 3, 16, 16)

    def usage(self, clear: bool) -> dict[str, Usage]:
        return {"codebook": Usage(*torch.zeros(len(Usage._fields), 128).long())}

    def quantizers(self) -> dict[str, None]:
        return {"codebook": None}


def test_evaluate_is_a_mean_over_images(pictures: object) -> None:
    """With any batch size; the last batch is shorter."""
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


def colours(seen: Seen) -> dict[str, torch.Tensor]:
    if not isinstance(seen.codec, Halves):
        return {}
    means = seen.batch.x.double().mean((2, 3))
    return {"means": means.sum(0), "products": means.T @ means}


def spread(sums: dict[str, torch.Tensor], images: int) -> dict[str, float]:
    mean = sums["means"] / images
    return {"colour_spread": float((sums["products"] / images - mean.outer(mean)).trace().sqrt())}


# A metric that nobody has: the covariance of the colours' means over images, whose sums are a matrix.
SPREAD = Metric(
    numbers={
        "colour_spread": Number("spread of colours", ".3f", "colours"),
        "colour_skew": Number("skew of colours", ".3f", absent="left out: nobody has written it"),
    },
    protocol={"colour_spread": "square root of the trace of the covariance of the colours' means"},
    sums=colours,
    result=spread,
)


def test_a_metric_is_added_in_one_place(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric is then in the results, the listing, the comparison, the log line and the protocol."""
    monkeypatch.setattr(metrics, "METRICS", [*metrics.METRICS, SPREAD])
    slices = stream.ValidationSlices(stream.Config(root=str(pictures), size=16, workers=0))
    means = slices[range(11)].batch.x.double().mean((2, 3)).numpy()
    expected = np.sqrt(np.trace(np.cov(means.T, bias=True)))
    for micro in (4, 100):
        measured = evaluate(Halves(), slices, torch.device("cpu"), micro)
        assert measured["colour_spread"] == pytest.approx(expected, rel=1e-9)
    about = {
        "run": "runs/x", "model": "halves", "parameters": 0, "latents": "1", "likelihood": None, "draws": 1, "step": 1,
        "data": "x/val", "fingerprint": "0", "size": 16, "channels": 3,
    }  # fmt: skip
    result = {**about, **measured}
    rows = [line.split("  ") for line in tables.listing(result).splitlines()]
    assert ["spread of colours", f"{expected:.4g}"] in [[part.strip() for part in row if part] for row in rows]
    assert "left out: nobody has written it" in tables.listing(result)
    names, _, row = (line.strip("|").split("|") for line in tables.comparison([result]).splitlines()[:3])
    found = {name.strip(): cell.strip() for name, cell in zip(names, row, strict=True)}
    assert found["colours"] == f"{expected:.3f}"
    assert tables.line(measured).endswith(f"  colours {expected:.3f}")
    assert (
        protocol().items() >= {**SPREAD.protocol, "usage": "share of codes used at least once over all images"}.items()
    )


def test_the_protocol_names_every_number_and_no_number_has_two_metrics() -> None:
    all_of_them = [*metrics.METRICS, *metrics.COMPARISONS.values()]
    names = [name for metric in all_of_them for name in metric.numbers]
    assert len(names) == len(set(names))
    said = protocol()
    assert len(said) == 1 + sum(len(metric.protocol) for metric in all_of_them)
    for metric in all_of_them:
        text = " ".join([*metric.protocol, *metric.protocol.values()])
        assert all(name in text for name in metric.numbers)
