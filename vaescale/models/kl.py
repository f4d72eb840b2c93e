"""KL autoencoder: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", section 3.1.

    image [B, C, H, W] → encoder → q(z|x) = N(μ, diag σ²) over maps [B, D, H/f, W/f] → z → decoder → image

A VAE whose latents are maps and whose KL has a tiny weight β. So its bound is loose and draws from its prior N(0, I)
look like nothing: the prior of its latents is for another model to learn. The networks are those of nn/networks.py.

The mean and the deviation of each channel of z are measured at the end of training (interfaces.Calibrated). In
the authors' code all channels share one `scale_factor`, 1 / std of the draws of one batch.

The loss is −log p(x|z) + β KL per subpixel. With `model.reconstruction` its losses stand in place of −log p(x|z): as
they are no likelihood, such a model has no bound, hence no bits/dim.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..interfaces import Condition, Shape, Tensors
from ..nn import gaussian, networks, vqgan
from ..nn import likelihood as likelihoods
from ..nn import reconstruction as losses
from ..nn.fidelity import fidelity, squared_errors
from ..nn.gaussian import Normal
from ..nn.likelihood import Likelihood
from ..nn.reconstruction import Reconstruction
from ..ranges import ranged, require
from . import variational
from .variational import Draw, Latent, Level, Measured, Net, Variational

LOG_VARIANCE = -30.0, 20.0  # the range of log σ², as in the authors' code


@dataclass(frozen=True)
class Config(variational.Config):
    kind: str = "kl"
    latent_dim: int = ranged(4, least=1, most=2**16)  # D, channels of z
    network: Any = field(default_factory=vqgan.Config)  # the settings of one of nn.networks.NETWORKS
    checkpointing: bool = False  # recompute a block's activations in the backward pass instead of storing them
    beta: float = ranged(1e-6, least=0)  # as in the authors' configs
    reconstruction: losses.Config = field(default_factory=losses.Config)  # in place of the likelihood


class Maps(Net):
    """One level of latents, [B, D, H/f, W/f]."""

    def __init__(self, config: Config, shape: Shape, condition: int, likelihood: Likelihood) -> None:
        super().__init__()
        del condition  # the model has none
        dim = config.latent_dim
        self.sizes = [dim]
        self.encoder = networks.encoder(config.network, shape.channels, 2 * dim, config.checkpointing)
        self.decoder = networks.decoder(config.network, dim, likelihood.channels, config.checkpointing)
        self.side = shape.size // self.encoder.factor

    def infer(self, x: Tensor, embedded: Tensor | None, draw: Draw) -> tuple[Tensor, list[Level]]:
        mean, log_variance = self.encoder(x).float().chunk(2, dim=1)
        q = Normal(mean, log_variance.clamp(*LOG_VARIANCE) / 2)
        z = draw(0, q)
        return z, [Level(z, q, gaussian.standard(q.mean))]

    def generate(self, embedded: Tensor | None, images: int, draw: Draw) -> Tensor:
        like = torch.empty(images, self.sizes[0], self.side, self.side, device=next(self.parameters()).device)
        return draw(0, gaussian.standard(like))

    def output(self, h: Tensor, embedded: Tensor | None) -> Tensor:
        return self.decoder(h.to(self.dtype))


class Spatial(Measured):
    """What both variants share."""

    net: Maps

    def __init__(self, config: Config, shape: Shape, seed: int) -> None:
        super().__init__(config, shape, seed, partial(Maps, config, shape))

    def freeze_encoder(self) -> None:
        self.net.encoder.requires_grad_(False)

    @property
    def last_layer(self) -> nn.Module:
        """The convolution that computes the likelihood's input, or the reconstruction."""
        return self.net.decoder.last


class KL(Spatial, Variational):
    """The model with a likelihood."""

    def _compared(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensors, Tensor]:
        """The reconstruction has a gradient, for a critic."""
        reconstruction = self.likelihood.mean(output)
        errors = squared_errors(reconstruction, x / 255)
        return -self.likelihood.log_prob(output, x).mean(), fidelity(errors), reconstruction


class WithoutLikelihood(Spatial):
    """The model with losses of the reconstruction in place of a likelihood."""

    config: Config

    def __init__(self, config: Config, shape: Shape, seed: int) -> None:
        plain = likelihoods.Config(kind="gaussian", learned_variance=False)  # of which only the mean is used
        super().__init__(replace(config, likelihood=plain), shape, seed)
        self.reconstruction = Reconstruction(config.reconstruction, shape)

    def reconstruction_loss(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        return self.reconstruction(reconstruction, x)[0]

    def decode(
        self,
        latents: list[Tensor],
        condition: Condition | None = None,
        temperature: float = 1.0,
        draw: bool = False,
        sample: Tensor | None = None,
    ) -> Tensor:
        """Decodes latents. Without a likelihood there is nothing to draw images from: `draw` is ignored."""
        del draw
        return super().decode(latents, condition, temperature, sample=sample)

    def _compared(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensors, Tensor]:
        reconstruction = self.likelihood.mean(output)
        loss, metrics = self.reconstruction(reconstruction, x)
        return loss * self.subpixels, metrics, reconstruction


def build(config: Config, shape: Shape, seed: int = 0) -> Latent:
    """Builds the model. Raises ValueError for invalid settings."""
    require(config, "model")
    if config.classes:
        raise ValueError(
            f"model.classes={config.classes} does not apply to model.kind=kl, which has no condition: set 0"
        )
    shape = shape._replace(attributes=0)
    if config.reconstruction.configured:
        return WithoutLikelihood(config, shape, seed)
    return KL(config, shape, seed)
