"""Reconstruction quality of uint8 pairs [B, C, H, W]: one fp64 value per image, so that means are over images."""

import torch
from torch import Tensor

from ...interfaces import Tensors, over_pixels
from .metric import Metric, Number, Seen

SIGMA = 1.5
WINDOW = 11  # pixels per side
SUBPIXELS = 2**20  # subpixels, whose fp64 maps fit into a processor's cache
C1, C2 = 0.01**2, 0.03**2  # keep the quotients finite


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Returns the mean squared error of pixels in [0, 1]. uint8, uint8 → fp64 [B]."""
    return ((x.double() - y.double()) / 255).square().mean(dim=(1, 2, 3))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio in dB at peak 1, fp64 [B]. Equal images get the value of an error of one
    grey level in one subpixel, so that a mean stays finite."""
    least = 1 / (255**2 * x[0].numel())
    return -10 * mse(x, y).clamp(min=least).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Returns the structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004, equation 13), fp64 [B]: data range 1,
    Gaussian window 11, σ 1.5, averaged over the places where the window lies wholly inside the image, and over
    channels, as in the authors' code. Sides need at least WINDOW pixels."""
    images = max(1, SUBPIXELS // x[0].numel())
    return torch.cat([_ssim(*part) for part in zip(x.split(images), y.split(images), strict=True)])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double() / 255, y.double() / 255
    mean_x, mean_y, square_x, square_y, product = blurred(torch.stack([x, y, x * x, y * y, x * y])).unbind()
    variances = square_x - mean_x.square() + square_y - mean_y.square()
    covariance = product - mean_x * mean_y
    contrast = (2 * covariance + C2) / (variances + C2)
    similarity = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1) * contrast
    return similarity.mean(dim=(1, 2, 3))


def blurred(x: Tensor) -> Tensor:
    """Returns the mean under the window at each of its places inside the image: fp64 [..., H, W] → [..., H − WINDOW +
    1, W − WINDOW + 1]. A product with a banded matrix along each axis is several times faster than a convolution in
    fp64."""
    return band(x.shape[-2], x.device).T @ (x @ band(x.shape[-1], x.device))


def band(side: int, device: torch.device) -> Tensor:
    """Returns the weights of each pixel of a row at each place of the window: fp64 [side, side − WINDOW + 1]."""
    pixels = torch.arange(side, dtype=torch.float64, device=device)[:, None]
    offsets = pixels - pixels[: side - WINDOW + 1].T - WINDOW // 2
    weights = torch.where(offsets.abs() <= WINDOW // 2, (-offsets.square() / (2 * SIGMA**2)).exp(), 0)
    return weights / weights.sum(0)


def sums(seen: Seen) -> Tensors:
    if over_pixels(seen.codec):
        return {}
    x, y = seen.batch.x, seen.reconstruction
    found = {"mse": mse(x, y).sum(), "psnr": psnr(x, y).sum()}
    return {**found, "ssim": ssim(x, y).sum()} if x.shape[-1] >= WINDOW else found


RECONSTRUCTION = Metric(
    numbers={
        "mse": Number("MSE", ".6f", "MSE", logged=False),
        "psnr": Number("PSNR (dB)", ".2f", "PSNR"),
        "ssim": Number(
            "SSIM",
            ".4f",
            "SSIM",
            absent="not measured: its window is wider than the images, or they are their own latents",
        ),
    },
    protocol={
        "rounding": "reconstructions rounded to 8 bits before mse, psnr and ssim",
        "mse": "pixels in [0, 1], mean over images",
        "psnr": "dB, peak 1, mean of the per-image values",
        "ssim": "data range 1, Gaussian window 11, sigma 1.5, mean of the per-image values; sides of at least 11 px",
    },
    sums=sums,
)
