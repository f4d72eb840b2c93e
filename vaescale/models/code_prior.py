"""Priors over the codes of a frozen tokenizer: autoregressive in raster or random order, and masked.

    image → tokenizer → codes [B, L, h, w] → embedded, summed over levels → trunk → h of each place → logits by level

In van den Oord et al. 2017 (VQ-VAE) the prior is uniform in training, and a PixelCNN is trained on the codes later.
Here it is that PixelCNN, the uniform prior, or a transformer: in raster order as in Sun et al. 2024 (LlamaGen,
"Autoregressive model beats diffusion"), in random order (Yu et al. 2024, RAR; Pang et al. 2024, RandAR), or masked
(Chang et al. 2022, MaskGIT).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..interfaces import Batch, Codebooks, Codec, Condition, Known, Model, Output, Sampling, Shape, by_level
from ..nn import noise
from ..nn.categorical import nats
from ..nn.code_draw import Choice, doubled, one_by_one, together
from ..nn.code_levels import SCALE, Levels
from ..nn.code_order import cosine_count, halton, ranks
from ..nn.code_transformer import CausalTransformer, MaskedTransformer
from ..nn.condition import Conditioner, dropped
from ..nn.frozen import Frozen, blank_latents
from ..nn.pixelcnn import PixelCNN
from ..nn.transformer import Dropout, head_channels
from ..ranges import ranged, require

DEFAULT = Sampling()
# noise keys, one per purpose
UNCONDITIONAL, DROPOUT, ORDER, RASTER, MASKED, BOUND, DRAW, CONFIDENCE = range(8)


@dataclass(frozen=True)
class Config:
    kind: str = "code_prior"
    tokenizer: str = ""  # the run whose codes are modelled
    net: Literal["transformer", "pixelcnn", "uniform"] = "transformer"  # uniform: log2 K bits a code, without weights
    order: Literal["raster", "random", "masked"] = "raster"  # in which the codes are drawn
    width: int = ranged(384, least=4, most=2**16)
    depth: int = ranged(8, least=1, most=4096)  # blocks of the transformer, layers of the PixelCNN
    heads: int = ranged(6, least=1, most=2**14)
    level_depth: int = ranged(2, least=1, most=4096)  # blocks of the transformer over several codebooks
    # in training, of the embedded codes and of all branches but those of the transformer over codebooks
    dropout: float = ranged(0.1, least=0, below=1)
    # recompute the activations of the transformer's blocks in the backward pass instead of storing them
    checkpointing: bool = False
    classes: int = ranged(0, least=0, most=2**24)  # labels 0 … classes − 1; 0: the model has no label input
    # share of training images whose whole condition, label and attributes, is dropped
    label_dropout: float = ranged(0.1, least=0, below=1)
    # Random order: the share of images in raster order rises from 0 to 1 in `anneal_steps` steps from `anneal_start`
    # on, and codes are drawn in raster order (RAR). anneal_steps=0: the order stays random, also of what is drawn.
    anneal_start: int = ranged(0, least=0)
    anneal_steps: int = ranged(0, least=0)


def build(config: Config, shape: Shape, seed: int, codec: Model) -> "CodePrior":
    """Builds the prior of the codes of `codec`, whose weights may be loaded later.

    Raises ValueError for settings that do not fit one another or the codec."""
    return CodePrior(config, shape, seed, codec)


def uniform(codec: Model, shape: Shape) -> "CodePrior":
    """Returns the prior that a tokenizer is trained with."""
    return CodePrior(Config(net="uniform"), shape, 0, codec)


class CodePrior(Model):
    """A Prior. Its loss is the mean of −log p of a code in nats: in eval mode that of `rates`, in training with masked
    order the mean over masked codes, while the metrics always estimate the bound.

    The uniform prior has no parameters, and its loss has no gradient: it is not trained."""

    halton: Tensor  # int64 [N], an order of the places

    def __init__(self, config: Config, shape: Shape, seed: int, codec: Model) -> None:
        super().__init__()
        require(config, "model")
        _check(config, codec)
        self.config = config
        self.seed = seed
        self.frozen = Frozen(codec)
        self.sizes, self.shape = _codes_of(codec, shape)
        self.places = math.prod(self.shape)
        if len(self.sizes) > 1:
            head_channels(config.width, config.heads, "model")  # of the transformer over codebooks
        self.conditioner: Conditioner | None = None
        if config.net == "uniform":
            return
        width = config.width
        if config.classes or shape.attributes:
            self.conditioner = Conditioner(config.classes, width, shape.attributes)
            self.projected = nn.Linear(self.conditioner.dim, width)
        else:
            self.unconditional = nn.Parameter(SCALE * torch.randn(width))
        self.levels = Levels(self.sizes, width, config.level_depth, config.heads)
        self.trunk = _trunk(config, self.shape)
        if config.order == "masked":
            self.register_buffer("halton", torch.tensor(halton(*self.shape)), persistent=False)
            chances = cosine_count(self.places)
            self.masked_mean = sum(count * chance for count, chance in enumerate(chances, start=1))

    @property
    def codec(self) -> Codec:
        """The tokenizer, on the device of the prior; that of the uniform prior stays where it is."""
        own = next(self.parameters(), None)
        return self.frozen.model if own is None else self.frozen.on(own.device)  # type: ignore[return-value]

    @property
    def code_shape(self) -> tuple[int, int, int]:
        return len(self.sizes), *self.shape

    @property
    def any_order(self) -> bool:
        return not self._raster

    def codes(self, batch: Batch) -> Tensor:
        if batch.x.dtype == torch.int64:
            return batch.x
        codec: Any = self.frozen.on(batch.x.device)
        with torch.no_grad(), torch.autocast(batch.x.device.type, enabled=False):
            return torch.stack(codec.encode(batch), dim=1)

    def forward(self, batch: Batch, step: int) -> Output:
        codes, share = self._prepared(batch, step)
        if not self.training or self.config.net == "uniform":
            rates = self._rates(codes, batch.condition, batch.sample, 0)
            return _output(rates.mean(), rates)
        condition = batch.condition
        if self.config.label_dropout:
            uniform = noise.uniform(batch.sample, (), self.seed, UNCONDITIONAL)
            condition = dropped(condition, uniform < self.config.label_dropout)
        given = self._given(condition, len(codes))
        dropout = None
        if self.config.dropout:
            dropout = Dropout(self.config.dropout, batch.sample, (self.seed, DROPOUT))
        if self.config.order == "masked":
            return self._masked_step(codes, given, batch.sample, dropout)
        rates = self._in_order(codes, given, self._training_order(batch.sample, share), dropout)
        return _output(rates.mean(), rates)

    def rates(self, codes: Tensor, condition: Condition, sample: Tensor, draw: int = 0) -> Tensor:
        return self._rates(codes.flatten(2), condition, sample, draw).unflatten(2, self.shape)

    @torch.no_grad()
    def draw(
        self,
        condition: Condition,
        sample: Tensor,
        temperature: float = 1.0,
        sampling: Sampling = DEFAULT,
        known: Known | None = None,
    ) -> Tensor:
        size = (len(sample), len(self.sizes), self.places)
        if known is None:
            codes = torch.zeros(size, dtype=torch.int64, device=sample.device)
            where = torch.zeros(size, dtype=torch.bool, device=sample.device)
        else:
            codes, where = known.codes.flatten(2), known.where.flatten(1).expand(size)
        if self.config.net == "uniform":
            uniform = noise.uniform(sample, size[1:], DRAW)
            free = torch.stack([(uniform[:, i] * codes).long() for i, codes in enumerate(self.sizes)], dim=1)
            return torch.where(where, codes, free).unflatten(2, self.shape)
        given = self._given(condition, len(sample))
        if sampling.guidance != 1 and self.conditioner is not None:
            if not self.config.label_dropout:
                raise ValueError("guidance needs a prior that was trained with model.label_dropout above 0")
            given = torch.cat([given, self._given(self.conditioner.nothing_said(len(sample)), len(sample))])
        choose = Choice(self.levels, temperature, sampling)
        if self.config.order == "masked":
            found = self._drawn_together(given, sample, choose, codes, where)
        else:
            found = self._drawn_one_by_one(given, sample, choose, codes, where)
        return found.unflatten(2, self.shape)

    def _drawn_one_by_one(self, given: Tensor, sample: Tensor, choose: Choice, codes: Tensor, where: Tensor) -> Tensor:
        uniform = noise.uniform(sample, tuple(codes.shape[1:]), DRAW)
        if self._raster:
            return one_by_one(self.trunk.reader(given), choose, uniform, codes, where)
        # codes that are given come first, so that all others depend on them
        order = (noise.uniform(sample, (self.places,), ORDER) - where.all(1).double()).argsort(1)
        read = self.trunk.reader(given, doubled(order, given))
        found = one_by_one(read, choose, *(_ordered(part, order) for part in (uniform, codes, where)))
        return _ordered(found, ranks(order))

    def _drawn_together(self, given: Tensor, sample: Tensor, choose: Choice, codes: Tensor, where: Tensor) -> Tensor:
        def net(codes: Tensor, masked: Tensor) -> Tensor:
            embedded = self.levels.embedded(doubled(codes, given)).sum(2)
            return self.trunk(embedded, given, doubled(masked, given))

        first = self.halton if choose.sampling.positions == "halton" else None
        return together(net, choose, sample, codes, where, (DRAW, CONFIDENCE), first)

    def _rates(self, codes: Tensor, condition: Condition, sample: Tensor, draw: int) -> Tensor:
        """`rates` of codes [B, L, N]."""
        if self.config.net == "uniform":
            rates = [
                torch.full_like(codes[:, i], math.log(size), dtype=torch.float32) for i, size in enumerate(self.sizes)
            ]
            return torch.stack(rates, dim=1)
        given = self._given(condition, len(codes))
        keys = (self.seed, BOUND, draw)
        if self.config.order == "masked":
            # Uria et al. 2014, "A deep and tractable density estimator", equation 12
            visible = (noise.uniform(sample, (1,), *keys, MASKED) * self.places).long()
            masked = ranks(noise.uniform(sample, (self.places,), *keys, ORDER).argsort(1)) >= visible
            return self._of_masked(codes, given, masked) * (self.places / (self.places - visible))[:, None]
        if self._raster:
            return self._in_order(codes, given, None)
        order = noise.uniform(sample, (self.places,), *keys, ORDER).argsort(1)
        return _ordered(self._in_order(codes, given, order), ranks(order))

    def _in_order(self, codes: Tensor, given: Tensor, order: Tensor | None, dropout: Dropout | None = None) -> Tensor:
        """Returns −log p of each code, fp32 [B, L, N], in their order."""
        if order is not None:
            codes = _ordered(codes, order)
        embedded = self.levels.embedded(codes)
        return self._nats(self.trunk(embedded.sum(2), given, order, dropout), embedded, codes)

    def _of_masked(self, codes: Tensor, given: Tensor, masked: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Returns −log p of each masked code given those that are not, fp32 [B, L, N], and 0 for these."""
        embedded = self.levels.embedded(codes)
        h = self.trunk(embedded.sum(2), given, masked, dropout)
        return torch.where(masked[:, None], self._nats(h, embedded, codes), 0)

    def _nats(self, h: Tensor, embedded: Tensor, codes: Tensor) -> Tensor:
        levels = zip(self.levels(h, embedded), codes.unbind(1), strict=True)
        return torch.stack([nats(logits, code) for logits, code in levels], dim=1)

    def _masked_step(self, codes: Tensor, given: Tensor, sample: Tensor, dropout: Dropout | None) -> Output:
        """The mean over all masked codes is taken with their expected number, so that it does not depend on how the
        batch is split. The metrics weigh an image so that all numbers of masked codes count alike, as in the bound."""
        count = (math.pi / 2 * noise.uniform(sample, (1,), self.seed, MASKED)).cos_().mul_(self.places).ceil_()
        count = count.clamp_(1, self.places)
        masked = ranks(noise.uniform(sample, (self.places,), self.seed, ORDER).argsort(1)) < count
        each = self._of_masked(codes, given, masked, dropout)
        chance = 2 / math.pi * (((count - 1) / self.places).acos() - (count / self.places).acos())
        with torch.no_grad():
            rates = each * (1 / (chance * count)).float()[:, None]
        return _output(each.mean() * (self.places / self.masked_mean), rates)

    def _training_order(self, sample: Tensor, share: Tensor | None) -> Tensor | None:
        """share: of images in raster order."""
        if self.config.order == "raster":
            return None
        order = noise.uniform(sample, (self.places,), self.seed, ORDER).argsort(1)
        if share is None:
            return order
        raster = noise.uniform(sample, (1,), self.seed, RASTER) < share
        return torch.where(raster, torch.arange(self.places, device=order.device), order)

    # Dynamo would compile the graph again for each step, and the tokenizer with it. At the beginning of `forward` this
    # call splits no graph.
    @torch._disable_dynamo  # torch.compiler.disable imports Dynamo at once, which takes seconds
    def _prepared(self, batch: Batch, step: int) -> tuple[Tensor, Tensor | None]:
        """Returns the codes, int64 [B, L, N], and the share of images in raster order."""
        return self.codes(batch).flatten(2), self._raster_share(step)

    def _raster_share(self, step: int) -> Tensor | None:
        if not self.config.anneal_steps:
            return None
        share = min(1.0, max(0.0, (step - self.config.anneal_start) / self.config.anneal_steps))
        return torch.full((), share, dtype=torch.float64, device=next(self.parameters()).device)

    @property
    def _raster(self) -> bool:
        """Whether codes are drawn and rated in raster order."""
        return self.config.order == "raster" or self.config.anneal_steps > 0

    def _given(self, condition: Condition, images: int) -> Tensor:
        """The condition as the trunk reads it, [B, width]."""
        if self.conditioner is None:
            return self.unconditional.expand(images, -1)
        return self.projected(self.conditioner(condition).to(self.projected.weight.dtype))


