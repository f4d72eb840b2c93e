"""The parts that all VAEs share, whatever their levels: condition, noise, loss and bound.

    image, condition → net → latents z_0 … z_{L−1}, coarse to fine, each with q and p → net → p(x|z)

A net computes q and p of its latents. The caller's `draw` decides which of the two a latent is drawn from, and with
which noise. So the posterior and the prior share one code path.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import distributed
from ..interfaces import Batch, Bound, Condition, Model, Output, Shape, Tensors, by_level
from ..nn import gaussian, noise
from ..nn import likelihood as likelihoods
from ..nn.condition import Conditioner, dropped
from ..nn.fidelity import fidelity, squared_errors
from ..nn.gaussian import Normal
from ..ranges import ranged, require

POSTERIOR, DROPOUT, BOUND, PRIOR = 0, 1, 2, 3  # noise keys, one per purpose


@dataclass(frozen=True)
class Config:
    likelihood: likelihoods.Config = field(default_factory=likelihoods.Config)
    beta: float = ranged(1.0, least=0)  # weight of the KL (Higgins et al. 2017); at 1 the loss is the negative ELBO
    beta_warmup_steps: int = ranged(0, least=0)  # steps over which β rises linearly from 0 (Bowman et al. 2016)
    # λ, in nats per latent (per channel of feature maps): a KL with a mean below λ costs λ (Kingma et al. 2016, eq. 15)
    free_bits: float = ranged(0.0, least=0)
    classes: int = ranged(0, least=0, most=2**24)  # labels 0 … classes − 1; 0: the model has no label input
    embedding_dim: int = ranged(32, least=1, most=2**16)  # channels of the label embedding
    # share of training images whose whole condition, label and attributes, is dropped
    label_dropout: float = ranged(0.0, least=0, below=1)


class Level(NamedTuple):
    """One level of latents z ~ q, [B, D] or [B, D, h, w]."""

    z: Tensor
    q: Normal
    p: Normal
    follows: bool = False  # whether p depends on z, as p(z1|z2) does if z2 was drawn given z1

    def rates(self) -> Tensor:
        """Returns KL(q‖p) in nats of each latent (each channel of feature maps), fp32 [B, D]. If p follows z, this is
        log q(z) − log p(z) of the one draw, because the closed form holds only for a p that does not depend on z."""
        each = self._log_ratios().neg() if self.follows else gaussian.kl(self.q, self.p)
        return each.flatten(2).sum(2) if each.ndim > 2 else each

    def log_ratio(self) -> Tensor:
        """Returns log p(z) − log q(z) in nats, fp32 [B]."""
        return self._log_ratios().flatten(1).sum(1)

    def _log_ratios(self) -> Tensor:
        return self.p.log_density(self.z) - self.q.log_density(self.z)


Draw = Callable[[int, Normal], Tensor]  # (level, its distribution) → z


class Net(nn.Module, ABC):
    """The networks of a model with L levels of latents. `embedded` is the condition as the networks read it, [B, E], or
    None. h is everything that p(x|z) depends on: a vector or a feature map, in a format private to the net."""

    sizes: list[int]  # D of each level, coarse to fine

    @abstractmethod
    def infer(self, x: Tensor, embedded: Tensor | None, draw: Draw) -> tuple[Tensor, list[Level]]:
        """x [B, C, H, W] in [−0.5, 0.5] → (h, levels from coarse to fine), with z drawn from q."""

    def coarsest(self, x: Tensor, embedded: Tensor | None) -> Normal:
        """Returns q of the coarsest latents, if it depends on the image alone."""
        _, levels = self.infer(x, embedded, lambda _, q: q.mean)
        return levels[0].q

    @abstractmethod
    def generate(self, embedded: Tensor | None, images: int, draw: Draw) -> Tensor:
        """Returns h for this number of images, with z drawn from p, from the coarsest level to the finest."""

    @abstractmethod
    def output(self, h: Tensor, embedded: Tensor | None) -> Tensor:
        """h → input of the likelihood, [B, channels, H, W]."""

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights: half precision under DeepSpeed's fp16 engine. Latents are fp32."""
        return next(self.parameters()).dtype

    def standard(self, images: int, dim: int) -> Normal:
        """Returns N(0, I) over vectors [images, dim]."""
        return gaussian.standard(torch.empty(images, dim, device=next(self.parameters()).device))


