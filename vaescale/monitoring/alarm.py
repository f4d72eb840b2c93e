"""Whether a codebook has collapsed, why most likely, and which setting to change. Numbers go in, a sentence comes out.

Collapse is measured on the counts averaged over the last 100 steps, so neither the time between reports nor one odd
batch decides.
"""

from typing import Any, NamedTuple

from ..interfaces import Usage
from .codebook import entropy_share, usage_ema

# Shares of the codes in use, and of the log2 K bits that they carry, below which a collapse begins, and above which it
# is over: apart, so that a codebook at the border is not announced again and again. VQGAN's well known collapse is
# found (less than 12 % of 16 384 codes, Zhu et al. 2024, "Scaling the codebook size of VQGAN to 100,000 with a
# utilization rate of 99%", abstract); a blank background that takes one code and four fifths of the images is none.
USAGE = 0.25, 0.35
ENTROPY = 0.15, 0.2
SETTLE = 200  # steps after the warm-up until the averaged counts have forgotten the start
ROWS = 0.1  # rows a step and code, 10 a code over the average: with fewer even healthy codes go without
POINT = 1e-5  # a squared distance to the code that is nothing but rounding
SLOW = 500  # steps: resets that wait longer cannot keep up


class Reading(NamedTuple):
    """One codebook at a report."""

    step: int
    codes: int  # K
    rows: float  # a step, over all ranks
    usage: float  # usage_ema
    entropy: float  # of the averaged counts, over log2 K
    commitment: float


def read(usage: Usage, commitment: float, step: int) -> Reading:
    average = usage.average
    share = float(entropy_share(average))
    return Reading(step, len(average), float(average.sum()), float(usage_ema(average)), share, commitment)


def watch(name: str, reading: Reading, settings: Any, warmup: int, on: list[str]) -> str | None:
    """The sentence to say when a collapse begins or has ended, and None in between. Silent until SETTLE steps after the
    warm-up. settings: the quantiser's Config; on: the codebooks that have collapsed, which is brought up to date."""
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
    """before: what the last report said, which holds as long as there is too little to tell by."""
    if reading.step < warmup + SETTLE or reading.rows < ROWS * reading.codes:
        return before
    return reading.usage < USAGE[before] or reading.entropy < ENTROPY[before]


def sentence(name: str, reading: Reading, settings: Any, begins: bool) -> str:
    """What to tell when a collapse begins, with its cause, or has ended. settings: the quantiser's Config."""
    state = (
        f"{name} {'has collapsed' if begins else 'has recovered'} at step {reading.step}: {reading.usage:.1%} of its "
        f"{reading.codes} codes are in use, at a perplexity of {reading.codes**reading.entropy:.1f}"
    )
    return f"{state}. {cause(reading, settings)}" if begins else state


def cause(reading: Reading, settings: Any) -> str:
    """The likeliest one, with the setting to change."""
    slower = "lower optimizer.lr or raise optimizer.warmup"
    if settings.kind == "lfq":
        return (
            f"The entropy loss is too weak to spread the bits: raise model.quantizer.entropy above "
            f"{settings.entropy}, or {slower}"
        )
    if settings.kind == "fsq":
        return f"The encoder reaches few of the levels, which no reset can help: {slower}, or take fewer levels"
    if reading.commitment < POINT:
        return (
            f"The encoder gives one output for everything (squared distance to its code {reading.commitment:.1e}), so "
            f"there is nothing to tell apart: {slower}, or lower model.quantizer.beta={settings.beta}"
        )
    if settings.kind == "simvq":
        return f"The encoder moved away from the codes faster than their one map could follow: {slower}"
    if settings.reset_every == 0:
        return "Codes that died stay dead, since model.quantizer.reset_every=0: set it to 10"
    if settings.dead_after > SLOW:
        return f"A dead code waits model.quantizer.dead_after={settings.dead_after} steps to be replaced: set it to 50"
    narrow = ", or compare in a small space with model.quantizer.project=8 model.quantizer.metric=cosine"
    return (
        f"Dead codes are replaced, and die again as the encoder moves away from them: {slower}"
        f"{'' if settings.project and settings.metric == 'cosine' else narrow}"
    )
