"""Which steps are not taken: those whose gradient is not finite, or far larger than gradients usually are.

The norm is that of the gradient over all ranks, the same bits on each, so all of them decide alike without a word.
What is decided and learned stays on the device; people are told at the next report.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..lifecycle.state import GUARD

# Steps that are remembered, and as many must have been taken before one can be a spike: the first hundred, as many as
# learning rates usually rise for, are those in which norms change by themselves.
MEMORY = 100
DEVIATIONS = 6  # chance does not reach so far; a loss that is always noisy widens the limit by itself
MOST = 0.25  # share of the steps that may be skipped, averaged over MEMORY of them
TAKEN, NOT_FINITE, SPIKE, OVERFLOW = range(4)
WHY = {NOT_FINITE: "not finite", SPIKE: "spike", OVERFLOW: "overflow"}


class Skip(NamedTuple):
    """A step that was not taken, as all ranks know it."""

    step: int  # the first is 0
    why: int  # a key of WHY
    norm: float
    usual: float  # geometric mean of the norms before; NaN if no step was taken yet
    run: int  # skipped in a row up to this one
    share: float  # of the last steps, skipped
    micros: list[int]  # which of the step's micro-batches, rank after rank, have a loss that is not finite


class Guard:
    """The running distribution of log ‖g‖ over the steps that were taken: plain mean and variance of the first MEMORY,
    exponentially averaged from there on."""

    def __init__(self, factor: float, device: torch.device) -> None:
        """factor: a norm so many times the usual one is a spike; 0: none is."""
        self.least = math.log(factor) if factor else math.inf
        self.count = torch.zeros((), device=device)  # steps remembered, up to MEMORY
        self.mean = torch.zeros((), device=device)
        self.variance = torch.zeros((), device=device)
        self.run = torch.zeros((), device=device)  # steps skipped in a row
        self.share = torch.zeros((), device=device)  # of steps skipped, exponentially averaged over MEMORY of them

    def limit(self) -> Tensor:
        """fp32 []: the largest norm that is no spike."""
        above = (DEVIATIONS * self.variance.sqrt()).clamp(min=self.least)
        return torch.where(self.count >= MEMORY, (self.mean + above).exp(), math.inf)

    def usual(self) -> Tensor:
        """fp32 []"""
        return torch.where(self.count > 0, self.mean.exp(), math.nan)

    def refuses(self, norm: Tensor) -> Tensor:
        """bool []: the step must not be taken."""
        return ~norm.isfinite() | (norm > self.limit())

    def judge(self, norm: Tensor, excused: Tensor) -> Tensor:
        """int64 []: TAKEN, or why not; learn from it. Once a step.

        excused: what is not finite is the doing of a loss scale that can still fall. It then counts neither as a step
        in a row nor as one between two of them.
        """
        refused = self.refuses(norm)
        failed = torch.where(excused, OVERFLOW, NOT_FINITE)
        why = torch.where(norm.isfinite(), torch.where(refused, SPIKE, TAKEN), failed)
        enters = ~refused & (norm > 0)  # a gradient of zero has no logarithm
        self.count = (self.count + enters).clamp(max=MEMORY)
        weight = 1 / self.count.clamp(min=1)
        off = norm.log() - self.mean
        variance = (1 - weight) * (self.variance + weight * off.square())
        self.variance = torch.where(enters, variance, self.variance)
        self.mean = torch.where(enters, self.mean + weight * off, self.mean)
        self.run = torch.where(why == TAKEN, 0.0, self.run + (why != OVERFLOW))
        skipped = ((why == NOT_FINITE) | (why == SPIKE)).float()
        self.share = torch.where(why == OVERFLOW, self.share, self.share + (skipped - self.share) / MEMORY)
        return why

    def spoilt(self, why: Tensor) -> Tensor:
        """bool []: nothing may be learned from the step, by the optimiser or without it. An overflow while a loss scale
        first finds itself says nothing of the images, and they initialise codebooks; a later one may be a spike."""
        return (why != TAKEN) & ((why != OVERFLOW) | (self.count >= MEMORY))

    def state(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in GUARD}

    def load(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            getattr(self, name).fill_(value)


def explained(skip: Skip, micros: int) -> str:
    """Why, in words. micros: of one rank in a step."""
    if skip.why == SPIKE:
        return f"the gradient norm is {skip.norm:.3g}, where {skip.usual:.3g} is usual"
    if skip.why == OVERFLOW:
        return "the gradient overflowed, and the loss scale falls"
    ranks = sorted({micro // micros for micro in skip.micros})
    if ranks:
        return f"the loss of rank {' and '.join(map(str, ranks))} is not finite"
    return "the gradient is not finite, though all losses are"


def too_many(skip: Skip, patience: int) -> bool:
    """With this step: in a row, or among the last ones, so that a step taken now and then is no excuse."""
    return skip.run >= patience or skip.share > MOST


def diagnosis(skip: Skip, micros: int, factor: float) -> str:
    """Of the step with which patience ends."""
    cure = "lower optimizer.lr or raise optimizer.warmup, and look at the samples named above"
    cure += "; if that does not help, go on from an older checkpoint"
    if skip.why == SPIKE:
        cure += f"; if gradients are to stay so large, raise optimizer.spike={factor:g} (0: no limit)"
    usual = "" if skip.why == SPIKE or math.isnan(skip.usual) else f" (the usual gradient norm is {skip.usual:.3g})"
    many = f"{skip.share:.0%} of the last {MEMORY} steps" if skip.share > MOST else f"{skip.run} steps in a row"
    return (
        f"{many} were skipped, the last of them step {skip.step + 1}: {explained(skip, micros)}{usual}; no skipped "
        f"step has moved the weights: {cure}"
    )
