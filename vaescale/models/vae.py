"""VAE: Kingma, Welling 2014, "Auto-encoding variational Bayes"; conditional where it is told labels or attributes.

    image [B, C, H, W] → encoder → q(z|x) = N(g, diag h²) → z = g + h ⊙ ζ, [B, m] → decoder → p(x|z);  p(z) = N(0, I)

One network gives g and log h. With the Gaussian likelihood the loss is C ‖x − f(z)‖² + KL(q‖p) up to a constant, with
C = 1/(2c) and c given or learned. A label y and attributes stand beside the image in the encoder and beside z in the
decoder, q(z|x, y) and p(x|z, y) (Sohn, Lee, Yan 2015); p(z) does not depend on them.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import distributed
from ..interfaces import Batch, Bound, Condition, Model, Output, Shape
from ..nn import gaussian, noise
from ..nn import likelihood as likelihoods
from ..nn.blocks import Network, decoder, encoder
from ..nn.condition import Conditioner, dropped
from ..nn.fidelity import fidelity, squared_errors
from ..nn.gaussian import Normal

POSTERIOR, DROPOUT, BOUND = 0, 1, 2  # what noise is drawn for


@dataclass(frozen=True)
class Config:
    kind: str = "vae"
    latents: int = 64  # m
    network: Network = field(default_factory=Network)
    likelihood: likelihoods.Config = field(default_factory=likelihoods.Config)
    beta: float = 1.0  # weighs the KL (Higgins et al. 2017); the loss is the negative ELBO at 1
    warmup: int = 0  # steps in which β rises linearly from 0 (Bowman et al. 2016)
    free_bits: float = 0.0  # λ, nats a latent: a KL whose mean is below it costs λ (Kingma et al. 2016, equation 15)
    classes: int = 0  # labels 0 … classes − 1; 0: the model is told no label
    embedding: int = 32  # channels of a label
    label_dropout: float = 0.0  # share of training images of which nothing is said: label and attributes


class VAE(Model):
    rates: Tensor  # fp32 [m]: mean KL of each latent in the step before, over the global batch

    def __init__(self, config: Config, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        _require(config)
        self.config = config
        self.seed = seed
        self.subpixels = shape.channels * shape.size**2
        told = config.classes > 0 or shape.attributes > 0
        self.conditioner = Conditioner(config.classes, config.embedding, shape.attributes) if told else None
        extra = self.conditioner.dim if self.conditioner else 0
        self.likelihood = likelihoods.build(config.likelihood, shape.channels)
        self.encoder = encoder(config.network, shape, 2 * config.latents, extra)
        self.decoder = decoder(config.network, shape, config.latents + extra, self.likelihood.channels)
        self.register_buffer("rates", torch.full((config.latents,), torch.inf))
        self._pending: list[Tensor] = []

    def forward(self, batch: Batch, step: int) -> Output:
        """The loss is −ELBO in nats a subpixel, up to β, warm-up and free bits: learning rates and the clipping of
        gradients keep their meaning from one image size to another."""
        condition = batch.condition
        if self.training and self.config.label_dropout:
            uniform = noise.uniform(batch.sample, (), self.seed, DROPOUT)
            condition = dropped(condition, uniform < self.config.label_dropout)
        told = self._told(condition, len(batch.x))
        q = self._posterior(batch.x, told)
        z = q.draw(noise.normal(batch.sample, (self.config.latents,), self.seed, POSTERIOR))
        output = self._output(z, told)
        distortion = -self.likelihood.log_prob(output, batch.x).mean()
        rates = q.rates()
        loss = (distortion + self.beta(step) * self._costs(rates).sum(1).mean()) / self.subpixels
        with torch.no_grad():
            rate = rates.sum(1).mean()
            reconstruction = self.likelihood.mean(output)
            metrics = {
                "distortion": distortion.detach(),
                "rate": rate,
                "bits_per_dim": (distortion + rate) / (self.subpixels * math.log(2)),
                **fidelity(squared_errors(reconstruction, batch.x / 255)),
            }
        return Output(loss, metrics, reconstruction)

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        """[g + temperature · h ⊙ ζ], fp32 [B, m], ζ from torch's default generator."""
        q = self._posterior(batch.x, self._told(batch.condition, len(batch.x)))
        return [q.draw(temperature * torch.randn_like(q.mean)) if temperature else q.mean]

    def decode(
        self, latents: list[Tensor], condition: Condition | None = None, temperature: float = 1.0, draw: bool = False
    ) -> Tensor:
        """Without a condition nothing is said; raises ValueError if there are no latents either."""
        if latents:
            (z,) = latents
        elif condition is not None:
            images, device = len(condition.label), condition.label.device
            z = temperature * torch.randn(images, self.config.latents, device=device)
        else:
            raise ValueError("decode needs latents, or a condition that says how many images to draw")
        output = self._output(z, self._told(condition, len(z)))
        return self.likelihood.draw(output) if draw else self.likelihood.mean(output)

    def bound(self, batch: Batch, draw: int = 0) -> Bound:
        told = self._told(batch.condition, len(batch.x))
        q = self._posterior(batch.x, told)
        z = q.draw(noise.normal(batch.sample, (self.config.latents,), self.seed, BOUND, draw))
        distortion = -self.likelihood.log_prob(self._output(z, told), batch.x)
        return Bound(distortion, q.rates().sum(1)[None], gaussian.standard_log_prob(z) - q.log_prob(z))

    def beta(self, step: int) -> float:
        warmup = self.config.warmup
        return self.config.beta * min(1.0, (step + 1) / max(1, warmup))

    @torch.no_grad()
    def update(self, step: int, lr: float) -> None:
        """Mean rates of the step, for the free bits of the next."""
        del step, lr
        if self._pending:
            total = distributed.sum_(torch.stack(self._pending).mean(0))
            self.rates.copy_(total / distributed.world())
            self._pending = []

    def _costs(self, rates: Tensor) -> Tensor:
        """What each latent's KL costs, [B, m].

        Whether a latent is free is a matter of its mean over the global batch, which no micro-batch knows: that of the
        step before decides, so that ranks and accumulation change nothing.
        """
        free = self.config.free_bits
        if not free:
            return rates
        if self.training:
            self._pending.append(rates.detach().mean(0))
        return torch.where(self.rates > free, rates, free)

    def _told(self, condition: Condition | None, images: int) -> Tensor | None:
        """[B, E]: the condition as the networks read it."""
        if self.conditioner is None:
            return None
        return self.conditioner(condition or self.conditioner.nothing_said(images)).to(self.dtype)

    def _posterior(self, x: Tensor, told: Tensor | None) -> Normal:
        centred = (x / 255 - 0.5).to(self.dtype)
        return gaussian.normal(self.encoder(centred, told))

    def _output(self, z: Tensor, told: Tensor | None) -> Tensor:
        z = z.to(self.dtype)
        return self.decoder(z if told is None else torch.cat([z, told], dim=1))

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights: half under DeepSpeed's fp16 engine."""
        return next(self.encoder.parameters()).dtype


def _require(config: Config) -> None:
    """Raises ValueError."""
    for key, least in (("latents", 1), ("beta", 0), ("warmup", 0), ("free_bits", 0), ("classes", 0), ("embedding", 1)):
        if getattr(config, key) < least:
            raise ValueError(f"model.{key}={getattr(config, key)} must be at least {least}")
    if not 0 <= config.label_dropout < 1:
        raise ValueError(f"model.label_dropout={config.label_dropout} must be a share, at least 0 and below 1")
