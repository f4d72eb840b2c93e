"""Image metrics on uint8 pairs [B, 3, H, W]; one fp64 value an image, so that means are over images."""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of pixels in [0, 1]. uint8, uint8 → fp64 [B]."""
    return ((x.double() - y.double()) / 255).square().mean(dim=(1, 2, 3))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB at peak 1; equal images give what one grey level in one subpixel would,
    since a mean over infinities says nothing. fp64 [B]."""
    least = 1 / (255**2 * x[0].numel())
    return -10 * mse(x, y).clamp(min=least).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004): data range 1, Gaussian window 11, σ 1.5. fp64 [B]."""
    return structural_similarity_index_measure(
        y.float() / 255, x.float() / 255, data_range=1.0, gaussian_kernel=True, sigma=1.5, reduction="none"
    ).to(torch.float64).reshape(-1)
