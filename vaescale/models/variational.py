"""What all VAEs have in common, whatever their levels are: condition, noise, loss and bound.

    image, condition → net → latents z_0 … z_{L−1}, coarse to fine, each with q and p → net → p(x|z)

A net knows q and p of its latents; from which of them a latent is drawn, and with which noise, it is told. So posterior
and prior are one way through it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import distributed
from ..interfaces import Batch, Bound, Condition, Model, Output, Shape, by_level
from ..nn import gaussian, noise
from ..nn import likelihood as likelihoods
from ..nn.condition import Conditioner, dropped
from ..nn.fidelity import fidelity, squared_errors
from ..nn.gaussian import Normal
from ..ranges import ranged, require

POSTERIOR, DROPOUT, BOUND = 0, 1, 2  # what noise is drawn for


@dataclass(frozen=True)
class Config:
    likelihood: likelihoods.Config = field(default_factory=likelihoods.Config)
    beta: float = ranged(1.0, least=0)  # weighs the KL (Higgins et al. 2017); the loss is the negative ELBO at 1
    warmup: int = ranged(0, least=0)  # steps in which β rises linearly from 0 (Bowman et al. 2016)
    # λ, nats a latent, of feature maps a channel: a KL whose mean is below it costs λ (Kingma et al. 2016, equation 15)
    free_bits: float = ranged(0.0, least=0)
    classes: int = ranged(0, least=0, most=2**24)  # labels 0 … classes − 1; 0: the model is told no label
    embedding: int = ranged(32, least=1, most=2**16)  # channels of a label
    # share of training images of which nothing is said: label and attributes
    label_dropout: float = ranged(0.0, least=0, below=1)


class Level(NamedTuple):
    """The latents z ~ q of one level, [B, D] or [B, D, h, w]."""

    z: Tensor
    q: Normal
    p: Normal
    follows: bool = False  # p depends on z, as p(z1|z2) does where z2 was drawn given z1

    def rates(self) -> Tensor:
        """KL(q‖p) of each latent, of feature maps each channel, in nats, fp32 [B, D]. Where p follows z, it is one
        draw's log q(z) − log p(z): the closed form would be that of a z which p does not know."""
        each = self._log_ratios().neg() if self.follows else gaussian.kl(self.q, self.p)
        return each.flatten(2).sum(2) if each.ndim > 2 else each

    def log_ratio(self) -> Tensor:
        """log p(z) − log q(z), fp32 [B]."""
        return self._log_ratios().flatten(1).sum(1)

    def _log_ratios(self) -> Tensor:
        return self.p.log_density(self.z) - self.q.log_density(self.z)


Draw = Callable[[int, Normal], Tensor]  # (level, its distribution) → z


class Net(nn.Module, ABC):
    """The networks of a model with L levels of latents. told: the condition, [B, E], or None. h: all that p(x|z)
    depends on, a vector or a feature map of the net's own."""

    sizes: list[int]  # D of each level, coarse to fine

    @abstractmethod
    def infer(self, x: Tensor, told: Tensor | None, draw: Draw) -> tuple[Tensor, list[Level]]:
        """x: [B, C, H, W] in [−0.5, 0.5] → (h, levels, coarse to fine), with z drawn from q."""

    @abstractmethod
    def generate(self, told: Tensor | None, images: int, draw: Draw) -> Tensor:
        """h of so many images, with z drawn from p, from the coarsest level to the finest."""

    @abstractmethod
    def read(self, h: Tensor, told: Tensor | None) -> Tensor:
        """→ what the likelihood reads, [B, channels, H, W]."""

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights: half under DeepSpeed's fp16 engine. Latents are fp32."""
        return next(self.parameters()).dtype

    def standard(self, images: int, dim: int) -> Normal:
        """N(0, I) of vectors [images, dim]."""
        return gaussian.standard(torch.empty(images, dim, device=next(self.parameters()).device))


