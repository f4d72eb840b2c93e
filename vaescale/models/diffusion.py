"""Diffusion: a hierarchical VAE whose encoder is fixed and adds noise.

Kingma, Salimans, Poole, Ho 2021, "Variational diffusion models" (VDM). The latents are ever less noisy copies z_1 … z_0
of x, in T levels or, in the limit, infinitely many (nn/diffusion.py):

    x → q(z_1|x) … q(z_0|x)                     fixed: Gaussian noise
    z_1 ~ N(0, I) → p(z_s|z_t) … → z_0 → p(x|z_0)   a network predicts the noise, hence x, from z_t and γ_t

    −log p(x) ≤ KL(q(z_1|x) ‖ N(0, I)) + Σ KL(q(z_s|z_t, x) ‖ p(z_s|z_t)) − log p(x|z_0)

The sum is estimated at one level for each image, chosen so that consecutive sample numbers spread evenly over all
levels. It is reported in a few parts by γ, as the rates of so many levels: where the bits go.

over: pixels. x is the image, and p(x|z_0) a discretised Gaussian around z_0 / α_0.
over: RUN. x are the latents of that run's model, which stays as it is: a prior in place of its own. Then
−log p(image) ≤ −log p(image|x) + rate, with the rate −H(q(x|image)) + the bound above of a density. If the model has
several levels, x are the coarsest, and −log p(image|x) is the model's bound with the finer ones, given x. With
`encoder_noise` x is the mean of q(x|image), z_0 takes the place of the latents, and the rate is that of z_0, as in
Unified Latents (2026).

weighting: flow. The network predicts the velocity of flow matching and is trained with the weights of Esser et al.
2024, "Scaling rectified flow transformers", for good samples. The bound is that of the same model, with its own
weights.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..interfaces import Batch, Bound, Codec, Condition, Model, Output, PixelLikelihood, Sampling, Shape, by_level
from ..nn import diffusion, noise
from ..nn.condition import Conditioner, dropped
from ..nn.diffusion import Prediction
from ..nn.dit import DiT
from ..nn.transformer import Dropout
from ..nn.unet import UNet
from ..ranges import ranged, require
from .diffusion_data import Latents, Pixels

PIXELS = "pixels"
WAVES = (7, 8)  # n of the sines and cosines of 2^n π x that a network sees next to pixels in [−1, 1] (VDM, appendix C)
SIZE = 256  # of the waves of γ
SILVER = math.sqrt(2) - 1  # multiples of it, modulo 1, are spread evenly
# noise keys, one per purpose
UNCONDITIONAL, DROPOUT, LATENT, TIME, NOISE, LAST, BOUND, DRAW = range(8)


@dataclass(frozen=True)
class Config:
    kind: str = "diffusion"
    over: str = PIXELS  # or the run over whose coarsest latents: a vae, kl, vdvae, or an hvae that infers top-down
    weighting: Literal["elbo", "flow"] = "elbo"  # of the loss: for bits/dim, or for samples
    net: Literal["transformer", "unet"] = "transformer"
    width: int = ranged(384, least=4, most=2**16)  # of the transformer; channels of the U-Net at full resolution
    depth: int = ranged(12, least=1, most=4096)  # blocks of the transformer; residual blocks at each resolution
    heads: int = ranged(6, least=1, most=2**14)  # of the transformer
    patch: int = ranged(2, least=1, most=1024)  # pixels or latents per side that make a token
    halvings: int = ranged(1, least=0, most=16)  # of the U-Net
    dropout: float = ranged(0.0, least=0, below=1)  # in training, in all branches
    checkpointing: bool = False  # recompute the activations of blocks in the backward pass instead of storing them
    classes: int = ranged(0, least=0, most=2**24)  # labels 0 … classes − 1; 0: the model has no label input
    # share of training images whose whole condition, label and attributes, is dropped
    label_dropout: float = ranged(0.1, least=0, below=1)
    timesteps: int = ranged(0, least=0, most=2**20)  # T, the levels of the bound; 0: infinitely many
    gamma_min: float = ranged(-13.3, least=-20, most=20)  # γ of z_0
    gamma_max: float = ranged(5.0, least=-20, most=20)  # γ of z_1; of a flow, whose samples start at pure noise, 14
    learned_ends: bool = False  # learn both, from these values on
    levels: int = ranged(8, least=1, most=1024)  # parts by γ in which the rate is reported, besides that of z_1
    # over latents: the logarithm of the signal-to-noise ratio of z_0, −gamma_min then; 0: the latents' own noise
    encoder_noise: float = ranged(0.0, least=0, most=20)
    sampler: Literal["ancestral", "ddim", "heun"] = "ddim"
    sample_steps: int = ranged(50, least=1, most=2**20)  # ancestral with `timesteps`: as many as these


class Diffusion(Model):
    """The loss is the bound in nats per dimension of x, without what does not depend on the network; or the squared
    error of the velocity."""

    def __init__(self, config: Config, shape: Shape, seed: int, codec: Model | None) -> None:
        super().__init__()
        require(config, "model")
        _check(config, codec)
        self.config = config
        self.seed = seed
        self.sampling = Sampling()
        self.subpixels = shape.channels * shape.size**2
        fixed = config.encoder_noise > 0
        self.data = Pixels(shape) if codec is None else Latents(codec, shape, config.classes, fixed)
        self.moved = nn.Parameter(torch.zeros(2)) if config.learned_ends else None  # see `ends`
        channels, height, _ = self.data.shape
        self.conditioner: Conditioner | None = None
        if config.classes or shape.attributes:
            self.conditioner = Conditioner(config.classes, config.width, shape.attributes)
            self.projected = nn.Linear(self.conditioner.dim, config.width)
        self.embedding = nn.Sequential(nn.Linear(SIZE, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        read = channels * (1 + 2 * len(WAVES)) if codec is None else channels
        self.net = _net(config, read, channels, height)

    @property
    def codec(self) -> Codec | None:
        """The model whose latents these are, on the device of the network; None over pixels."""
        return self.data.codec(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def ends(self) -> tuple[Tensor, Tensor]:
        """Returns the lowest and the highest γ, fp64 [] each. They are learned as a shift of the lowest one and the
        logarithm of a factor of the range between them, so that weight decay pulls towards the configured ones."""
        config = self.config
        lowest = -config.encoder_noise if config.encoder_noise else config.gamma_min
        low, width = torch.full((), lowest, dtype=torch.float64, device=self.device), config.gamma_max - lowest
        if self.moved is None:
            return low, low + width
        shift, factor = self.moved.double()
        return low + shift, low + shift + width * factor.exp()

    def with_sampling(self, sampling: Sampling) -> "Diffusion":
        """Returns a model with the same weights that draws samples with this guidance. Raises ValueError for settings
        of priors over codes, and for guidance of a model that has none."""
        if sampling != Sampling(guidance=sampling.guidance):
            raise ValueError("top_k, top_p, passes and positions are for priors over codes, not for a diffusion")
        if sampling.guidance != 1 and self.conditioner is None:
            raise ValueError("guidance needs a model with model.classes or data.attributes")
        if sampling.guidance != 1 and not self.config.label_dropout:
            raise ValueError("guidance needs a model that was trained with model.label_dropout above 0")
        other = copy.copy(self)
        other.sampling = sampling
        return other

    def sampling_protocol(self) -> dict[str, Any]:
        return {"guidance": self.sampling.guidance, "sampler": self.config.sampler, "sample_steps": self._steps}

    def forward(self, batch: Batch, step: int) -> Output:
        del step
        x, negentropy = self._drawn(batch)
        condition, dropout = batch.condition, None
        if self.training and self.config.label_dropout:
            uniform = noise.uniform(batch.sample, (), self.seed, UNCONDITIONAL)
            condition = dropped(condition, uniform < self.config.label_dropout)
        if self.training and self.config.dropout:
            dropout = Dropout(self.config.dropout, batch.sample, (self.seed, DROPOUT))
        given = self._given(condition, len(x))
        if self.config.weighting == "flow":
            return self._flow_step(x, given, batch.sample, dropout)
        noises, time = self._noises(batch.sample, self.seed), noise.spread(batch.sample, self.seed, TIME)
        rate = self._rates(x, negentropy, noises, given, time, dropout).mean(1)
        metrics = {"rate": rate.sum().detach(), **by_level("rate", self._bits(rate.detach()).unbind())}
        nats = rate.sum()
        if self.config.over == PIXELS:  # else it does not depend on this network
            distortion = self.data.bound_given(batch, x, noises[1], self.ends()[0]).distortion.mean()
            nats = nats + distortion
            metrics |= {"distortion": distortion.detach(), "bits_per_dim": self._bits(nats.detach())}
        return Output(nats / x[0].numel(), metrics, None)

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        """Returns the image in [−1, 1] as one level, fp32 [B, C, H, W], or all latents of the other model."""
        return self.data.encode(batch, temperature)

    def decode(
        self,
        latents: list[Tensor],
        condition: Condition | None = None,
        temperature: float = 1.0,
        draw: bool = False,
        sample: Tensor | None = None,
    ) -> Tensor:
        """Decodes latents; if none are given, x is sampled. Finer latents that are not given are drawn by the other
        model. Raises ValueError if x is to be sampled without a condition, which says how many images, or at another
        temperature than 1."""
        if not latents:
            if condition is None:
                raise ValueError("decode needs latents, or a condition that says how many images to draw")
            if temperature != 1:
                raise ValueError(f"a diffusion has no temperature {temperature:g}: leave it at 1")
            if sample is None:
                sample = torch.randint(2**62, condition.label.shape, device=condition.label.device)
            latents = self.data.latents(self._sampled(condition, sample))
        return self.data.decode(latents, condition, temperature, draw, sample)

    @torch.no_grad()
    def _sampled(self, condition: Condition, sample: Tensor) -> Tensor:
        """Draws x, of which that of an image depends only on its condition and its number."""
        given, guidance = self._given(condition, len(sample)), self.sampling.guidance
        predict = partial(self._predict, given=given)
        if guidance != 1 and self.conditioner is not None:
            nothing = self._given(self.conditioner.nothing_said(len(sample)), len(sample))
            predict = partial(self._guided, torch.cat([given, nothing]))

        def draw(number: int) -> Tensor:
            return noise.normal(sample, self.data.shape, DRAW, number)

        gammas = diffusion.grid(*self.ends(), self._steps, self.config.weighting == "flow")
        return diffusion.sampled(predict, draw, gammas, self.config.sampler)

    def _guided(self, both: Tensor, z: Tensor, gamma: Tensor) -> Prediction:
        """both: with the condition and without it, [2 B, width]."""
        found = self._predict(torch.cat([z, z]), torch.cat([gamma, gamma]), both)
        pairs = [part.chunk(2) for part in found]
        return Prediction(*(torch.lerp(without, with_it, self.sampling.guidance) for with_it, without in pairs))

    def _flow_step(self, x: Tensor, given: Tensor, sample: Tensor, dropout: Dropout | None) -> Output:
        """The squared error of the velocity at logit-normal places of the path (Esser et al. 2024, section 3.1)."""
        gamma = 2 * torch.special.ndtri(noise.spread(sample, self.seed, TIME))
        own = noise.normal(sample, self.data.shape, self.seed, NOISE)
        velocity = self._output(diffusion.noised(x, own, gamma), gamma, given, dropout)
        loss = F.mse_loss(velocity, own - x)
        return Output(loss, {"velocity_error": loss.detach()}, None)

    def _rates(
        self,
        x: Tensor,
        negentropy: Tensor,
        noises: tuple[Tensor, Tensor],
        given: Tensor,
        time: Tensor,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Returns the rate in nats by parts, fp32 [parts, B]: of z_1, of the steps in parts by γ, and over latents of
        the last step. noises: of z_t and of z_0; time: t, fp64 [B] in (0, 1); the costs there stand for all steps."""
        own, last = noises
        lowest, highest = self.ends()
        steps, parts = self.config.timesteps, self.config.levels
        if steps:
            number = (time * steps).ceil()
            parts = min(parts, steps)
            part = (steps - number.long()) * parts // steps
            time = number / steps
        else:
            part = ((1 - time) * parts).long().clamp(max=parts - 1)
        gamma = lowest + (highest - lowest) * time
        predicted = self._predict(diffusion.noised(x, own, gamma), gamma, given, dropout).noise
        if steps:
            cost = steps * diffusion.step_kl(own, predicted, (highest - lowest) / steps)
        else:
            cost = (highest - lowest).float() / 2 * (own - predicted).square().flatten(1).sum(1)
        levels = torch.where(part == torch.arange(parts, device=x.device)[:, None], cost, 0)
        first = diffusion.prior_kl(x, highest)[None]
        if not self.data.continuous:
            return torch.cat([first, levels])
        rest = negentropy + diffusion.density(last, lowest)
        return torch.cat([first, levels, rest[None]])

    def _noises(self, sample: Tensor, *keys: int) -> tuple[Tensor, Tensor]:
        """The noise of z_t, at the one t of an image, and of z_0."""
        own, last = (noise.normal(sample, self.data.shape, *keys, purpose) for purpose in (NOISE, LAST))
        return own, last

    def _predict(self, z: Tensor, gamma: Tensor, given: Tensor, dropout: Dropout | None = None) -> Prediction:
        output = self._output(z, gamma, given, dropout)
        if self.config.weighting == "flow":
            return diffusion.from_velocity(z, output, gamma)
        return diffusion.from_noise(z, z + output, gamma)  # where there is almost only noise, z is it

    def _output(self, z: Tensor, gamma: Tensor, given: Tensor, dropout: Dropout | None) -> Tensor:
        """What the network returns, fp32 in the shape of z."""
        read = diffusion.flow(z, gamma)[0] if self.config.weighting == "flow" else z
        if self.config.over == PIXELS:
            turns = [2**n * math.pi * read for n in WAVES]
            read = torch.cat([read, *(wave for turn in turns for wave in (turn.sin(), turn.cos()))], dim=1)
        dtype = given.dtype
        vector = self.embedding(diffusion.waves(gamma, SIZE).to(dtype)) + given
        return self.net(read.to(dtype), vector, dropout).float()

    # Dynamo would compile the other model with this one. At the beginning of `forward` this call splits no graph.
    @torch._disable_dynamo  # torch.compiler.disable imports Dynamo at once, which takes seconds
    def _drawn(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.data.drawn(batch, self.seed, LATENT)

    def _given(self, condition: Condition, images: int) -> Tensor:
        """The condition as the network reads it, [B, width]."""
        if self.conditioner is None:
            return torch.zeros(images, self.config.width, dtype=self.dtype, device=self.device)
        return self.projected(self.conditioner(condition).to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights: half precision under DeepSpeed's fp16 engine."""
        return next(self.embedding.parameters()).dtype

    @property
    def _steps(self) -> int:
        """Of the sampler."""
        ancestral = self.config.sampler == "ancestral"
        return (self.config.timesteps if ancestral else 0) or self.config.sample_steps

    def _bits(self, nats: Tensor) -> Tensor:
        """Nats per image → bits per subpixel."""
        return nats / (self.subpixels * math.log(2))


class WithBound(Diffusion):
    """A diffusion over pixels, or over the latents of a model with a likelihood."""

    def bound(self, batch: Batch, draw: int = 0) -> Bound:
        """Returns the bound, whose rate is an estimate from one of its steps for each image. The steps spread evenly
        over consecutive images and over consecutive draws of an image."""
        keys = (self.seed, BOUND, draw)
        x, negentropy = self.data.drawn(batch, *keys, LATENT)
        time = (noise.spread(batch.sample, self.seed, BOUND, TIME) + draw * SILVER) % 1
        time = time.clamp(min=2.0**-53)  # 0 is no step
        noises, given = self._noises(batch.sample, *keys), self._given(batch.condition, len(x))
        rate = self._rates(x, negentropy, noises, given, time)
        rest = self.data.bound_given(batch, x, noises[1], self.ends()[0], draw)
        return Bound(rest.distortion, torch.cat([rate, rest.rate]), None)


def build(config: Config, shape: Shape, seed: int, codec: Model | None = None) -> Diffusion:
    """Builds the model; codec: that of the run `over`, whose weights may be loaded later. Raises ValueError for
    settings that do not fit one another or the codec."""
    bounded = codec is None or isinstance(codec, PixelLikelihood)
    return (WithBound if bounded else Diffusion)(config, shape, seed, codec)


def _net(config: Config, channels: int, out: int, size: int) -> nn.Module:
    """Builds the network of data [B, out, size, size]. Raises ValueError if it does not fit the size."""
    if config.net == "unet":
        if size % 2**config.halvings:
            raise ValueError(f"model.halvings={config.halvings} does not fit data of {size} × {size}: set fewer")
        return UNet(channels, out, config.width, config.depth, config.halvings, config.width, config.checkpointing)
    if size % config.patch:
        raise ValueError(f"model.patch={config.patch} does not divide data of {size} × {size}: set a divisor")
    return DiT(channels, out, config.patch, config.width, config.depth, config.heads, config.checkpointing)


def _check(config: Config, codec: Model | None) -> None:
    """Raises ValueError for settings that do not fit one another."""
    if config.encoder_noise and codec is None:
        raise ValueError("model.encoder_noise applies to latents: set 0, or model.over to a run")
    if not config.encoder_noise and config.gamma_min >= config.gamma_max:
        raise ValueError(f"model.gamma_max={config.gamma_max} must be above model.gamma_min={config.gamma_min}")
    if -config.encoder_noise >= config.gamma_max:
        raise ValueError(
            f"model.gamma_max={config.gamma_max} must be above {-config.encoder_noise}, the γ of model.encoder_noise"
        )
    if config.learned_ends and config.encoder_noise:
        raise ValueError("model.learned_ends does not apply to model.encoder_noise, which is fixed: set either off")
    if config.learned_ends and config.weighting == "flow":
        raise ValueError("model.learned_ends needs the weights of the bound: set model.weighting=elbo")
