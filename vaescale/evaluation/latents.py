"""How much information the latents of a codec carry about images.

The activity of a latent is the variance of its posterior mean over images, A_u = Var_x(E_q(u|x)[u]) (Burda, Grosse,
Salakhutdinov 2016, "Importance weighted autoencoders", section 5.2). They call a latent active if it exceeds 0.01.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def sums(latents: Sequence[Tensor]) -> Tensor:
    """Returns the sums of each latent and of its square over the images, fp64 [2, M], for float latents [B, …] of each
    level, all levels concatenated. The sums of several batches can be added."""
    values = torch.cat([level.flatten(1) for level in latents], dim=1).double()
    return torch.stack([values.sum(0), values.square().sum(0)])


def moments(sums: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Returns (mean, variance) of each latent, fp64 [M], from the sums over this number of images."""
    mean, square = sums / images
    return mean, (square - mean.square()).clamp(min=0)
