"""VAE: Kingma, Welling 2014, "Auto-encoding variational Bayes"; conditional on labels or attributes if configured.

    image [B, C, H, W] → encoder → q(z|x) = N(g, diag h²) → z = g + h ⊙ ζ, [B, m] → decoder → p(x|z);  p(z) = N(0, I)

One network outputs g and log h. With the Gaussian likelihood the loss is C ‖x − f(z)‖² + KL(q‖p) up to a constant, with
C = 1/(2c) and c fixed or learned. A label y and attributes are concatenated with the image features in the encoder and
with z in the decoder: q(z|x, y) and p(x|z, y) (Sohn, Lee, Yan 2015). p(z) does not depend on them.
"""

from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from ..interfaces import Shape
from ..nn import gaussian
from ..nn.blocks import Network, decoder, encoder, with_condition
from ..nn.likelihood import Likelihood
from ..ranges import ranged
from . import variational
from .variational import Draw, Level, MeasuredVariational, Net


@dataclass(frozen=True)
class Config(variational.Config):
    kind: str = "vae"
    latent_dim: int = ranged(64, least=1, most=2**20)  # m
    network: Network = field(default_factory=Network)


class OneLevel(Net):
    def __init__(self, config: Config, shape: Shape, condition: int, likelihood: Likelihood) -> None:
        super().__init__()
        self.sizes = [config.latent_dim]
        self.encoder = encoder(config.network, shape, 2 * config.latent_dim, condition)
        self.decoder = decoder(config.network, shape, config.latent_dim + condition, likelihood.channels)

    def infer(self, x: Tensor, embedded: Tensor | None, draw: Draw) -> tuple[Tensor, list[Level]]:
        q = gaussian.normal(self.encoder(x, embedded))
        z = draw(0, q)
        return z, [Level(z, q, gaussian.standard(q.mean))]

    def generate(self, embedded: Tensor | None, images: int, draw: Draw) -> Tensor:
        del embedded  # p(z) does not depend on the condition
        return draw(0, self.standard(images, self.sizes[0]))

    def output(self, h: Tensor, embedded: Tensor | None) -> Tensor:
        return self.decoder(with_condition(h.to(self.dtype), embedded))


def build(config: Config, shape: Shape, seed: int = 0) -> MeasuredVariational:
    return MeasuredVariational(config, shape, seed, partial(OneLevel, config, shape))
