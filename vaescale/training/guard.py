"""Skips steps whose gradient is not finite or far larger than usual.

The guard reads the norm of the gradient over all ranks. It is bit-identical on each of them, so all ranks decide alike
without communication. Verdicts and statistics stay on the device and are logged at the next report.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..lifecycle.state import GUARD
from ..numerics import TRITON

# Steps in the running statistics. Only after this many can a step be a spike: norms change by themselves in the first
# hundred steps, the usual length of the warm-up.
MEMORY = 100
DEVIATIONS = 6  # beyond chance; a loss that is always noisy has a larger deviation, hence a higher limit
MOST = 0.25  # largest share of skipped steps, averaged over MEMORY steps
LARGEST = torch.finfo(torch.float32).max
TAKEN, NOT_FINITE, SPIKE, OVERFLOW, CRITIC = range(5)  # CRITIC: the critic's gradient was refused, see adversarial.py
WHY = {NOT_FINITE: "not finite", SPIKE: "spike", OVERFLOW: "overflow", CRITIC: "critic"}


class Skip(NamedTuple):
    """A skipped step; the same on all ranks."""

    step: int  # from 0
    why: int  # a key of WHY
    norm: float
    usual: float  # geometric mean of the earlier norms; NaN before the first step that was taken
    run: int  # consecutive skipped steps, this one included
    share: float  # of skipped steps among the last MEMORY
    micros: list[int]  # micro-batches of the step whose loss is not finite, numbered rank by rank


class Verdict(NamedTuple):
    """On a step, the same on all ranks."""

    record: Tensor  # fp32 [5]: TAKEN or a key of WHY; the norm; and `usual`, `run` and `share` as in Skip
    refused: Tensor  # bool []: the weights must not change
    overflow: Tensor  # bool []: the loss scale must fall
    spoilt: Tensor  # bool []: buffers must not learn from the step either


class Guard:
    """Running mean and variance of log ‖g‖ over the steps that were taken: plain over the first MEMORY steps,
    exponentially averaged after them."""

    def __init__(self, factor: float, device: torch.device) -> None:
        """factor: a norm above `factor` times the usual one may be a spike; 0: no norm is."""
        self.least = math.log(factor) if factor else math.inf
        # Steps in the statistics, at most MEMORY; mean and variance; consecutive skipped steps; their share of all
        # steps, exponentially averaged over MEMORY steps. In one tensor, so that one kernel updates it.
        self.statistics = torch.zeros(len(GUARD), device=device)

    def limit(self) -> float:
        """Returns the largest norm that is not a spike; the largest finite number before MEMORY steps. Waits for the
        device."""
        return float(_limit(self.statistics, self.least))

    def judge(self, norm: Tensor, excused: Tensor) -> Verdict:
        """Returns the verdict on a step and updates the statistics, so call it once a step.

        norm: fp32 []. excused: bool [], a non-finite gradient would be due to a loss scale that can still fall. Such a
        step neither lengthens nor ends a run of skipped steps. Buffers may learn from it before MEMORY steps were
        taken: the loss scale is still adapting, and these images initialise codebooks. A later overflow may be a spike.
        """
        record, flags = _judge(self.statistics, norm, excused, self.least)
        return Verdict(record, *flags.unbind())

    def state(self) -> dict[str, float]:
        return dict(zip(GUARD, self.statistics.tolist(), strict=True))

    def load(self, state: dict[str, float]) -> None:
        values = self.state() | state
        self.statistics.copy_(torch.tensor([values[name] for name in GUARD]))


def _limit(statistics: Tensor, least: float) -> Tensor:
    count, mean, variance, _, _ = statistics.unbind()
    above = (DEVIATIONS * variance.sqrt()).clamp(min=least)
    return torch.where(count >= MEMORY, (mean + above).exp().clamp(max=LARGEST), LARGEST)


@torch.library.custom_op("vaescale::judge", mutates_args={"statistics"})  # some 40 operations on single numbers
def _judge(statistics: Tensor, norm: Tensor, excused: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Returns the Verdict's record, and its flags as bool [3]."""
    if statistics.is_cuda and TRITON:
        from .guard_triton import judge as kernel  # imported late: it takes a second and is rarely needed

        return kernel(statistics, norm, excused, least)
    refused = ~(norm <= _limit(statistics, least))  # also NaN and infinity
    finite = norm < math.inf
    overflow = excused & ~finite
    enters = (norm > 0) > refused  # and not refused; a gradient of zero has no logarithm
    count, mean, variance, run, share = statistics.clone().unbind()
    usual = torch.where(count > 0, mean.exp(), math.nan)
    count = (count + enters).clamp(max=MEMORY)
    weight = enters / count.clamp(min=1)
    off = torch.where(enters, norm.log() - mean, 0.0)
    step = weight * off
    variance = (1 - weight) * torch.addcmul(variance, step, off)
    skipped = refused > overflow
    run = (run + skipped) * refused
    share = torch.where(overflow, share, share.lerp(skipped.float(), 1 / MEMORY))
    torch.stack([count, mean + step, variance, run, share], out=statistics)
    why = torch.where(overflow, OVERFLOW, torch.where(finite, SPIKE, NOT_FINITE)) * refused
    spoilt = refused > (overflow & (count < MEMORY))
    return torch.stack([why.float(), norm, usual, run, share]), torch.stack([refused, overflow, spoilt])


@_judge.register_fake
def _(statistics: Tensor, norm: Tensor, excused: Tensor, least: float) -> tuple[Tensor, Tensor]:
    del excused, least
    return torch.empty_like(statistics), torch.empty(3, dtype=torch.bool, device=norm.device)


def explained(skip: Skip, micros: int) -> str:
    """Returns the cause as a clause for the log. micros: micro-batches per rank and step."""
    if skip.why == SPIKE:
        return f"the gradient norm is {skip.norm:.3g}, usually {skip.usual:.3g}"
    if skip.why == OVERFLOW:
        return "the gradient overflowed, so the loss scale is lowered"
    if skip.why == CRITIC:
        return f"the critic's gradient norm is {skip.norm:.3g}, usually {skip.usual:.3g}"
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
    if skip.why in (SPIKE, CRITIC):
        cure += f"; if such large gradients are expected, raise optimizer.spike={factor:g} (0: no limit)"
    usual = (
        ""
        if skip.why in (SPIKE, CRITIC) or math.isnan(skip.usual)
        else f"; the usual gradient norm is {skip.usual:.3g}"
    )
    many = f"{skip.share:.0%} of the last {MEMORY} steps" if skip.share > MOST else f"{skip.run} steps in a row"
    return (
        f"{many} were skipped, up to step {skip.step + 1} ({explained(skip, micros)}{usual}); skipped steps do not "
        f"change the weights: {cure}"
    )
