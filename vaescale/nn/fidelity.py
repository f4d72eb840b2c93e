"""Squared error and PSNR of reconstructions, which every model reports during training."""

from torch import Tensor


def squared_errors(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Returns the mean squared error of each image, for pixels in [0, 1]. Both [B, C, H, W] → fp32 [B]."""
    return (reconstruction.float() - x).square().mean(dim=(1, 2, 3))


def fidelity(errors: Tensor) -> dict[str, Tensor]:
    """Returns the mean of squared errors [B] and the mean PSNR of the images in dB (peak 1), as detached scalars."""
    errors = errors.detach()
    return {"mse": errors.mean(), "psnr": -10 * errors.log10().mean()}
