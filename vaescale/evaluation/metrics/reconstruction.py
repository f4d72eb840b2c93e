"""Reconstruction quality of uint8 pairs [B, C, H, W]: one fp64 value per image, so that means are over images."""

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from ...interfaces import Tensors
from .metric import Metric, Number, Seen

SIGMA = 1.5
WINDOW = 11  # pixels per side
BORDER = WINDOW // 2


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Returns the mean squared error of pixels in [0, 1]. uint8, uint8 → fp64 [B]."""
    return ((x.double() - y.double()) / 255).square().mean(dim=(1, 2, 3))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio in dB at peak 1, fp64 [B]. Equal images get the value of an error of one
    grey level in one subpixel, so that a mean stays finite."""
    least = 1 / (255**2 * x[0].numel())
    return -10 * mse(x, y).clamp(min=least).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Returns the structural similarity (Wang et al. 2004), fp64 [B]: data range 1, Gaussian window 11, σ 1.5, averaged
    where the window lies wholly inside the image, as in the authors' code. Sides need at least WINDOW pixels."""
    _, similarity = structural_similarity_index_measure(
        y.float() / 255,
        x.float() / 255,
        data_range=1.0,
        sigma=SIGMA,
        reduction="none",
        return_full_image=True,
    )
    # The library also counts windows over a mirrored border, which changes the mean by up to .001.
    return similarity[..., BORDER:-BORDER, BORDER:-BORDER].double().mean(dim=(1, 2, 3))


def sums(seen: Seen) -> Tensors:
    x, y = seen.batch.x, seen.reconstruction
    found = {"mse": mse(x, y).sum(), "psnr": psnr(x, y).sum()}
    return {**found, "ssim": ssim(x, y).sum()} if x.shape[-1] >= WINDOW else found


RECONSTRUCTION = Metric(
    numbers={
        "mse": Number("MSE", ".6f", "MSE", logged=False),
        "psnr": Number("PSNR (dB)", ".2f", "PSNR"),
        "ssim": Number("SSIM", ".4f", "SSIM", absent="not measured: its window is wider than the images"),
    },
    protocol={
        "rounding": "reconstructions rounded to 8 bits before mse, psnr and ssim",
        "mse": "pixels in [0, 1], mean over images",
        "psnr": "dB, peak 1, mean of the per-image values",
        "ssim": "data range 1, Gaussian window 11, sigma 1.5, mean of the per-image values; sides of at least 11 px",
    },
    sums=sums,
)
