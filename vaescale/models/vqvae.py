"""VQ-VAE: van den Oord, Vinyals, Kavukcuoglu 2017, "Neural discrete representation learning", section 4.1.

    image [B, C, H, W] → encoder → [B, D, H/f, W/f] → nearest codes int64 [B, H/f, W/f] → decoder → [B, C, H, W]

With H = W = 128, f = 4 and K = 512 the code map is that of the paper's ImageNet experiment, 32 × 32 × 1. The networks
may also be others (nn/networks.py).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..interfaces import Batch, Bound, Condition, Model, Output, Shape, Usage
from ..nn import conv, networks, quantize
from ..nn import reconstruction as losses
from ..nn.likelihood import gaussian_log_prob
from ..nn.reconstruction import Reconstruction
from ..ranges import ranged, require

LEAST_STD = 1e-4  # of the error: far below the width of an 8-bit value's bin, so that images without error cost 0 bits


@dataclass(frozen=True)
class Config:
    kind: str = "vqvae"
    network: Any = field(default_factory=conv.Config)  # the settings of one of nn.networks.NETWORKS
    checkpointing: bool = False  # recompute a block's activations in the backward pass instead of storing them
    # The variance of pixels in [0, 1], which divides the squared error. So a reconstruction no better than the mean
    # costs 1, and β means the same on any data.
    variance: float = ranged(0.06, above=0)
    # in place of the squared error, or with a perceptual distance in addition to it
    reconstruction: losses.Config = field(default_factory=losses.Config)
    quantizer: quantize.Config = field(default_factory=quantize.Config)


class VQVAE(Model):
    error_std: (
        Tensor  # fp32 [C]: root mean square of the error of each channel, pixels in [0, 1]; infinite: not measured
    )

    def __init__(self, config: Config, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        require(config, "model")
        self.config = config
        dim = config.quantizer.dim
        self.encoder = networks.encoder(config.network, shape.channels, dim, config.checkpointing)
        self.quantizer = quantize.build(config.quantizer, seed)
        self.decoder = networks.decoder(config.network, dim, shape.channels, config.checkpointing)
        self.reconstruction = Reconstruction(config.reconstruction, shape, config.variance)
        self.register_buffer("error_std", torch.full((shape.channels,), torch.inf))

    def forward(self, batch: Batch, step: int) -> Output:
        del step
        quantized = self.quantizer(self._features(batch.x / 255))
        reconstruction = self._images(quantized.z)
        compared_loss, compared = self.reconstruction(reconstruction, batch.x)
        loss = compared_loss + quantized.loss
        metrics = {
            **compared,
            **{f"{name}/commitment": value for name, value in zip(self.codebooks, quantized.commitment, strict=True)},
        }
        if self.training:
            self._collect()
        return Output(loss, metrics, reconstruction)

    def reconstruction_loss(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        """Returns the part of the loss that compares the reconstruction with x, uint8, both [B, C, H, W]: a scalar."""
        return self.reconstruction(reconstruction, x)[0]

    @torch._disable_dynamo  # at the end of `forward`, so that all before it is one graph
    def _collect(self) -> None:
        self.quantizer.collect()

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        """Returns codes int64 [B, H/f, W/f], one tensor per codebook."""
        del temperature  # the nearest code is deterministic
        codes = self.quantizer(self._features(batch.x / 255)).codes
        return list(codes.unbind(-1)) if len(self.quantizer.sizes) > 1 else [codes]

    def decode(
        self,
        latents: list[Tensor],
        condition: Condition | None = None,
        temperature: float = 1.0,
        draw: bool = False,
        sample: Tensor | None = None,
    ) -> Tensor:
        """Decodes codes to images [B, C, H, W]. Raises ValueError without codes: the model has no prior."""
        del condition, temperature, draw, sample  # the decoder is deterministic and unconditional
        if not latents:
            raise ValueError("a VQ-VAE has no prior of its own to draw samples from: give codes")
        codes = torch.stack(latents, dim=-1) if len(latents) > 1 else latents[0]
        return self._images(self.quantizer.lookup(codes)).float()

    def bound_given(self, batch: Batch, latents: list[Tensor], draw: int = 0) -> Bound:
        """Returns −log p(x|z) in nats, fp32 [B], where p is a discretised Gaussian around the decoded image. Its
        standard deviation in each channel is `error_std`, which the likelihood of the undiscretised Gaussian has at its
        maximum over the training set."""
        del draw
        return Bound.exact(-gaussian_log_prob(self.decode(latents), self.error_std[:, None, None], batch.x))

    def calibration(self) -> dict[str, Tensor]:
        return {"root mean square error of the channels": self.error_std}

    def calibration_sums(self, batch: Batch) -> Tensor:
        """Sums of the squared error of each channel over the images and pixels, and the number of pixels."""
        errors = (self.decode(self.encode(batch)).double() - batch.x.double() / 255).square()
        pixels = torch.full((1,), errors[:, 0].numel(), dtype=errors.dtype, device=errors.device)
        return torch.cat([errors.sum((0, 2, 3)), pixels])

    def calibrate(self, sums: Tensor) -> None:
        self.error_std.copy_((sums[:-1] / sums[-1]).sqrt().clamp(min=LEAST_STD))

    def update(self, step: int, lr: float) -> None:
        self.quantizer.update(step, lr)

    def freeze_encoder(self) -> None:
        self.encoder.requires_grad_(False)
        self.quantizer.freeze()

    def usage(self, clear: bool) -> dict[str, Usage]:
        return dict(zip(self.codebooks, self.quantizer.usages(clear), strict=True))

    def quantizers(self) -> dict[str, quantize.Config]:
        return dict.fromkeys(self.codebooks, self.config.quantizer)

    @property
    def codebooks(self) -> list[str]:
        """Names of the codebooks, coarse to fine."""
        count = len(self.quantizer.sizes)
        return [f"codebook{i}" for i in range(count)] if count > 1 else ["codebook"]

    @property
    def last_layer(self) -> nn.Module:
        """The convolution that computes the reconstruction."""
        return self.decoder.last

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights: half precision under DeepSpeed's fp16 engine."""
        return next(self.encoder.parameters()).dtype

    def _features(self, x: Tensor) -> Tensor:
        centred = (x - 0.5).to(self.dtype)
        return rearrange(self.encoder(centred), "b d h w -> b h w d")

    def _images(self, z: Tensor) -> Tensor:
        features = rearrange(z, "b h w d -> b d h w").to(self.dtype)
        return self.decoder(features) + 0.5
