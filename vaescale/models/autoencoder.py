"""An autoencoder without a prior, a baseline that minimises ‖x − d(e(x))‖².

    image [B, C, H, W] → encoder → fp32 [B, m] → decoder → [B, C, H, W]

With `network.kind: linear` the optimum spans the same space as the m leading principal components, in an arbitrary
basis (Baldi, Hornik 1989, "Neural networks and principal component analysis").
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..interfaces import Batch, Condition, Model, Output, Shape
from ..nn.blocks import Network, decoder, encoder
from ..nn.fidelity import fidelity, squared_errors
from ..ranges import ranged, require


@dataclass(frozen=True)
class Config:
    kind: str = "autoencoder"
    latent_dim: int = ranged(32, least=1, most=2**20)  # m
    network: Network = field(default_factory=Network)


class Autoencoder(Model):
    def __init__(self, config: Config, shape: Shape, seed: int = 0) -> None:
        del seed
        super().__init__()
        require(config, "model")
        self.config = config
        self.encoder = encoder(config.network, shape, config.latent_dim)
        self.decoder = decoder(config.network, shape, config.latent_dim, shape.channels)

    def forward(self, batch: Batch, step: int) -> Output:
        """Returns the squared error of pixels in [0, 1] as the loss, summed over each image, averaged over images."""
        del step
        x = batch.x / 255
        reconstruction = self._images(self._latents(x))
        errors = squared_errors(reconstruction, x)
        return Output(errors.mean() * x[0].numel(), fidelity(errors), reconstruction)

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        """Returns latents fp32 [B, m]."""
        del temperature  # the encoder is deterministic
        return [self._latents(batch.x / 255).float()]

    def decode(
        self,
        latents: list[Tensor],
        condition: Condition | None = None,
        temperature: float = 1.0,
        draw: bool = False,
        sample: Tensor | None = None,
    ) -> Tensor:
        """Decodes latents to images [B, C, H, W]. Raises ValueError without latents: there is no prior to draw from."""
        del condition, temperature, draw, sample  # the decoder is deterministic and unconditional
        if not latents:
            raise ValueError("an autoencoder has no prior to draw samples from: give latents, or train a VAE")
        return self._images(latents[0]).float()

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights: half precision under DeepSpeed's fp16 engine."""
        return next(self.encoder.parameters()).dtype

    def _latents(self, x: Tensor) -> Tensor:
        return self.encoder((x - 0.5).to(self.dtype))

    def _images(self, z: Tensor) -> Tensor:
        return self.decoder(z.to(self.dtype)) + 0.5
