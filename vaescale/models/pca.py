"""Principal component analysis in closed form over the whole stream, and the Gaussian model that it estimates:
Tipping, Bishop 1999, "Probabilistic principal component analysis".

    image [B, C, H, W] → minus the mean, onto the m leading eigenvectors of the covariance → scores fp32 [B, m] → image

With `patch: p` each image is a grid of p × p pixel patches, which are all samples of one PCA: [B, m, H/p, W/p].

There is no gradient descent: the learner sums moments and `solve` computes the eigenvectors. With D = C·H·W (or C·p·p)
this takes 2·D² operations per row, about 9·D³ for the solution, and about seven matrices of 8·D² bytes on each rank.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .. import distributed
from ..interfaces import Batch, Bound, Condition, Model, Output, Shape
from ..nn import noise
from ..nn.covariance import Moments, covariance
from ..nn.fidelity import fidelity, squared_errors
from ..nn.likelihood import DELTA, UNIFORM
from ..ranges import ranged, require

LARGEST = 16384  # subpixels; the covariance then takes 2 GiB
PRIOR = 3  # noise key of samples
SHOWN = 15  # components that `basis` shows


@dataclass(frozen=True)
class Config:
    kind: str = "pca"
    latent_dim: int = ranged(32, least=1)  # m, components
    patch: int = ranged(0, least=0)  # p, pixels per side; 0: the whole image is one patch


class PCA(Model):
    """PCA of pixels in [0, 1]. The estimates equal scikit-learn's for x / 255; `variance` and `noise` divide by n − 1.
    Only `noise` differs, and only with fewer rows n than subpixels D: scikit-learn then averages min(n, D) − m
    eigenvalues. This class averages all D − m, zeros included, which is the maximum likelihood (Tipping and Bishop,
    equation 8).

    The model of images is x = μ + V s + ε with s ~ N(0, λ − σ²) and ε ~ N(0, σ² I), where σ² is the mean of the
    discarded eigenvalues, the maximum-likelihood estimate (Tipping and Bishop, equations 7 and 8). *Dequantised*
    images are 8-bit images plus uniform noise within each bin. In their model all eigenvalues and σ² are larger by
    UNIFORM, and the prior is the same.
    """

    def __init__(self, config: Config, shape: Shape, seed: int = 0) -> None:
        del seed  # nothing is random
        super().__init__()
        require(config, "model")
        self.config = config
        self.shape = shape
        self.side = config.patch or shape.size
        size = shape.channels * self.side**2
        if shape.size % self.side:
            raise ValueError(f"model.patch={config.patch} does not divide data.size={shape.size}")
        if size > LARGEST:
            raise ValueError(
                f"a PCA of {size} subpixels needs a covariance of {8 * size**2 / 2**30:.1f} GiB; the limit is "
                f"{LARGEST} subpixels: set model.patch to a side that divides data.size={shape.size}, as in "
                f"model.patch=8"
            )
        if not 1 <= config.latent_dim < size:
            raise ValueError(
                f"model.latent_dim={config.latent_dim} must lie between 1 and {size - 1}, below the number of subpixels"
            )
        self.mean: Tensor
        self.components: Tensor
        self.variance: Tensor
        self.noise: Tensor
        self.register_buffer("mean", torch.full((size,), 0.5))  # μ
        self.register_buffer("components", torch.zeros(config.latent_dim, size))  # the rows of Vᵀ
        self.register_buffer("variance", torch.zeros(config.latent_dim))  # λ, descending
        self.register_buffer("noise", torch.zeros(()))  # σ²

    def forward(self, batch: Batch, step: int) -> Output:
        del step
        reconstruction = self.decode(self.encode(batch))
        errors = squared_errors(reconstruction, batch.x / 255)
        return Output(errors.mean(), fidelity(errors), reconstruction)

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        """Returns the scores u = Vᵀ(x − μ), fp32 [B, m] or [B, m, H/p, W/p]: they decode to the nearest image. The
        posterior mean in `bound` is smaller by the factor (λ − σ²) / (λ + UNIFORM)."""
        u = self._scores(self._rows(batch.x) / 255)
        if temperature:
            u = u + temperature * self._posterior()[1].sqrt() * torch.randn_like(u)
        return [self._grid(u)]

    def decode(
        self,
        latents: list[Tensor],
        condition: Condition | None = None,
        temperature: float = 1.0,
        draw: bool = False,
        sample: Tensor | None = None,
    ) -> Tensor:
        """Decodes scores, or draws as many images as the condition has entries. Raises ValueError without either."""
        if latents:
            u = rearrange(latents[0], "b m h w -> b (h w) m") if self.config.patch else latents[0][:, None]
        elif condition is not None:
            size = (self.shape.size // self.side) ** 2, self.config.latent_dim
            if sample is None:
                drawn = torch.randn(len(condition.label), *size, device=self.mean.device)
            else:
                drawn = noise.normal(sample, size, PRIOR, version=self.noise_version)
            u = temperature * self._prior().sqrt() * drawn
        else:
            raise ValueError("decode needs latents, or a condition that says how many images to draw")
        rows = self.mean + u @ self.components
        if draw:
            rows = rows + self.noise.sqrt() * torch.randn_like(rows)
        return self._images(rows)

    def bound(self, batch: Batch, draw: int = 0) -> Bound:
        """Returns the bound of the dequantised image. The posterior is exact, so distortion − log_ratio is the same for
        every draw. Patches are treated as independent."""
        x = self._rows(batch.x) / 255
        prior, c = self._prior(), self.noise + UNIFORM
        shrink, variance = self._posterior()
        mean = shrink * self._scores(x)
        epsilon = noise.normal(batch.sample, tuple(mean.shape[1:]), draw, version=self.noise_version)
        z = mean + variance.sqrt() * epsilon
        squares = (x - self.mean - z @ self.components).square() + UNIFORM
        distortion = (squares / c + (2 * math.pi * c).log()) / 2 - math.log(DELTA)
        gain = (prior / variance).log()
        rate = ((variance + mean.square()) / prior - 1 + gain) / 2
        log_ratio = (epsilon.square() - z.square() / prior - gain) / 2
        return Bound(distortion.sum((1, 2)), rate.sum((1, 2))[None], log_ratio.sum((1, 2)))

    def moments(self) -> Moments:
        """Returns empty moments to sum images into."""
        return Moments(len(self.mean)).to(self.mean.device)

    def count(self, moments: Moments, batch: Batch, counted: Tensor) -> None:
        """Adds the images of the batch where `counted`, bool [B], is true."""
        rows = self._rows(batch.x)
        moments.add(rows.flatten(0, 1), counted.repeat_interleave(rows.shape[1]))

    def solve(self, sums: dict[str, Tensor]) -> None:
        """Computes the components from `sums`, those of Moments over all ranks. Collective: rank 0 solves, and all
        ranks receive its solution.

        Signs are scikit-learn's: the largest entry of each component is positive.
        """
        if distributed.rank() == 0:
            mean, matrix = covariance(**sums)
            values, vectors = torch.linalg.eigh(matrix)  # ascending
            values, vectors = values.clamp(min=0) / 255**2, vectors[:, -self.config.latent_dim :].flip(1).T
            largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
            self.mean.copy_(mean / 255)
            self.components.copy_(vectors * largest.sign())
            self.variance.copy_(values[-self.config.latent_dim :].flip(0))
            self.noise.copy_(values[: -self.config.latent_dim].mean())
        for buffer in self.buffers():
            distributed.broadcast_(buffer)

    def explained(self) -> Tensor:
        """Returns the share of the variance that the components explain, in [0, 1]."""
        held = self.variance.sum()
        return held / (held + self.noise * (len(self.mean) - self.config.latent_dim)).clamp(min=1e-12)

    def basis(self) -> Tensor:
        """Returns the mean and the leading components as images [k, C, p, p]: of a patch, if `patch` is set."""
        shown = self.components[:SHOWN]
        scaled = 0.5 + shown / (2 * shown.abs().amax(1, keepdim=True).clamp(min=1e-12))
        rows = torch.cat([self.mean[None], scaled])
        return rearrange(rows, "k (c p q) -> k c p q", c=self.shape.channels, p=self.side)

    def _prior(self) -> Tensor:
        """Variances of s [m], clamped above zero: a component without variance costs nothing instead of giving NaN."""
        return (self.variance - self.noise).clamp(min=1e-12)

    def _posterior(self) -> tuple[Tensor, Tensor]:
        """(posterior mean / score [m], posterior variance [m]) of s given a dequantised image (equation 6)."""
        prior, noise = self._prior(), self.noise + UNIFORM
        shrink = prior / (prior + noise)
        return shrink, shrink * noise

    def _scores(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) @ self.components.T

    def _rows(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, patches, D]."""
        return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.side, q=self.side)

    def _images(self, rows: Tensor) -> Tensor:
        across = self.shape.size // self.side
        return rearrange(rows, "b (h w) (c p q) -> b c (h p) (w q)", h=across, p=self.side, q=self.side)

    def _grid(self, u: Tensor) -> Tensor:
        if not self.config.patch:
            return u[:, 0]
        return rearrange(u, "b (h w) m -> b m h w", h=self.shape.size // self.side)
