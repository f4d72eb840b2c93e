"""Skips steps whose gradient is not finite or far larger than usual.

The guard reads the norm of the gradient over all ranks. It is bit-identical on each of them, so all ranks decide alike
without communication. Verdicts and statistics stay on the device and are logged at the next report.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..lifecycle.state import GUARD

# Steps in the running statistics. Only after this many can a step be a spike: norms change by themselves in the first
# hundred steps, the usual length of the warm-up.
MEMORY = 100
DEVIATIONS = 6  # beyond chance; a loss that is always noisy has a larger deviation, hence a higher limit
MOST = 0.25  # largest share of skipped steps, averaged over MEMORY steps
LARGEST = torch.finfo(torch.float32).max
TAKEN, NOT_FINITE, SPIKE, OVERFLOW = range(4)
WHY = {NOT_FINITE: "not finite", SPIKE: "spike", OVERFLOW: "overflow"}


class Skip(NamedTuple):
    """A skipped step; the same on all ranks."""

    step: int  # from 0
    why: int  # a key of WHY
    norm: float
    usual: float  # geometric mean of the earlier norms; NaN before the first step that was taken
    run: int  # consecutive skipped steps, this one included
    share: float  # of skipped steps among the last MEMORY
    micros: list[int]  # micro-batches of the step whose loss is not finite, numbered rank by rank


class Guard:
    """Running mean and variance of log ‖g‖ over the steps that were taken: plain over the first MEMORY steps,
    exponentially averaged after them."""

    def __init__(self, factor: float, device: torch.device) -> None:
        """factor: a norm above `factor` times the usual one may be a spike; 0: no norm is."""
        self.least = math.log(factor) if factor else math.inf
        self.count = torch.zeros((), device=device)  # steps in the statistics, at most MEMORY
        self.mean = torch.zeros((), device=device)
        self.variance = torch.zeros((), device=device)
        self.run = torch.zeros((), device=device)  # consecutive skipped steps
        self.share = torch.zeros((), device=device)  # of skipped steps, exponentially averaged over MEMORY steps

    def limit(self) -> Tensor:
        """Returns fp32 []: the largest norm that is not a spike; the largest finite number before MEMORY steps."""
        above = (DEVIATIONS * self.variance.sqrt()).clamp(min=self.least)
        return torch.where(self.count >= MEMORY, (self.mean + above).exp().clamp(max=LARGEST), LARGEST)

    def usual(self) -> Tensor:
        """Returns fp32 []: the geometric mean of the norms; NaN before the first step that was taken."""
        return torch.where(self.count > 0, self.mean.exp(), math.nan)

    def refuses(self, norm: Tensor) -> Tensor:
        """Returns bool []: whether to skip the step."""
        return ~(norm <= self.limit())  # also NaN and infinity

    def judge(self, norm: Tensor, refused: Tensor, excused: Tensor) -> Tensor:
        """Returns int64 []: TAKEN, or why the step is skipped. Also updates the statistics, so call it once a step.

        refused: bool [], from `refuses`. excused: bool [], a non-finite gradient would be due to a loss scale that can
        still fall. Such a step neither lengthens nor ends a run of skipped steps.
        """
        finite = norm < math.inf  # one kernel; `isfinite` is four
        overflow = excused & ~finite
        enters = (norm > 0) > refused  # and not refused; a gradient of zero has no logarithm
        self.count = (self.count + enters).clamp(max=MEMORY)
        weight = enters / self.count.clamp(min=1)
        off = torch.where(enters, norm.log() - self.mean, 0.0)
        step = weight * off
        self.variance = (1 - weight) * torch.addcmul(self.variance, step, off)
        self.mean = self.mean + step
        skipped = refused > overflow
        self.run = (self.run + skipped) * refused
        self.share = torch.where(overflow, self.share, self.share.lerp(skipped.float(), 1 / MEMORY))
        return torch.where(overflow, OVERFLOW, torch.where(finite, SPIKE, NOT_FINITE)) * refused

    def spoilt(self, why: Tensor) -> Tensor:
        """Returns bool []: whether buffers must not learn from the step either. They may if it overflowed before MEMORY
        steps were taken: the loss scale is still adapting, and these images initialise codebooks. A later overflow may
        be a spike."""
        return (why != TAKEN) > ((why == OVERFLOW) & (self.count < MEMORY))

    def state(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in GUARD}

    def load(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            getattr(self, name).fill_(value)


def explained(skip: Skip, micros: int) -> str:
    """Returns the cause as a clause for the log. micros: micro-batches per rank and step."""
    if skip.why == SPIKE:
        return f"the gradient norm is {skip.norm:.3g}, usually {skip.usual:.3g}"
    if skip.why == OVERFLOW:
        return "the gradient overflowed, so the loss scale is lowered"
    ranks = sorted({micro // micros for micro in skip.micros})
    if ranks:
        if len(ranks) == 1:
            return f"the loss of rank {ranks[0]} is not finite"
        return f"the losses of ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]} are not finite"
    return "the gradient is not finite, though all losses are"


def too_many(skip: Skip, patience: int) -> bool:
    """Returns whether the run must stop at this skipped step: too many in a row, or too large a share of the last
    steps, so that a step taken now and then does not keep the run alive."""
    return skip.run >= patience or skip.share > MOST


def diagnosis(skip: Skip, micros: int, factor: float) -> str:
    """Returns the error text for the skipped step that stops the run."""
    cure = "lower optimizer.lr or raise optimizer.warmup_steps, and look at the samples named above"
    cure += "; if that does not help, continue from an older checkpoint"
    if skip.why == SPIKE:
        cure += f"; if such large gradients are expected, raise optimizer.spike={factor:g} (0: no limit)"
    usual = "" if skip.why == SPIKE or math.isnan(skip.usual) else f"; the usual gradient norm is {skip.usual:.3g}"
    many = f"{skip.share:.0%} of the last {MEMORY} steps" if skip.share > MOST else f"{skip.run} steps in a row"
    return (
        f"{many} were skipped, up to step {skip.step + 1} ({explained(skip, micros)}{usual}); skipped steps do not "
        f"change the weights: {cure}"
    )
