"""How much the latents of a codec say about images.

The variance of a latent's posterior mean over images is its activity, A_u = Var_x(E_q(u|x)[u]) of Burda, Grosse,
Salakhutdinov 2016, "Importance weighted autoencoders", section 5.2; they call a latent active where it exceeds 0.01.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def sums(latents: Sequence[Tensor]) -> Tensor:
    """Of float latents [B, …] a level: over the images the sums of each latent and of its square, fp64 [2, M], the
    latents of all levels in one row. Those of several batches add up."""
    values = torch.cat([level.flatten(1) for level in latents], dim=1).double()
    return torch.stack([values.sum(0), values.square().sum(0)])


def moments(sums: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """(mean, variance) of each latent over so many images, fp64 [M]."""
    mean, square = sums / images
    return mean, (square - mean.square()).clamp(min=0)
