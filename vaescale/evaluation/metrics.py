"""Image metrics on uint8 pairs [B, 3, H, W]; one fp64 value an image, so that means are over images."""

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

SIGMA = 1.5
WINDOW = 11  # pixels a side
BORDER = WINDOW // 2


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of pixels in [0, 1]. uint8, uint8 → fp64 [B]."""
    return ((x.double() - y.double()) / 255).square().mean(dim=(1, 2, 3))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB at peak 1; equal images give what one grey level in one subpixel would,
    since a mean over infinities says nothing. fp64 [B]."""
    least = 1 / (255**2 * x[0].numel())
    return -10 * mse(x, y).clamp(min=least).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004): data range 1, Gaussian window 11, σ 1.5, where the window lies wholly
    inside the image, as in the authors' code. fp64 [B]; sides of at least WINDOW pixels."""
    _, similarity = structural_similarity_index_measure(
        y.float() / 255,
        x.float() / 255,
        data_range=1.0,
        sigma=SIGMA,
        reduction="none",
        return_full_image=True,
    )
    # The library also counts windows over a mirrored border, which moves the mean by up to .001.
    return similarity[..., BORDER:-BORDER, BORDER:-BORDER].double().mean(dim=(1, 2, 3))
