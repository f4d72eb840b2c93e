"""What a diffusion is over: the pixels of images, or the latents of a frozen model.

Data x are fp32 [B, D, h, w], of a variance of about 1; vectors of latents have h = w = 1.
"""

from typing import Any

import torch
from torch import Tensor

from ..interfaces import (
    Batch,
    Bound,
    Codec,
    Condition,
    LatentStatistics,
    Model,
    Posterior,
    Shape,
)
from ..nn import diffusion, noise
from ..nn.frozen import Frozen, blank_latents
from ..nn.likelihood import gaussian_log_prob

UNFIT = (
    "model.over must be the run of a model whose coarsest latents are continuous and depend on the image alone: a vae, "
    "kl or vdvae, or an hvae with model.posterior=top-down"
)


class Pixels:
    """x = pixels in [−1, 1]; an image is its own latent. p(image|z_0) is a discretised Gaussian around z_0 / α_0."""

    continuous = False  # whether the bound is that of a density of x, not of z_0

    def __init__(self, shape: Shape) -> None:
        self.shape = (shape.channels, shape.size, shape.size)

    def drawn(self, batch: Batch, *keys: int) -> tuple[Tensor, Tensor]:
        """Returns x ~ q(x|image), and −H(q) in nats, fp32 [B]. The noise of an image depends only on the keys and its
        sample number."""
        del keys
        return self.encode(batch, 0.0)[0], torch.zeros(len(batch.x), device=batch.x.device)

    def bound_given(self, batch: Batch, x: Tensor, noise: Tensor, gamma: Tensor, draw: int = 0) -> Bound:
        """Returns the bound on log p(image|…), as in PixelLikelihood. noise, γ []: those of z_0."""
        del draw
        std = (gamma / 2).exp().float() / 2  # σ_0 / α_0, of pixels in [0, 1]
        return Bound.exact(-gaussian_log_prob((x + 1) / 2 + std * noise, std, batch.x))

    def codec(self, device: torch.device) -> None:
        """Returns the model whose latents are x, on the device; None: there is none."""
        del device

    def encode(self, batch: Batch, temperature: float) -> list[Tensor]:
        del temperature
        return [batch.x / 127.5 - 1]

    def decode(self, latents: list[Tensor], condition: Condition | None, *rest: Any) -> Tensor:
        """As `Codec.decode`, whose further arguments are `rest`."""
        del condition, rest
        return (latents[0] + 1) / 2

    def latents(self, x: Tensor) -> list[Tensor]:
        """Returns the coarsest latents, whose standardised values are x."""
        return [x]


class Latents:
    """x = the coarsest latents of a frozen model, less their mean and divided by their standard deviation, which must
    have been measured, if it is a model that measures them. Finer ones are left to that model.

    fixed: whether x is the mean of q, and the image is decoded from z_0 / α_0 instead of from x."""

    def __init__(self, codec: Model, shape: Shape, classes: int, fixed: bool) -> None:
        """classes: of the diffusion. Raises ValueError for a model without such latents, or with another condition."""
        if not (isinstance(codec, Posterior) and isinstance(codec, Codec)):
            raise ValueError(UNFIT)
        own = getattr(codec, "conditioner", None)
        if own and (own.classes not in (0, classes) or own.attributes not in (0, shape.attributes)):
            raise ValueError(
                f"the model of model.over has {own.classes} classes and {own.attributes} attributes as its condition: "
                f"give this one the same model.classes and data.attributes"
            )
        self.frozen = Frozen(codec)
        self.fixed = fixed
        self.continuous = not fixed
        self.own = tuple(blank_latents(codec, shape)[0].shape[1:])
        self.shape = (*self.own, 1, 1)[:3]

    def codec(self, device: torch.device) -> Any:
        return self.frozen.on(device)

    def drawn(self, batch: Batch, *keys: int) -> tuple[Tensor, Tensor]:
        codec = self.codec(batch.x.device)
        with torch.no_grad(), torch.autocast(batch.x.device.type, enabled=False):
            centre, scale = self._scales(codec)
            mean, std = (part.view(-1, *self.shape) for part in codec.posterior(batch))
            mean, std = (mean - centre) / scale, std / scale
            if self.fixed:
                return mean, torch.zeros(len(mean), device=mean.device)
            return mean + std * noise.normal(batch.sample, self.shape, *keys), -diffusion.entropy(std.log())

    def bound_given(self, batch: Batch, x: Tensor, noise: Tensor, gamma: Tensor, draw: int = 0) -> Bound:
        decoded = x + (gamma / 2).exp().float() * noise if self.fixed else x
        given: Bound = self.codec(x.device).bound_given(batch, self.latents(decoded), draw)
        return given

    def encode(self, batch: Batch, temperature: float) -> list[Tensor]:
        return self.codec(batch.x.device).encode(batch, temperature)

    def decode(self, latents: list[Tensor], condition: Condition | None, *rest: Any) -> Tensor:
        return self.codec(latents[0].device).decode(latents, condition, *rest)

    def latents(self, x: Tensor) -> list[Tensor]:
        mean, std = self._scales(self.codec(x.device))
        return [(x * std + mean).view(-1, *self.own)]

    def _scales(self, codec: Any) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """The mean and standard deviation of each channel, [D, 1, 1]; of N(0, I) for a model that measures none."""
        if not isinstance(codec, LatentStatistics):
            return 0.0, 1.0
        mean, std = codec.latent_statistics()
        return mean[:, None, None], std[:, None, None]