class Latent(Model):
    """A model with latents z ~ q, whose loss is a distortion and the KL of q and the prior."""

    rates: Tensor  # fp32 [M]: mean KL of each latent over the previous step's global batch, levels concatenated

    def __init__(
        self, config: Config, shape: Shape, seed: int, net: Callable[[int, likelihoods.Likelihood], Net]
    ) -> None:
        """net: (E, likelihood) → the networks. Raises ValueError for invalid settings."""
        super().__init__()
        require(config, "model")
        self.config = config
        self.seed = seed
        self.subpixels = shape.channels * shape.size**2
        conditional = config.classes > 0 or shape.attributes > 0
        self.conditioner = Conditioner(config.classes, config.embedding_dim, shape.attributes) if conditional else None
        self.likelihood = likelihoods.build(config.likelihood, shape.channels)
        self.net = net(self.conditioner.dim if self.conditioner else 0, self.likelihood)
        self.register_buffer("rates", torch.full((sum(self.net.sizes) if config.free_bits else 0,), torch.inf))
        self._pending: list[Tensor] = []

    def forward(self, batch: Batch, step: int) -> Output:
        """Returns as the loss distortion + rate in nats per subpixel, modified by β, warm-up and free bits. Per
        subpixel, so that learning rates and gradient clipping mean the same at every image size."""
        beta = self._beta(step)
        condition = batch.condition
        if self.training and self.config.label_dropout:
            uniform = noise.uniform(batch.sample, (), self.seed, DROPOUT)
            condition = dropped(condition, uniform < self.config.label_dropout)
        output, levels = self._infer(batch, condition, self._noise(batch.sample, POSTERIOR))
        distortion, compared, reconstruction = self._compared(output, batch.x)
        rates = [level.rates() for level in levels]
        joined = torch.cat(rates, dim=1)
        costs = self._costs(joined).sum(1).mean()
        loss = (distortion + beta * costs) / self.subpixels
        with torch.no_grad():
            per_level = torch.stack([level.sum(1).mean() for level in rates])
            rate = per_level.sum()
            metrics = {"distortion": distortion.detach(), "rate": rate, **self._bound(distortion + rate), **compared}
            if len(levels) > 1:
                metrics |= by_level("rate", self._bits(per_level).unbind())
                metrics |= by_level("posterior_scale", [_scale(level) for level in levels])
            mean = joined.mean(0) if self.config.free_bits else None
        if self.training and mean is not None:
            self._note(mean)
        return Output(loss, metrics, reconstruction)

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        """Returns each level's means of q(z|x), fp32 [B, D] or [B, D, h, w], or with a temperature draws around them
        from torch's default generator. Each level is conditioned on the values chosen at the levels before it."""
        x, embedded = self._given(batch, batch.condition)
        _, levels = self.net.infer(x, embedded, lambda _, q: _drawn(q, temperature))
        return [level.z for level in levels]

    def decode(
        self,
        latents: list[Tensor],
        condition: Condition | None = None,
        temperature: float = 1.0,
        draw: bool = False,
        sample: Tensor | None = None,
    ) -> Tensor:
        """Decodes latents; levels that are not given are drawn from the prior. Without a condition the image is
        generated unconditionally. Raises ValueError if there are neither latents nor a condition."""
        if not latents and condition is None:
            raise ValueError("decode needs latents, or a condition that says how many images to draw")
        images = len(latents[0]) if latents else len(condition.label)  # type: ignore[union-attr]
        embedded = self._embedded(condition, images)

        def given_or_drawn(level: int, p: Normal) -> Tensor:
            size = tuple(p.mean.shape[1:])
            own = None if sample is None else noise.normal(sample, size, PRIOR, level, version=self.noise_version)
            z = _drawn(p, temperature, own)  # also if given: what is drawn for the next levels does not depend on it
            return latents[level] if level < len(latents) else z

        output = self.net.output(self.net.generate(embedded, images, given_or_drawn), embedded)
        return self.likelihood.draw(output) if draw else self.likelihood.mean(output)

    def beta(self, step: int) -> float:
        warmup = self.config.beta_warmup_steps
        return self.config.beta * min(1.0, (step + 1) / max(1, warmup))

    @torch.no_grad()
    def update(self, step: int, lr: float) -> None:
        """Stores the step's mean rates, which decide the free bits of the next step."""
        del step, lr
        if self._pending:
            total = distributed.sum_(torch.stack(self._pending).mean(0))
            self.rates.copy_(total / distributed.world())
            self._pending = []

    # Dynamo specialises code to the integers and to the lengths of lists that it sees, and would compile it again in
    # later steps. At the beginning and the end of `forward` these calls split no graph.
    @torch._disable_dynamo  # torch.compiler.disable imports Dynamo at once, which takes seconds
    def _beta(self, step: int) -> Tensor:
        return torch.full((), self.beta(step), device=self.rates.device)

    @torch._disable_dynamo  # torch.compiler.disable imports Dynamo at once, which takes seconds
    def _note(self, rates: Tensor) -> None:
        self._pending.append(rates)

    @abstractmethod
    def _compared(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensors, Tensor]:
        """Compares the decoder's output with x: (distortion in nats per image, a scalar; metrics; reconstruction)."""

    def _bound(self, nats: Tensor) -> Tensors:
        """Returns the metrics of distortion + rate."""
        del nats
        return {}

    def _infer(self, batch: Batch, condition: Condition, draw: Draw) -> tuple[Tensor, list[Level]]:
        """(input of the likelihood, levels)."""
        x, embedded = self._given(batch, condition)
        h, levels = self.net.infer(x, embedded, draw)
        return self.net.output(h, embedded), levels

    def _given(self, batch: Batch, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Image and condition as the networks read them."""
        return (batch.x / 255 - 0.5).to(self.net.dtype), self._embedded(condition, len(batch.x))

    def _noise(self, sample: Tensor, *keys: int) -> Draw:
        """Draws z from q with noise that depends only on the seed, the keys, the level and the sample number."""

        def draw(level: int, q: Normal) -> Tensor:
            size = tuple(q.mean.shape[1:])
            return q.draw(noise.normal(sample, size, self.seed, *keys, level, version=self.noise_version))

        return draw

    def _costs(self, rates: Tensor) -> Tensor:
        """The cost of each latent's KL, [B, M].

        A latent is free if its mean over the global batch is below λ. A micro-batch cannot know that mean, so the
        previous step's is used: the result does not depend on the number of ranks or micro-batches.
        """
        free = self.config.free_bits
        return torch.where(self.rates > free, rates, free) if free else rates

    def _embedded(self, condition: Condition | None, images: int) -> Tensor | None:
        """The condition as the networks read it, [B, E]."""
        if self.conditioner is None:
            return None
        return self.conditioner(condition or self.conditioner.nothing_said(images)).to(self.net.dtype)

    def _bits(self, nats: Tensor) -> Tensor:
        """Nats per image → bits per subpixel."""
        return nats / (self.subpixels * math.log(2))


class Measured(Latent):
    """A model whose coarsest latents follow a distribution q(z|x) that is computed from the image alone. The mean and
    the deviation of each channel of these z are measured when training ends (interfaces.Calibrated), for another model
    that is trained as their prior."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self, config: Config, shape: Shape, seed: int, net: Callable[[int, likelihoods.Likelihood], Net]
    ) -> None:
        super().__init__(config, shape, seed, net)
        for name in ("latent_mean", "latent_std"):
            self.register_buffer(name, torch.full((self.net.sizes[0],), torch.inf))

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of q(z|x) of the coarsest latents, fp32 [B, D] or [B, D, h, w]
        each."""
        q = self.net.coarsest(*self._given(batch, batch.condition))
        return q.mean, q.log_std.exp()

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of each channel of z, fp32 [D]; infinite until measured."""
        return self.latent_mean, self.latent_std

    def calibration(self) -> dict[str, Tensor]:
        return {"means of the latents": self.latent_mean, "their standard deviations": self.latent_std}

    def calibration_sums(self, batch: Batch) -> Tensor:
        """Sums of μ and of μ² + σ² over the images and places, with mean μ and deviation σ of q, and the number of
        places. Nothing is drawn: E z = E μ and Var z = E (μ² + σ²) − (E μ)²."""
        mean, std = (part.double().transpose(0, 1).flatten(1) for part in self.posterior(batch))
        places = torch.full((1,), mean.shape[1], dtype=mean.dtype, device=mean.device)
        return torch.cat([mean.sum(1), (mean.square() + std.square()).sum(1), places])

    def calibrate(self, sums: Tensor) -> None:
        size = len(self.latent_mean)
        first, second = sums[:size] / sums[-1], sums[size:-1] / sums[-1]
        self.latent_mean.copy_(first)
        self.latent_std.copy_((second - first.square()).clamp(min=0).sqrt())


