"""Detects that a codebook has collapsed, and names the likeliest cause and the setting to change in one sentence.

Collapse is measured on the counts averaged over the last 100 steps, so that it depends neither on the interval between
reports nor on a single unusual batch.
"""

from typing import Any, NamedTuple

from ..interfaces import Usage
from .code_statistics import entropy_share, usage_ema

# A collapse begins when the share of codes in use, or the entropy as a share of log2 K, falls below the first number,
# and ends above the second. They differ so that a codebook near the limit is not announced repeatedly. VQGAN's known
# collapse is detected (less than 12 % of 16 384 codes, Zhu et al. 2024, "Scaling the codebook size of VQGAN to 100,000
# with a utilization rate of 99%", abstract). A blank background that gives four fifths of the images one code is not.
USAGE = 0.25, 0.35
ENTROPY = 0.15, 0.2
GRACE = 200  # steps after the warm-up without an alarm, until the averaged counts no longer depend on the start
ROWS = 0.1  # rows per step and code, 10 per code over the average; with fewer, even healthy codes stay unused
POINT = 1e-5  # squared distance to the code that is only rounding
SLOW = 500  # steps; resets that wait longer cannot keep up


class Reading(NamedTuple):
    """The state of one codebook at a report."""

    step: int
    codes: int  # K
    rows: float  # per step, over all ranks
    usage: float  # usage_ema
    entropy: float  # of the averaged counts, over log2 K
    commitment: float


def reading_of(usage: Usage, commitment: float, step: int) -> Reading:
    average = usage.average
    share = float(entropy_share(average))
    return Reading(step, len(average), float(average.sum()), float(usage_ema(average)), share, commitment)


def watch(name: str, reading: Reading, settings: Any, warmup: int, on: list[str]) -> str | None:
    """Returns the sentence to log when a collapse begins or ends, and None otherwise. Always None until GRACE steps
    after the warm-up. settings: the quantiser's Config; on: names of the collapsed codebooks, updated in place."""
    before = name in on
    now = collapsed(reading, before, warmup)
    if now == before:
        return None
    if now:
        on.append(name)
    else:
        on.remove(name)
    return sentence(name, reading, settings, now)


def collapsed(reading: Reading, before: bool, warmup: int) -> bool:
    """Returns whether the codebook has collapsed. `before` is the answer at the last report, which is kept while there
    is too little data."""
    if reading.step < warmup + GRACE or reading.rows < ROWS * reading.codes:
        return before
    return reading.usage < USAGE[before] or reading.entropy < ENTROPY[before]


def sentence(name: str, reading: Reading, settings: Any, begins: bool) -> str:
    """Returns the sentence for a collapse that begins, with its cause, or is over. settings: the quantiser's Config."""
    state = (
        f"{name} {'has collapsed' if begins else 'has recovered'} at step {reading.step}: {reading.usage:.1%} of its "
        f"{reading.codes} codes are in use, with a perplexity of {reading.codes**reading.entropy:.1f}"
    )
    return f"{state}. {cause(reading, settings)}" if begins else state


def cause(reading: Reading, settings: Any) -> str:
    """Returns the likeliest cause of a collapse, with the setting to change."""
    slower = "lower optimizer.lr or raise optimizer.warmup_steps"
    if settings.kind == "lfq":
        return (
            f"The entropy loss is too weak to spread the bits: raise model.quantizer.entropy_weight above "
            f"{settings.entropy_weight}, or {slower}"
        )
    if settings.kind == "fsq":
        return f"The encoder uses few of the levels, which no reset can change: {slower}, or use fewer levels"
    if reading.commitment < POINT:
        return (
            f"The encoder gives the same output for every input (squared distance to its code "
            f"{reading.commitment:.1e}): {slower}, or lower model.quantizer.beta={settings.beta}"
        )
    if settings.kind == "simvq":
        return f"The encoder moved away from the codes faster than their shared linear map could follow: {slower}"
    if settings.reset_every == 0:
        return "Dead codes are never replaced, because model.quantizer.reset_every=0: set it to 10"
    if settings.dead_after > SLOW:
        return (
            f"A dead code is only replaced after model.quantizer.dead_after={settings.dead_after} steps: set it to 50"
        )
    narrow = ", or compare in few dimensions with model.quantizer.codebook_dim=8 model.quantizer.metric=cosine"
    return (
        f"Dead codes are replaced, and die again as the encoder moves away from them: {slower}"
        f"{'' if settings.codebook_dim and settings.metric == 'cosine' else narrow}"
    )
