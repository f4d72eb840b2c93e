"""How near a reconstruction is to its image, as every model reports it while it is trained."""

from torch import Tensor


def squared_errors(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean over each image, of pixels in [0, 1]. Both [B, C, H, W] → fp32 [B]."""
    return (reconstruction.float() - x).square().mean(dim=(1, 2, 3))


def fidelity(errors: Tensor) -> dict[str, Tensor]:
    """Of squared errors [B]: their mean, and the mean of the images' PSNR in dB at peak 1; detached scalars."""
    errors = errors.detach()
    return {"mse": errors.mean(), "psnr": -10 * errors.log10().mean()}
