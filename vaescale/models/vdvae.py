"""A deep top-down VAE: Child 2021, "Very deep VAEs generalize autoregressive models and can outperform them on images".

    image → encoder: blocks from full resolution downwards → features e of each resolution
    learned start at the lowest resolution → decoder; each block is one level of latents [B, D, h, w]:
        h → prior block → p(z|h), and a term that is added to h and does not depend on z
        h, e → posterior block → q(z|h, e)
        h + projection of z → residual block → h;   after a stage h is enlarged to the next resolution
    h at full resolution → p(x|z)

The posterior and the prior share one path: without an image the posterior blocks are skipped. A condition is added to h
where each resolution starts. As in the paper, blocks are bottlenecks of two 1×1 and two 3×3 convolutions, each after a
GELU. With N blocks the last convolution of a residual block and the projection of z start √(1/N) times as large, and
the last convolution of a prior block starts at zero, so that p starts as N(0, I).

There are two differences from the authors' code. The features of a resolution come from its last block, which is
simpler; there they come from the last but one, because the last one belongs to the downsampling. And a label and
attributes are supported. The parameters are the same except for those of the condition. With the authors' settings for
CIFAR-10 there are 43 levels; the paper's table counts 45.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..interfaces import Shape
from ..nn import gaussian
from ..nn import likelihood as likelihoods
from ..nn.blocks import run_block
from ..nn.gaussian import Normal
from ..nn.likelihood import Likelihood
from ..ranges import ranged
from . import variational
from .variational import Draw, Level, MeasuredVariational, Net


@dataclass(frozen=True)
class Stage:
    size: int = ranged(least=1, most=2**16)  # pixels per side
    blocks: int = ranged(least=1, most=4096)


@dataclass(frozen=True)
class Config(variational.Config):
    kind: str = "vdvae"
    width: int = ranged(384, least=1, most=2**16)  # channels of h
    bottleneck: int = ranged(96, least=1, most=2**16)  # channels inside a block
    latent_dim: int = ranged(16, least=1, most=2**16)  # D, channels of z
    # The encoder reads (x / 255 − ½) · scale. The authors' code subtracts the mean of the data and divides by its
    # standard deviation; 4 comes close to that and gains 0.13 bits/dim in 200 steps (configs/README.md). The default is
    # 1 because earlier runs used it, and their configs do not set it.
    scale: float = ranged(1.0, above=0)
    encoder: list[Stage] = field(default_factory=list)  # from the image size downwards
    decoder: list[Stage] = field(default_factory=list)  # up to the image size; each block is a level of latents
    checkpointing: bool = False  # recompute a block's activations in the backward pass instead of storing them
    likelihood: likelihoods.Config = field(default_factory=lambda: likelihoods.Config(kind="logistic-mixture"))


class Block(nn.Module):
    """[B, channels, s, s] → [B, out, s, s] through `hidden` channels, with 3×3 convolutions if s > 2 and else 1×1."""

    def __init__(self, channels: int, hidden: int, out: int, size: int, scale: float = 1.0) -> None:
        super().__init__()
        wide = 3 if size > 2 else 1
        self.layers = nn.Sequential(
            nn.GELU(),
            _conv(channels, hidden, 1),
            nn.GELU(),
            _conv(hidden, hidden, wide),
            nn.GELU(),
            _conv(hidden, hidden, wide),
            nn.GELU(),
            _conv(hidden, out, 1, scale),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Stochastic(nn.Module):
    """One level of latents, which maps h [B, width, s, s] to a new h of the same shape."""

    def __init__(self, config: Config, size: int, number: int, count: int) -> None:
        super().__init__()
        width, hidden, latents = config.width, config.bottleneck, config.latent_dim
        self.number = number
        self.split = [2 * latents, width]
        scale = math.sqrt(1 / count)
        self.prior = Block(width, hidden, 2 * latents + width, size, scale=0.0)
        self.posterior = Block(2 * width, hidden, 2 * latents, size)
        self.project = _conv(latents, width, 1, scale)
        self.residual = Block(width, hidden, width, size, scale)

    def forward(self, h: Tensor, features: Tensor | None, draw: Draw) -> tuple[Tensor, Level | None]:
        """features: an image's, [B, width, s, s], or None → (h, the level, or None without features)."""
        parameters, certain = self.prior(h).split(self.split, dim=1)
        p = gaussian.normal(parameters)
        q: Normal | None = None
        if features is not None:
            q = self.inferred(h, features)
        z = draw(self.number, q or p)
        h = h + certain + self.project(z.to(certain.dtype))
        return h + self.residual(h), Level(z, q, p) if q else None

    def inferred(self, h: Tensor, features: Tensor) -> Normal:
        """Returns q of the level."""
        return gaussian.normal(self.posterior(torch.cat([h, features.to(h.dtype)], dim=1)))