class Variational(Model):
    rates: Tensor  # fp32 [M]: mean KL of each latent in the step before, over the global batch; levels in a row

    def __init__(
        self, config: Config, shape: Shape, seed: int, net: Callable[[int, likelihoods.Likelihood], Net]
    ) -> None:
        """net: (E, likelihood) → the networks. Raises ValueError for values that cannot be."""
        super().__init__()
        require(config, "model")
        self.config = config
        self.seed = seed
        self.subpixels = shape.channels * shape.size**2
        told = config.classes > 0 or shape.attributes > 0
        self.conditioner = Conditioner(config.classes, config.embedding, shape.attributes) if told else None
        self.likelihood = likelihoods.build(config.likelihood, shape.channels)
        self.net = net(self.conditioner.dim if self.conditioner else 0, self.likelihood)
        self.register_buffer("rates", torch.full((sum(self.net.sizes) if config.free_bits else 0,), torch.inf))
        self._pending: list[Tensor] = []

    def forward(self, batch: Batch, step: int) -> Output:
        """The loss is −ELBO in nats a subpixel, up to β, warm-up and free bits: learning rates and the clipping of
        gradients keep their meaning from one image size to another."""
        condition = batch.condition
        if self.training and self.config.label_dropout:
            uniform = noise.uniform(batch.sample, (), self.seed, DROPOUT)
            condition = dropped(condition, uniform < self.config.label_dropout)
        output, levels = self._infer(batch, condition, self._noise(batch.sample, POSTERIOR))
        distortion = -self.likelihood.log_prob(output, batch.x).mean()
        rates = [level.rates() for level in levels]
        costs = self._costs(torch.cat(rates, dim=1)).sum(1).mean()
        loss = (distortion + self.beta(step) * costs) / self.subpixels
        with torch.no_grad():
            per_level = torch.stack([level.sum(1).mean() for level in rates])
            rate = per_level.sum()
            reconstruction = self.likelihood.mean(output)
            metrics = {
                "distortion": distortion.detach(),
                "rate": rate,
                "bits_per_dim": self._bits(distortion + rate),
                **fidelity(squared_errors(reconstruction, batch.x / 255)),
            }
            if len(levels) > 1:
                metrics |= by_level("rate", self._bits(per_level).unbind())
                metrics |= by_level("posterior_scale", [_scale(level) for level in levels])
        return Output(loss, metrics, reconstruction)

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        """A level's means of q(z|x), or draws around them, fp32 [B, D] or [B, D, h, w], from torch's default generator.
        A level is given what was chosen in those before it."""
        x, told = self._given(batch, batch.condition)
        _, levels = self.net.infer(x, told, lambda _, q: _drawn(q, temperature))
        return [level.z for level in levels]

    def decode(
        self, latents: list[Tensor], condition: Condition | None = None, temperature: float = 1.0, draw: bool = False
    ) -> Tensor:
        """Without a condition nothing is said; raises ValueError if there are no latents either."""
        if not latents and condition is None:
            raise ValueError("decode needs latents, or a condition that says how many images to draw")
        images = len(latents[0]) if latents else len(condition.label)  # type: ignore[union-attr]
        told = self._told(condition, images)

        def given_or_drawn(level: int, p: Normal) -> Tensor:
            z = _drawn(p, temperature)  # in any case: the noise of a level shall not depend on how many are given
            return latents[level] if level < len(latents) else z

        output = self.net.read(self.net.generate(told, images, given_or_drawn), told)
        return self.likelihood.draw(output) if draw else self.likelihood.mean(output)

    def bound(self, batch: Batch, draw: int = 0) -> Bound:
        output, levels = self._infer(batch, batch.condition, self._noise(batch.sample, BOUND, draw))
        return Bound(
            -self.likelihood.log_prob(output, batch.x),
            torch.stack([level.rates().sum(1) for level in levels]),
            torch.stack([level.log_ratio() for level in levels]).sum(0),
        )

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

    def _infer(self, batch: Batch, condition: Condition, draw: Draw) -> tuple[Tensor, list[Level]]:
        """(what the likelihood reads, levels)"""
        x, told = self._given(batch, condition)
        h, levels = self.net.infer(x, told, draw)
        return self.net.read(h, told), levels

    def _given(self, batch: Batch, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Image and condition as the networks read them."""
        return (batch.x / 255 - 0.5).to(self.net.dtype), self._told(condition, len(batch.x))

    def _noise(self, sample: Tensor, *keys: int) -> Draw:
        """z from q with noise that only the seed, the keys, the level and the sample's number decide."""

        def draw(level: int, q: Normal) -> Tensor:
            return q.draw(noise.normal(sample, tuple(q.mean.shape[1:]), self.seed, *keys, level))

        return draw

    def _costs(self, rates: Tensor) -> Tensor:
        """What each latent's KL costs, [B, M].

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
        return self.conditioner(condition or self.conditioner.nothing_said(images)).to(self.net.dtype)

    def _bits(self, nats: Tensor) -> Tensor:
        """A subpixel."""
        return nats / (self.subpixels * math.log(2))


def _drawn(distribution: Normal, temperature: float) -> Tensor:
    if not temperature:
        return distribution.mean
    return distribution.draw(temperature * torch.randn_like(distribution.mean))


def _scale(level: Level) -> Tensor:
    """How much narrower the posterior is than the prior: the geometric mean of their standard deviations' ratio."""
    return (level.q.log_std - level.p.log_std).mean().exp()
