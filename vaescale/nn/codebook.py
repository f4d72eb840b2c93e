"""Codebook learning and usage statistics, in fp32 and int64 *buffers* only.

They are buffers because DeepSpeed casts, shards, averages and clips parameters, but never buffers. Shapes: K codes,
D channels.
"""

import torch
from torch import Tensor, nn

from ..interfaces import Usage

LAPLACE = 1e-5  # smoothing of the EMA counts, as in the authors' implementation
MEMORY = 100  # steps over which counts are averaged: a decay of 0.99, as in VQ-VAE's appendix A.1
ADAM = (0.9, 0.999, 1e-8)  # β1, β2, ε


class Tally(nn.Module):
    """Usage statistics of a codebook, from counts that are already summed over the ranks."""

    ever: Tensor  # bool [K]
    age: Tensor  # int64 [K] steps since the last use or reset
    window: Tensor  # int64 [K] uses since the last report
    average: Tensor  # fp32 [K] uses per step, an exponential average that starts at zero
    resets: Tensor  # int64 [] since the last report
    steps: Tensor  # int64 [] since the last report

    def __init__(self, codes: int, age: int = 0) -> None:
        super().__init__()
        self.register_buffer("ever", torch.zeros(codes, dtype=torch.bool))
        self.register_buffer("age", torch.full((codes,), age))
        self.register_buffer("window", torch.zeros(codes, dtype=torch.int64))
        self.register_buffer("average", torch.zeros(codes))
        self.register_buffer("resets", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._pending: Tensor | None = None

    def add(self, codes: Tensor) -> None:
        """Adds codes int64 [N] of this rank and micro-batch to the pending counts."""
        if self._pending is None:
            self._pending = torch.zeros(len(self.ever), device=codes.device)
        self._pending.index_add_(0, codes, torch.ones(len(codes), device=codes.device))

    def take(self) -> Tensor:
        """Returns this rank's counts since the last call, fp32 [K], to be summed over the ranks."""
        pending, self._pending = self._pending, None
        assert pending is not None, "no rows since the last update"
        return pending

    def count(self, counts: Tensor) -> None:
        """Updates the statistics with one step's uses of each code, fp32 [K]."""
        used = counts > 0
        self.window += counts.long()
        self.ever |= used
        self.age.add_(1).masked_fill_(used, 0)
        self.average.lerp_(counts, 1 / MEMORY)
        self.steps += 1

    def reset(self, dead: Tensor) -> None:
        self.age.masked_fill_(dead, 0)
        self.resets += dead.sum()

    def usage(self, clear: bool) -> Usage:
        usage = Usage(*(getattr(self, name).clone() for name in Usage._fields))
        if clear:
            for tensor in (self.window, self.resets, self.steps):
                tensor.zero_()
        return usage


class EMA(nn.Module):
    """Codes as moving averages of the rows assigned to them (VQ-VAE, appendix A.1, equations 6 to 8)."""

    counts: Tensor  # fp32 [K]
    sums: Tensor  # fp32 [K, D]

    def __init__(self, codebook: Tensor, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("counts", torch.ones(len(codebook)))
        self.register_buffer("sums", codebook.clone())

    def learn(self, codebook: Tensor, sums: Tensor, counts: Tensor, lr: Tensor) -> None:
        del lr  # an average has no learning rate
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum()
        smooth = (self.counts + LAPLACE) / (total + len(codebook) * LAPLACE) * total
        torch.div(self.sums, smooth[:, None], out=codebook)

    def forget(self, dead: Tensor, codebook: Tensor) -> None:
        self.counts.masked_fill_(dead, 1.0)
        self.sums.copy_(torch.where(dead[:, None], codebook, self.sums))


class Adam(nn.Module):
    """Gradient descent on ‖sg[z] − e‖² by Adam (Kingma, Ba 2015, algorithm 1), with one step count per code.

    The gradient of the mean over N·D entries is 2 (n_k e_k − s_k) / (N D), which the counts and sums determine. So
    neither autograd nor DeepSpeed's optimiser handles the codebook, and no second copy exists that a reset would miss.
    """

    mean: Tensor  # fp32 [K, D]
    square: Tensor  # fp32 [K, D]
    steps: Tensor  # fp32 [K, 1] since the start or the last reset

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
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
