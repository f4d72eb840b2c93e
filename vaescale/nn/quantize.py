"""The kinds of quantiser, and the settings that combine them.

Shapes: N rows on this rank in a step, K codes, D channels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..interfaces import Quantized
from ..ranges import ranged, require
from .codebook import EMA, Adam, Tally
from .entropy import entropies, patterns
from .nearest import nearest
from .quantizer import Grouped, Projected, Quantizer, Residual, pass_through

KMEANS = 10  # iterations of Lloyd's algorithm at initialisation
# A codebook is initialised in its first step or, if that step was skipped, this many steps later. By default, as many
# consecutive skipped steps as the last number end the run.
AGAIN = 0, 1, 2, 3, 4, 6, 8, 12, 16, 20


@dataclass(frozen=True)
class Config:
    kind: Literal["vq", "simvq", "fsq", "lfq"] = "vq"
    # K of each codebook; fsq: the product of its levels; lfq: two to the power of its channels
    codebook_size: int = ranged(512, least=2, most=2**30)
    dim: int = ranged(64, least=1, most=2**16)  # D: channels of the encoder's output and the decoder's input
    # channels in which codes are compared, after a linear map; 0: dim, without a map
    codebook_dim: int = ranged(0, least=0, most=2**16)
    levels: list[int] = ranged(factory=lambda: [8, 5, 5, 5], least=1, most=2**20)  # noqa: RUF009  fsq: of each channel
    groups: int = ranged(1, least=1, most=1024)  # groups of channels, each with its own codebook
    # codebooks in sequence, each quantising the residual of the previous ones
    depth: int = ranged(1, least=1, most=1024)
    metric: Literal["euclidean", "cosine"] = "euclidean"
    gradient: Literal["straight-through", "rotation"] = "straight-through"
    beta: float = ranged(0.25, least=0)  # weight of the commitment ‖z − sg[e]‖²
    # weight of the entropy loss, entropy.py; 0.1 is usual, and lfq needs it
    entropy_weight: float = ranged(0.0, least=0)
    entropy_temperature: float = ranged(0.01, above=0)  # of the soft codes in the entropy loss
    learning: Literal["ema", "gradient"] = "ema"
    ema_decay: float = ranged(0.99, least=0, below=1)  # of the EMA
    # Rows of the first global batch, their k-means, or small random numbers (only for comparisons): README.md.
    init: Literal["samples", "kmeans", "uniform"] = "samples"
    reset_every: int = ranged(10, least=0)  # steps between resets of dead codes; 0: no resets after initialisation
    dead_after: int = ranged(50, least=1)  # unused steps after which a code is dead


def build(config: Config, seed: int) -> Quantizer:
    """Builds the quantiser. Raises ValueError, with a one-sentence message, for settings that do not fit together."""
    require(config, "model.quantizer")
    if config.kind == "fsq" and config.entropy_weight:
        raise ValueError(
            f"model.quantizer.entropy_weight={config.entropy_weight} does not apply to kind=fsq: set entropy_weight=0"
        )
    inner = config.codebook_dim or config.dim
    if inner % config.groups:
        raise ValueError(f"model.quantizer.groups={config.groups} must divide the {inner} channels")
    if config.kind in ("fsq", "lfq") and config.depth > 1:
        raise ValueError(
            f"model.quantizer.kind={config.kind} leaves no residual to quantise: use groups instead of depth"
        )
    cosine = config.metric == "cosine" and config.kind == "vq" and config.depth > 1  # by the stack, not by each level
    one = replace(config, dim=inner // config.groups, metric="euclidean" if cosine else config.metric)
    leaves = [
        [_leaf(one, seed + 7919 * (group * config.depth + level), level) for level in range(config.depth)]
        for group in range(config.groups)
    ]
    stacks = [Residual(levels, config.gradient, cosine) if config.depth > 1 else levels[0] for levels in leaves]
    quantizer = Grouped(stacks) if config.groups > 1 else stacks[0]
    return Projected(quantizer, config.dim, inner) if config.codebook_dim else quantizer


def _leaf(config: Config, seed: int, level: int) -> Quantizer:
    if config.kind == "vq":
        return VectorQuantizer(config, seed, begin=level)
    if config.kind == "simvq":
        return SimVQ(config, seed)
    return FSQ(config) if config.kind == "fsq" else LFQ(config)


class VectorQuantizer(Quantizer):
    """VQ-VAE's quantizer (van den Oord, Vinyals, Kavukcuoglu 2017, equations 1 to 3; EMA: appendix A.1).

    The update of step `begin` initialises a codebook that is not yet `placed`: all codes count as dead and are replaced
    by encoder outputs. If that step is skipped, a later one does it. With init=uniform, or with codes from `init_from`,
    there is no initialisation, and the codes learn from the first step on. With the cosine metric rows and codes have
    length 1 (Yu et al. 2022, "Vector-quantized image modeling with improved VQGAN", section 3.2).
    """

    codebook: Tensor  # fp32 [K, D]

    def __init__(self, config: Config, seed: int = 0, begin: int = 0) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        random = config.init == "uniform"
        self.begin = -1 if random else begin
        self.sizes = (config.codebook_size,)
        codebook = self._measured(
            torch.empty(config.codebook_size, config.dim).uniform_(-1 / config.codebook_size, 1 / config.codebook_size)
        )
        self.register_buffer("codebook", codebook)
        self.tally = Tally(config.codebook_size, age=0 if random else config.dead_after)
        self.learner: EMA | Adam = EMA(codebook, config.ema_decay) if config.learning == "ema" else Adam(codebook)
        self._seen: list[tuple[Tensor, Tensor]] = []  # (rows [N, D], codes [N]) of micro-batches not yet in `_total`
        self._total: tuple[Tensor, Tensor] | None = None  # sums and counts of earlier micro-batches of this step
        self._keep = True  # whether this step needs its rows and not only their sums; True before the first step
        self._first: Tensor | None = None  # rows of the initialising step, for k-means

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = self._measured(z.float())
            rows = z.reshape(-1, self.config.dim)
            codes = nearest(rows.detach(), self.codebook)
            if self.training:
                self._note(codes, rows.detach())
            e = F.embedding(codes, self.codebook).view_as(z)
            commitment = F.mse_loss(z, e)
            loss = self.config.beta * commitment
            if self.config.learning == "gradient":
                # ‖sg[z] − e‖²: only its value enters the loss; `Adam` computes its gradient from the sums.
                loss = loss + commitment.detach()
            if self.config.entropy_weight:
                # Trains only the encoder; the codebook learns only from its rows.
                sure, varied = entropies(rows, self.codebook, self.config.entropy_temperature)
                loss = loss + self.config.entropy_weight * (sure - varied)
            through = pass_through(z, e, self.config.gradient)
            return Quantized(through, codes.view(z.shape[:-1]), loss, commitment.detach()[None])

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook)

    def gather(self, step: int) -> list[Tensor]:
        """Returns the sum of each code's rows [K, D] and their number [K], exact in fp32 below 2**24 rows per step. In
        steps that initialise or reset, candidates [K, D] follow. If frozen, returns their number only."""
        if self.frozen:
            return super().gather(step)
        self.collect()
        draws = self._draws(step)
        candidates = []
        if draws:
            assert self._total is None, "steps are consecutive, so that `_keep` is true in a step that draws rows"
            # A single micro-batch is not copied, which would take as long as summing its rows.
            rows = self._seen[0][0] if len(self._seen) == 1 else torch.cat([rows for rows, _ in self._seen])
            candidates = [self._candidates(rows, step)]
            if self._begins(step) and self.config.init == "kmeans":
                self._first = rows
        self._add()
        total, self._total = self._total, None
        self._keep = self._draws(step + 1)
        assert total is not None, "no rows since the last update"
        return [*total, *candidates]

    def learn(self, totals: Iterator[Tensor], step: int, lr: float) -> None:
        if self.frozen:
            return super().learn(totals, step, lr)
        sums, counts = next(totals), next(totals)
        # A step with a NaN counts as a step without rows.
        sane = sums.isfinite().all()
        # Assignments to the codes of a random codebook carry no information and are ignored.
        placed = self.placed()
        updated = sane & placed
        sums, counts = torch.where(updated, sums, 0.0), torch.where(updated, counts, 0.0)
        self.learner.learn(self.codebook, sums, counts, torch.where(sane, lr, 0.0))
        self.tally.count(counts)
        begins, resets = self._begins(step), self._resets(step)
        if self._draws(step):
            candidates = next(totals)
            due = torch.where(placed, resets, self.ready & begins) & sane & candidates.isfinite().all()
            dead = (self.tally.age >= self.config.dead_after) & due
            new = candidates
            if self._first is not None:
                new = torch.where(placed, candidates, self._lloyd(candidates, self._first))
                self._first = None
            self.codebook.copy_(torch.where(dead[:, None], new, self.codebook))
            self.learner.forget(dead, self.codebook)
            self.tally.reset(dead)
        if self.config.metric == "cosine":
            self.codebook.copy_(F.normalize(self.codebook, dim=1))

    def placed(self) -> Tensor:
        """bool []: false while no code was ever used and every age is still `dead_after` or more, as at creation."""
        return self.tally.ever.any() | (self.tally.age < self.config.dead_after).any()

    def _measured(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.config.metric == "cosine" else z

    def _begins(self, step: int) -> bool:
        """Whether this step initialises the codebook if it is not placed, which only the device knows."""
        return self.begin >= 0 and step - self.begin in AGAIN

    def _resets(self, step: int) -> bool:
        every = self.config.reset_every
        return step > self.begin and every > 0 and step % every == 0

    def _draws(self, step: int) -> bool:
        return self._begins(step) or self._resets(step)

    def collect(self) -> None:
        """Sums noted rows. At most two micro-batches are held, except in a step that draws rows."""
        if self.frozen:
            return super().collect()
        for codes, rows in self._noted():
            self._seen.append((rows, codes))
            if len(self._seen) > 1 and not self._keep:
                self._add()

    def _add(self) -> None:
        for rows, codes in self._seen:
            self._total = self._sums(rows, codes, self._total)
        self._seen.clear()

    def _sums(self, rows: Tensor, codes: Tensor, total: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(sum of each code's rows [K, D], their number [K]), added to `total` in place."""
        # Two tensors, because adding to columns of a joint one takes four times as long.
        size = self.config.codebook_size
        sums, counts = total or (rows.new_zeros(size, self.config.dim), rows.new_zeros(size))
        return sums.index_add_(0, codes, rows), counts.scatter_add_(0, codes, rows.new_ones(1).expand(len(rows)))

    def _candidates(self, rows: Tensor, step: int) -> Tensor:
        """Draws K rows [K, D] from the *global* batch by (seed, step), with zeros where another rank holds the row.

        Rank r holds the r-th part of the joined batch, so a draw selects the same row at any world size.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        total = len(rows) * distributed.world()
        drawn = torch.randperm(total, generator=generator)[: self.config.codebook_size]
        if rows.device.type != "cpu":
            drawn = drawn.pin_memory().to(rows.device, non_blocking=True)  # from pageable memory the copy would wait
        place = drawn.repeat(-(-self.config.codebook_size // len(drawn)))[: self.config.codebook_size]
        place = place - distributed.rank() * len(rows)
        mine = (place >= 0) & (place < len(rows))
        return torch.where(mine[:, None], rows[place.clamp(0, len(rows) - 1)], 0.0)

    def _lloyd(self, codebook: Tensor, rows: Tensor) -> Tensor:
        """Runs k-means on the global batch (Lloyd 1982), starting from these codes; a code without rows stays."""
        for _ in range(KMEANS):
            sums, counts = self._sums(rows, nearest(rows, codebook))
            total = distributed.sum_(torch.cat([sums, counts[:, None]], dim=1))
            mean = self._measured(total[:, :-1] / total[:, -1:].clamp(min=1))
            codebook = torch.where(total[:, -1:] > 0, mean, codebook)
        return codebook


class SimVQ(Quantizer):
    """A frozen random codebook behind one learned linear map, so that every code moves in every step (Zhu et al. 2024,
    "Addressing representation collapse in vector quantized models with one linear layer", section 4)."""

    basis: Tensor  # fp32 [K, D], frozen

    def __init__(self, config: Config, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.sizes = (config.codebook_size,)
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn(config.codebook_size, config.dim, generator=generator) * config.dim**-0.5
        self.register_buffer("basis", basis)
        self.map = nn.Linear(config.dim, config.dim, bias=False)
        self.tally = Tally(config.codebook_size)

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            codebook = self._codebook()
            codes = nearest(z.detach().reshape(-1, self.config.dim), codebook.detach())
            if self.training:
                self._note(codes)
            e = F.embedding(codes, codebook).view_as(z)
            commitment = F.mse_loss(z, e.detach())
            loss = self.config.beta * commitment + F.mse_loss(e, z.detach())
            if self.config.entropy_weight:
                sure, varied = entropies(z.reshape(-1, self.config.dim), codebook, self.config.entropy_temperature)
                loss = loss + self.config.entropy_weight * (sure - varied)
            through = pass_through(z, e.detach(), self.config.gradient)
            return Quantized(through, codes.view(z.shape[:-1]), loss, commitment.detach()[None])

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self._codebook())

    def _codebook(self) -> Tensor:
        return F.linear(self.basis, self.map.weight.float())


class FSQ(Quantizer):
    """Each channel is rounded to one of a few levels; there is no codebook that could collapse (Mentzer et al. 2023,
    "Finite scalar quantization: VQ-VAE made simple", section 3.1 and appendix A.1)."""

    levels: Tensor  # int64 [D]
    radix: Tensor  # int64 [D]: place value of each channel's level in the code

    def __init__(self, config: Config) -> None:
        super().__init__()
        product = math.prod(config.levels)
        if min(config.levels, default=3) < 3:
            raise ValueError(
                f"model.quantizer.levels={config.levels} must be 3 or more each: with 2, a channel's boundary lies "
                f"where the tanh is saturated and passes no gradient; use kind=lfq for channels of two levels"
            )
        if len(config.levels) != config.dim or product != config.codebook_size:
            raise ValueError(
                f"model.quantizer.levels={config.levels} must be one number for each of the {config.dim} channels, "
                f"with the product codebook_size={config.codebook_size}: set "
                f"codebook_dim={config.groups * len(config.levels)} and codebook_size={product}"
            )
        levels = torch.tensor(config.levels)
        self.sizes = (config.codebook_size,)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("radix", torch.cat([levels.new_ones(1), levels.cumprod(0)[:-1]]), persistent=False)
        self.tally = Tally(config.codebook_size)

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            bounded = self._bounded(z.float())
            rounded = bounded.round()
            codes = ((rounded.detach().long() + self.levels // 2) * self.radix).sum(-1)
            if self.training:
                self._note(codes.flatten())
            unit = self.levels // 2
            through = pass_through(bounded, rounded, "straight-through")
            distance = F.mse_loss(bounded.detach() / unit, rounded.detach() / unit)
            return Quantized(through / unit, codes, z.new_zeros((), dtype=torch.float32), distance[None])

    def lookup(self, codes: Tensor) -> Tensor:
        digits = codes[..., None] // self.radix % self.levels
        return (digits - self.levels // 2) / (self.levels // 2)

    def _bounded(self, z: Tensor) -> Tensor:
        """Squashes z so that rounding gives L integers per channel. The range is shifted by a half for even L, and zero
        maps to zero."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = (self.levels % 2 == 0) * 0.5
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset


