"""How much the latents of a codec say about images."""

import torch
from torch import Tensor

from .. import distributed


class Moments:
    """Mean and variance, over images, of each latent's posterior mean; the latents of all levels in one row [M].

    The variance is the activity of a latent of Burda, Grosse, Salakhutdinov 2016, "Importance weighted autoencoders",
    section 5.2, A_u = Var_x(E_q(u|x)[u]); they call a latent active where it exceeds 0.01.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._count = 0
        self._sums = torch.zeros(2, 0, dtype=torch.float64, device=device)

    def add(self, latents: list[Tensor]) -> None:
        """Posterior means of some images, float [B, …] a level: what `encode` gives at temperature 0."""
        values = torch.cat([level.flatten(1) for level in latents], dim=1).double()
        sums = torch.stack([values.sum(0), values.square().sum(0)])
        self._sums = self._sums + sums if self._count else sums
        self._count += len(values)

    def result(self) -> tuple[Tensor, Tensor]:
        """(mean, variance), fp64 [M] over the images of all ranks. Collective; a rank may have had no image."""
        own = torch.tensor([self._count, self._sums.shape[1], self._count > 0], device=self._device)
        count, sizes, ranks = distributed.sum_(own).tolist()
        sums = self._sums if self._count else self._sums.new_zeros(2, sizes // ranks)
        mean, square = distributed.sum_(sums.clone()) / count
        return mean, (square - mean.square()).clamp(min=0)