def _output(loss: Tensor, rates: Tensor) -> Output:
    """rates: in nats, [B, L, N]."""
    bits = rates.detach().mean((0, 2)) / math.log(2)
    metrics = {"bits_per_code": bits.mean()}
    if len(bits) > 1:
        metrics |= by_level("rate", bits.unbind())
    return Output(loss, metrics, None)


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """x [B, L, N], order int64 [B, N] → x at the places of the order."""
    return x.gather(2, order[:, None].expand_as(x))


def _trunk(config: Config, shape: tuple[int, int]) -> Any:
    """Builds the network that turns embedded codes into h of each place."""
    if config.net == "pixelcnn":
        return PixelCNN(*shape, config.width, config.depth)
    dim = head_channels(config.width, config.heads, "model")
    sizes = (*shape, config.width, config.depth, config.heads, dim, config.checkpointing)
    return (
        MaskedTransformer(*sizes) if config.order == "masked" else CausalTransformer(*sizes, config.order == "random")
    )


def _check(config: Config, codec: Model) -> None:
    """Raises ValueError if the settings do not fit one another or the codec."""
    if config.net != "transformer" and config.order != "raster":
        raise ValueError(f"model.order={config.order} needs model.net=transformer: set one of them otherwise")
    if config.anneal_steps and config.order != "random":
        raise ValueError(f"model.anneal_steps={config.anneal_steps} needs model.order=random, or set it to 0")
    if not isinstance(codec, Codec) or not isinstance(codec, Codebooks):
        raise ValueError(
            f"model.tokenizer={config.tokenizer} has no codes to model: name the run of a model with codebooks"
        )


def _codes_of(codec: Model, shape: Shape) -> tuple[list[int], tuple[int, int]]:
    """Returns the sizes of the codec's codebooks, and height and width of its maps of codes. Raises ValueError if it
    has maps of several sizes."""
    assert isinstance(codec, Codec)
    assert isinstance(codec, Codebooks)
    sizes = {tuple(one.shape[1:]) for one in blank_latents(codec, shape)}
    if len(sizes) > 1:
        raise ValueError(f"model.tokenizer has maps of codes of several sizes, {sorted(sizes)}, which no prior models")
    height, length = sizes.pop()
    return [len(one.window) for one in codec.usage(clear=False).values()], (height, length)