class Encoder(nn.Module):
    """[B, C, H, W] → features [B, width, s, s] by their size s."""

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, config.width, 3)
        scale = math.sqrt(1 / sum(stage.blocks for stage in config.encoder))
        self.places = [stage.size for stage in config.encoder for _ in range(stage.blocks)]
        self.blocks = nn.ModuleList(
            Block(config.width, config.bottleneck, config.width, size, scale) for size in self.places
        )
        self.scale = config.scale
        self.checkpointing = config.checkpointing

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        x = self.first(self.scale * x)
        features = {}
        for size, block in zip(self.places, self.blocks, strict=True):
            if x.shape[-1] != size:
                x = F.avg_pool2d(x, x.shape[-1] // size)
            x = x + run_block(block, self.checkpointing and self.training, x)
            features[size] = x
        return features


class TopDown(Net):
    def __init__(self, config: Config, shape: Shape, condition: int, likelihood: Likelihood) -> None:
        super().__init__()
        _require(config, shape)
        self.encoder = Encoder(config, shape.channels)
        places = [stage.size for stage in config.decoder for _ in range(stage.blocks)]
        self.sizes = [config.latent_dim] * len(places)
        self.blocks = nn.ModuleList(Stochastic(config, size, number, len(places)) for number, size in enumerate(places))
        self.places = places
        stages = [stage.size for stage in config.decoder]
        self.starts = nn.ParameterDict(
            {str(size): nn.Parameter(torch.zeros(1, config.width, size, size)) for size in stages}
        )
        self.conditions = nn.ModuleDict(
            {str(size): nn.Linear(condition, config.width) for size in stages} if condition else {}
        )
        self.gain = nn.Parameter(torch.ones(1, config.width, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, config.width, 1, 1))
        self.out = _conv(config.width, likelihood.channels, 1)
        self.checkpointing = config.checkpointing

    def infer(self, x: Tensor, embedded: Tensor | None, draw: Draw) -> tuple[Tensor, list[Level]]:
        h, levels = self._walk(self.encoder(x), embedded, len(x), draw)
        return h, levels

    def coarsest(self, x: Tensor, embedded: Tensor | None) -> Normal:
        size, block = self.places[0], self.blocks[0]
        assert isinstance(block, Stochastic)
        return block.inferred(self._start(size, embedded, len(x)), self.encoder(x)[size])

    def generate(self, embedded: Tensor | None, images: int, draw: Draw) -> Tensor:
        h, _ = self._walk({}, embedded, images, draw)
        return h

    def output(self, h: Tensor, embedded: Tensor | None) -> Tensor:
        del embedded  # already added to h
        return self.out(h * self.gain + self.bias)

    def _walk(
        self, features: dict[int, Tensor], embedded: Tensor | None, images: int, draw: Draw
    ) -> tuple[Tensor, list[Level]]:
        """Runs all blocks: (h at full resolution, one level per block, or none without features)."""
        levels: list[Level] = []
        size = self.places[0]
        h = self._start(size, embedded, images)
        for number, block in enumerate(self.blocks):
            if self.places[number] != size:
                larger = self.places[number]
                h = self._start(larger, embedded, images) + F.interpolate(h, scale_factor=larger // size)
                size = larger
            h, level = run_block(block, self.checkpointing and self.training, h, features.get(size), draw)
            if level:
                levels.append(level)
        return h, levels

    def _start(self, size: int, embedded: Tensor | None, images: int) -> Tensor:
        """The learned start of a resolution, [B, width, s, s]. It is fp32 even inside autocast, and with it the whole
        sum h: on a trained configs/hvae_photos32.yaml bf16 costs 0.001 bits/dim, against 0.014 with h rounded to bf16
        after each block."""
        start = self.starts[str(size)].expand(images, -1, -1, -1)
        return start if embedded is None else start + self.conditions[str(size)](embedded)[:, :, None, None]


def build(config: Config, shape: Shape, seed: int = 0) -> MeasuredVariational:
    """Builds the model. Raises ValueError for invalid settings."""
    return MeasuredVariational(config, shape, seed, partial(TopDown, config, shape))


def _conv(channels: int, out: int, size: int, scale: float = 1.0) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, size, padding=size // 2)
    with torch.no_grad():
        conv.weight.mul_(scale)
        conv.bias.zero_()  # type: ignore[union-attr]
    return conv


def _require(config: Config, shape: Shape) -> None:
    """Raises ValueError for stages that do not fit together or the image size."""
    down = [stage.size for stage in config.encoder]
    up = [stage.size for stage in config.decoder]
    for key, stages in (("encoder", config.encoder), ("decoder", config.decoder)):
        if not stages:
            raise ValueError(
                f"model.{key} must be a list of stages, each of at least one block, as in [{{size: {shape.size}, "
                f"blocks: 2}}, …]"
            )
    if down[0] != shape.size or up[-1] != shape.size:
        raise ValueError(
            f"model.encoder starts at {down[0]} px and model.decoder ends at {up[-1]} px: both must be "
            f"data.size={shape.size}"
        )
    for larger, smaller in [*pairwise(down), *pairwise(reversed(up))]:
        if larger <= smaller or larger % smaller:
            raise ValueError(
                f"model.encoder and model.decoder: {smaller} px next to {larger} px; sizes must decrease in the "
                f"encoder and increase in the decoder, and each must divide the next larger one"
            )
    for size in up:
        if size not in down:
            raise ValueError(f"model.decoder has a stage of {size} px, but model.encoder has none: add one to it")
    if down[-1] < up[0]:
        raise ValueError(
            f"model.encoder ends at {down[-1]} px, but model.decoder starts at {up[0]} px: make both equal"
        )
