"""A VAE with two levels of latents: Sønderby et al. 2016, "Ladder variational autoencoders", section 2.

    p(z2) = N(0, I),  p(z1|z2) = N(·, diag),  p(x|z1)
    bottom-up:  q(z1|x) from the image, then q(z2|z1)
    top-down:   q(z2|x) from the image, then q(z1|x, z2)

−ELBO = −E log p(x|z1) + E log q(z1|·)/p(z1|z2) + E KL(q(z2|·) ‖ p(z2)). Top-down, the middle term is also a KL in
closed form. Bottom-up it is not, because z2 is drawn given z1. Every distribution except p(z2) also depends on the
condition, if the model has one. With `network.kind: linear` every network is one linear map.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..interfaces import Shape
from ..nn import gaussian
from ..nn.blocks import Network, decoder, encoder, he_, with_condition
from ..nn.likelihood import Likelihood
from ..ranges import ranged
from . import variational
from .variational import Draw, Level, MeasuredVariational, Net, Variational

TOP, LOW = 0, 1  # levels, coarse to fine: z2 and z1


@dataclass(frozen=True)
class Config(variational.Config):
    kind: str = "hvae"
    latent_dim: int = ranged(32, least=1, most=2**20)  # of z1
    top_latent_dim: int = ranged(8, least=1, most=2**20)  # of z2
    posterior: Literal["bottom-up", "top-down"] = "bottom-up"
    network: Network = field(default_factory=Network)


class TwoLevels(Net):
    def __init__(self, config: Config, shape: Shape, condition: int, likelihood: Likelihood) -> None:
        super().__init__()
        if config.posterior == "top-down" and config.network.kind == "linear":
            raise ValueError("model.posterior=top-down is not linear: use bottom-up with model.network.kind=linear")
        low, top = config.latent_dim, config.top_latent_dim
        self.sizes = [top, low]
        self.top_down = config.posterior == "top-down"
        vector = config.network.hidden if self.top_down else 2 * low
        self.encoder = encoder(config.network, shape, vector, condition)
        self.q_top = _map(config.network, vector if self.top_down else low + condition, 2 * top)
        self.q_low = _map(config.network, vector + top, 2 * low) if self.top_down else None
        self.p_low = _map(config.network, top + condition, 2 * low)
        self.decoder = decoder(config.network, shape, low + condition, likelihood.channels)
        if self.q_low is not None:
            # Two more ReLU layers than in bottom-up separate the image from q(z1). With torch's default initialisation
            # little of the image's signal reaches q(z1), which costs 0.2 bits/dim (configs/README.md).
            he_(self.encoder, last=True)
            he_(self.q_top, last=False)
            he_(self.q_low, last=False)

    def infer(self, x: Tensor, embedded: Tensor | None, draw: Draw) -> tuple[Tensor, list[Level]]:
        features = self.encoder(x, embedded)
        if self.q_low is None:
            q_low = gaussian.normal(features)
            low = draw(LOW, q_low)
            q_top = gaussian.normal(self.q_top(with_condition(low.to(self.dtype), embedded)))
            top = draw(TOP, q_top)
        else:
            features = F.relu(features)
            q_top = gaussian.normal(self.q_top(features))
            top = draw(TOP, q_top)
            q_low = gaussian.normal(self.q_low(with_condition(features, top)))
            low = draw(LOW, q_low)
        p_low = self._prior(top, embedded)
        return low, [Level(top, q_top, gaussian.standard(top)), Level(low, q_low, p_low, follows=not self.top_down)]

    def generate(self, embedded: Tensor | None, images: int, draw: Draw) -> Tensor:
        top = draw(TOP, self.standard(images, self.sizes[TOP]))
        return draw(LOW, self._prior(top, embedded))

    def output(self, h: Tensor, embedded: Tensor | None) -> Tensor:
        return self.decoder(with_condition(h.to(self.dtype), embedded))

    def _prior(self, top: Tensor, embedded: Tensor | None) -> gaussian.Normal:
        """Returns p(z1|z2)."""
        return gaussian.normal(self.p_low(with_condition(top.to(self.dtype), embedded)))


def build(config: Config, shape: Shape, seed: int = 0) -> Variational:
    """Builds the model. Raises ValueError for invalid settings."""
    kind = MeasuredVariational if config.posterior == "top-down" else Variational
    return kind(config, shape, seed, partial(TwoLevels, config, shape))


def _map(network: Network, dim: int, out: int) -> nn.Module:
    """A network [B, dim] → [B, out]."""
    if network.kind == "linear":
        return nn.Linear(dim, out)
    return nn.Sequential(nn.Linear(dim, network.hidden), nn.ReLU(), nn.Linear(network.hidden, out))