class LFQ(Quantizer):
    """The sign of each channel is one bit of the code. An entropy loss makes each row certain of its code while all
    codes are used (Yu et al. 2023, "Language model beats diffusion: tokenizer is key to visual generation",
    section 3.1)."""

    radix: Tensor  # int64 [D]: place value of each bit in the code

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.codebook_size != 2**config.dim:
            bits = config.codebook_size.bit_length() - 1
            power = config.codebook_size == 2**bits
            cure = f"set codebook_dim={config.groups * bits}" if power else f"give a power of two, such as {2**bits}"
            raise ValueError(
                f"model.quantizer.codebook_size={config.codebook_size} must be 2 to the power of the {config.dim} "
                f"channels: {cure}"
            )
        self.config = config
        self.sizes = (config.codebook_size,)
        self.register_buffer("radix", 2 ** torch.arange(config.dim), persistent=False)
        self.tally = Tally(config.codebook_size)

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            bits = z.detach() > 0
            codes = (bits * self.radix).sum(-1)
            if self.training:
                self._note(codes.flatten())
            e = bits * 2.0 - 1
            commitment = F.mse_loss(z, e)
            loss = self.config.beta * commitment
            if self.config.entropy_weight:
                sure, varied = self.entropies(z.reshape(-1, self.config.dim))
                loss = loss + self.config.entropy_weight * (sure - varied)
            return Quantized(pass_through(z, e, self.config.gradient), codes, loss, commitment.detach()[None])

    def entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z: [N, D] → (mean entropy of a row's soft code, entropy of the mean soft code over these N rows), in nats.

        A soft code is the softmax over all codes c of 2 z·c / temperature. It factorises over bits. So a row's entropy
        is the sum over its bits, and the mean over rows is one product of two [N, 2^(D/2)] matrices: exact, without
        an N×K matrix.
        """
        logits = 4 * z / self.config.entropy_temperature
        yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
        sure = -(yes.exp() * yes + no.exp() * no).sum(1).mean()
        half = self.config.dim // 2
        low, high = (patterns(no[:, part], yes[:, part]) for part in (slice(None, half), slice(half, None)))
        mean = high.t() @ low / len(z)
        return sure, torch.special.entr(mean.clamp(min=1e-30)).sum()

    def lookup(self, codes: Tensor) -> Tensor:
        return (codes[..., None] // self.radix % 2) * 2.0 - 1