class Variational(Latent):
    """Its distortion is −log p(x|z), so that the loss is −ELBO."""

    def bound(self, batch: Batch, draw: int = 0) -> Bound:
        return self.bound_given(batch, [], draw)

    def bound_given(self, batch: Batch, latents: list[Tensor], draw: int = 0) -> Bound:
        """Returns the bound on log p(x|latents), given all levels or the coarsest; the finer ones are drawn from q."""
        own, given = self._noise(batch.sample, BOUND, draw), len(latents)
        if given == len(self.net.sizes):  # there is nothing to infer
            embedded = self._embedded(batch.condition, len(batch.x))
            h = self.net.generate(embedded, len(batch.x), lambda level, _: latents[level])
            return Bound.exact(-self.likelihood.log_prob(self.net.output(h, embedded), batch.x))

        def given_or_drawn(level: int, q: Normal) -> Tensor:
            return latents[level] if level < given else own(level, q)

        output, levels = self._infer(batch, batch.condition, given_or_drawn)
        return Bound(
            -self.likelihood.log_prob(output, batch.x),
            torch.stack([level.rates().sum(1) for level in levels])[given:],
            torch.stack([level.log_ratio() for level in levels])[given:].sum(0),
        )

    def kl_settings(self) -> Config:
        return self.config

    def _compared(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensors, Tensor]:
        distortion = -self.likelihood.log_prob(output, x).mean()
        with torch.no_grad():
            reconstruction = self.likelihood.mean(output)
            return distortion, fidelity(squared_errors(reconstruction, x / 255)), reconstruction

    def _bound(self, nats: Tensor) -> Tensors:
        return {"bits_per_dim": self._bits(nats)}


class MeasuredVariational(Measured, Variational):
    """A Variational whose coarsest latents follow a distribution of the image alone."""


def _drawn(distribution: Normal, temperature: float, own: Tensor | None = None) -> Tensor:
    """own: the noise; None: of torch's default generator."""
    if not temperature:
        return distribution.mean
    return distribution.draw(temperature * (torch.randn_like(distribution.mean) if own is None else own))


def _scale(level: Level) -> Tensor:
    """The geometric mean of std_q / std_p: how much narrower the posterior is than the prior."""
    return (level.q.log_std - level.p.log_std).mean().exp()
