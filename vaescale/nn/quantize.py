"""Vector quantisation whose codebook is right on any number of ranks.

The codebook and all that is known of it are fp32 and int64 *buffers*: DeepSpeed casts, shards, averages and clips
parameters, never buffers. What the codebook learns from is, for both ways of learning, the number n_k and the sum s_k
of the encoder outputs given to each code. They are collected over the micro-batches of a step, summed over the ranks
in one all-reduce, and applied by `update` once a step. So one step at any world size and any accumulation is one step
on the joined batch, and all ranks compute the same bits from the same sums.

Shapes: N rows on this rank in a step, K codes, D channels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..interfaces import Quantized, Usage
from .nearest import nearest

LAPLACE = 1e-5  # smoothing of the EMA counts, as in the authors' implementation
ADAM = (0.9, 0.999, 1e-8)


@dataclass(frozen=True)
class Config:
    codes: int = 512  # K
    dim: int = 64  # D
    beta: float = 0.25  # weight of the commitment ‖z − sg[e]‖²
    learning: Literal["ema", "gradient"] = "ema"
    decay: float = 0.99  # of the EMA
    reset_every: int = 10  # steps between resets; 0: never after the first
    dead_after: int = 50  # steps without a use after which a code counts as dead


class VectorQuantizer(nn.Module):
    """VQ-VAE's quantizer (van den Oord, Vinyals, Kavukcuoglu 2017, equations 1 to 3; EMA: appendix A.1).

    `forward` is an fp32 island. The update of step 0 is the initialisation: all codes count as dead and are replaced
    by encoder outputs.
    """

    codebook: Tensor  # fp32 [K, D]
    ever: Tensor  # bool [K]
    age: Tensor  # int64 [K] steps since the last use or reset
    window: Tensor  # int64 [K] uses since the last report
    resets: Tensor  # int64 [] since the last report

    def __init__(self, config: Config, seed: int = 0) -> None:
        super().__init__()
        for key, value, least in (
            ("codes", config.codes, 2),
            ("dim", config.dim, 1),
            ("dead_after", config.dead_after, 1),
        ):
            if value < least:
                raise ValueError(f"model.quantizer.{key}={value} must be at least {least}")
        self.config = config
        self.seed = seed
        codes, dim = config.codes, config.dim
        codebook = torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes)
        self.register_buffer("codebook", codebook)
        self.register_buffer("ever", torch.zeros(codes, dtype=torch.bool))
        self.register_buffer("age", torch.full((codes,), config.dead_after))
        self.register_buffer("window", torch.zeros(codes, dtype=torch.int64))
        self.register_buffer("resets", torch.zeros((), dtype=torch.int64))
        learner = EMA if config.learning == "ema" else Adam
        self.learner: EMA | Adam = learner(codebook, config)
        # This step's micro-batches: (rows [N, D], codes [N]).
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, z: Tensor) -> Quantized:
        """z: [..., D] of any float type → z fp32 [..., D], codes int64 [...], loss, commitment."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            rows = z.reshape(-1, self.config.dim)
            codes = nearest(rows.detach(), self.codebook)
            if self.training:
                self._seen.append((rows.detach(), codes))
            e = F.embedding(codes, self.codebook).view_as(z)
            commitment = F.mse_loss(z, e)
            loss = self.config.beta * commitment
            if self.config.learning == "gradient":
                # ‖sg[z] − e‖²: its value is part of the loss; its gradient is taken in `Adam`, from the sums.
                loss = loss + commitment.detach()
            straight_through = z + (e - z).detach()
            return Quantized(straight_through, codes.view(z.shape[:-1]), loss, commitment.detach())

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 [...] → fp32 [..., D]."""
        return F.embedding(codes, self.codebook)

    @torch.no_grad()
    def update(self, step: int, lr: float) -> None:
        """Learn from the step's rows; collective: all ranks call it at the same steps. No host synchronisation."""
        rows = torch.cat([rows for rows, _ in self._seen])
        codes = torch.cat([codes for _, codes in self._seen])
        self._seen.clear()
        resetting = step == 0 or (self.config.reset_every > 0 and step % self.config.reset_every == 0)

        # One all-reduce: [K, D] sums, [K, 1] counts and, on reset steps, [K, D] candidates. Counts are exact in
        # fp32 below 2**24 rows a step.
        sums = self._sums(rows, codes)
        parts = [sums, self._candidates(rows, step)] if resetting else [sums]
        total = distributed.sum_(torch.cat(parts, dim=1))
        # A step with a NaN in it counts as a step without rows.
        sane = total.isfinite().all()
        total = torch.where(sane, total, 0.0)
        sums, counts, candidates = total.split([self.config.dim, 1, total.shape[1] - self.config.dim - 1], dim=1)
        counts = counts.squeeze(1)
        if step == 0:
            # Which code of a random codebook a row was given says nothing: nobody has been used, all are replaced.
            sums, counts = torch.zeros_like(sums), torch.zeros_like(counts)

        self.learner.learn(self.codebook, sums, counts, torch.where(sane, lr, 0.0))
        used = counts > 0
        self.window += counts.long()
        self.ever |= used
        self.age.add_(1).masked_fill_(used, 0)
        if resetting:
            dead = (self.age >= self.config.dead_after) & sane
            self.codebook.copy_(torch.where(dead[:, None], candidates, self.codebook))
            self.learner.forget(dead, self.codebook)
            self.age.masked_fill_(dead, 0)
            self.resets += dead.sum()

    def usage(self, clear: bool) -> Usage:
        usage = Usage(self.window.clone(), self.ever.clone(), self.age.clone(), self.resets.clone())
        if clear:
            self.window.zero_()
            self.resets.zero_()
        return usage

    def _sums(self, rows: Tensor, codes: Tensor) -> Tensor:
        """[K, D + 1]: the sum of each code's rows, and their number."""
        sums = rows.new_zeros(self.config.codes, self.config.dim + 1)
        sums[:, :-1].index_add_(0, codes, rows)
        sums[:, -1].index_add_(0, codes, rows.new_ones(len(rows)))
        return sums

    def _candidates(self, rows: Tensor, step: int) -> Tensor:
        """[K, D]: K rows drawn from the *global* batch by (seed, step); zeros where another rank holds the row.

        Rank r's rows are the r-th part of the joined batch's, so a draw means the same row at any world size.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        total = len(rows) * distributed.world()
        drawn = torch.randperm(total, generator=generator)[: self.config.codes].to(rows.device, non_blocking=True)
        place = drawn.repeat(-(-self.config.codes // len(drawn)))[: self.config.codes]
        place = place - distributed.rank() * len(rows)
        mine = (place >= 0) & (place < len(rows))
        return torch.where(mine[:, None], rows[place.clamp(0, len(rows) - 1)], 0.0)


class EMA(nn.Module):
    """Codes as moving averages of the rows given to them (VQ-VAE, appendix A.1, equations 6 to 8)."""

    count: Tensor  # fp32 [K]
    sum: Tensor  # fp32 [K, D]

    def __init__(self, codebook: Tensor, config: Config) -> None:
        super().__init__()
        self.decay = config.decay
        self.register_buffer("count", torch.ones(len(codebook)))
        self.register_buffer("sum", codebook.clone())

    def learn(self, codebook: Tensor, sums: Tensor, counts: Tensor, lr: Tensor) -> None:
        del lr  # an average has no learning rate
        self.count.lerp_(counts, 1 - self.decay)
        self.sum.lerp_(sums, 1 - self.decay)
        total = self.count.sum()
        smooth = (self.count + LAPLACE) / (total + len(codebook) * LAPLACE) * total
        torch.div(self.sum, smooth[:, None], out=codebook)

    def forget(self, dead: Tensor, codebook: Tensor) -> None:
        self.count.masked_fill_(dead, 1.0)
        self.sum.copy_(torch.where(dead[:, None], codebook, self.sum))


class Adam(nn.Module):
    """Gradient descent on ‖sg[z] − e‖² by Adam (Kingma, Ba 2015, algorithm 1), with a step count a code.

    The gradient of the mean over N·D entries is 2 (n_k e_k − s_k) / (N D): the sums hold all of it, so neither
    autograd nor DeepSpeed's optimiser sees the codebook, and a reset reaches every copy of it there is.
    """

    mean: Tensor  # fp32 [K, D]
    square: Tensor  # fp32 [K, D]
    steps: Tensor  # fp32 [K, 1] since the start or the last reset

    def __init__(self, codebook: Tensor, config: Config) -> None:
        super().__init__()
        del config
        self.register_buffer("mean", torch.zeros_like(codebook))
        self.register_buffer("square", torch.zeros_like(codebook))
        self.register_buffer("steps", torch.zeros(len(codebook), 1))

    def learn(self, codebook: Tensor, sums: Tensor, counts: Tensor, lr: Tensor) -> None:
        beta1, beta2, epsilon = ADAM
        entries = counts.sum().clamp(min=1) * codebook.shape[1]
        gradient = 2 * (counts[:, None] * codebook - sums) / entries
        self.steps += 1
        self.mean.lerp_(gradient, 1 - beta1)
        self.square.lerp_(gradient.square(), 1 - beta2)
        mean = self.mean / (1 - beta1**self.steps)
        square = self.square / (1 - beta2**self.steps)
        codebook -= lr * mean / (square.sqrt() + epsilon)

    def forget(self, dead: Tensor, codebook: Tensor) -> None:
        del codebook
        for state in (self.mean, self.square, self.steps):
            state.masked_fill_(dead[:, None], 0)
