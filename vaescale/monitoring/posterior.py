"""Detects that the posterior has collapsed onto the prior, and names the likeliest cause and the setting to change in
one sentence.

The rate KL(q‖p), averaged over images, is an upper bound on the information that latents carry about their image
(Hoffman, Johnson 2016, "ELBO surgery"). The converse does not hold: under free bits a rate costs nothing, and may stay
high while the latents carry no information. So latents have also collapsed if none is active (Burda, Grosse,
Salakhutdinov 2016, 5.2).
"""

import math
from collections.abc import Sequence
from typing import Any

NAME = "latents"  # of the alarm
# Nats per image: a collapse begins below the first number and ends above the second. They differ so that a model near
# the limit is not announced repeatedly. 0.1 nats can distinguish e^0.1 = 1.1 images.
CARRIES = 0.1, 0.5
# Steps after the warm-ups of the learning rate and the KL in which rates may still rise: healthy ones often start near
# 0 (configs/hvae2_digits.yaml: 1.6, 0.5, 5.3 and 13 nats at steps 50, 100, 150 and 200).
GRACE = 500
WINDOW = 100  # steps for which rates must have been low


class Posterior:
    """The alarm of one run. on: names of the alarms that are on, updated in place."""

    def __init__(self, settings: Any, warmup: int, on: list[str]) -> None:
        """settings: those of a KLWeighted model; warmup: steps, of the learning rate."""
        self.settings, self.warmup, self.on = settings, warmup, on
        self.low: int | None = None  # the step since which all rates have been low
        self.rates: Sequence[float] = ()  # of the last report

    def report(self, step: int, steps: int, rates: Sequence[float]) -> str | None:
        """Return the sentence to log if a collapse begins. rates: of each level, coarse to fine, in nats per image,
        averaged over the last `steps` training steps."""
        self.rates = rates
        if not low(rates, CARRIES[0]):
            self.low = None
            return None
        if self.low is None:
            self.low = step - steps
        if self._warming(step) or step - self.low < WINDOW or NAME in self.on:
            return None
        return self._begun(step, described(rates))

    def validation(self, step: int, active: int) -> str | None:
        """Return the sentence to log if a collapse begins or is over. It is over if units are active and the rates of
        the last report are well above the bound. active: number of latents that differ between images. Returns None
        before the first report."""
        if not self.rates:
            return None
        if NAME not in self.on:
            if active or self._warming(step):
                return None
            return self._begun(step, "none of them differs between images")
        if not active or low(self.rates, CARRIES[1]):
            return None
        self.on.remove(NAME)
        state = f"{NAME} have recovered at step {step}: they carry {sum(self.rates):.3g} nats per image"
        return f"{state}, and {active} are active"

    def _warming(self, step: int) -> bool:
        return step < max(self.warmup, self.settings.beta_warmup_steps) + GRACE

    def _begun(self, step: int, state: str) -> str:
        self.on.append(NAME)
        return f"{NAME} have collapsed at step {step}: {state}. {cause(self.settings)}"


def rates(values: dict[str, float], subpixels: int) -> list[float]:
    """Return the rate of each level, coarse to fine, in nats per image, from a report's values; [] without rates."""
    levels = [values[name] * subpixels * math.log(2) for name in sorted(values) if name.startswith("rate/level")]
    return levels or [values[name] for name in ("train/rate",) if name in values]


def low(rates: Sequence[float], bound: float) -> bool:
    """Return whether all levels together carry less than `bound`, or fewer than two of several levels carry that much,
    which leaves no hierarchy. Single levels without information are common in deep models and no collapse. The rate
    of a level whose prior depends on its own draw (bottom-up posteriors) may be negative; then it differs from its
    prior, too, so that the absolute value counts.
    """
    if sum(rates) < bound:
        return True
    return len(rates) > 1 and sum(abs(rate) < bound for rate in rates) > len(rates) - 2


def described(rates: Sequence[float]) -> str:
    if max(rates) < CARRIES[0]:
        return f"they carry {sum(rates):.2g} nats per image, and the decoder ignores them"
    level = max(range(len(rates)), key=rates.__getitem__)
    return f"only level {level} of {len(rates)} carries information ({rates[level]:.3g} nats per image)"


def cause(settings: Any) -> str:
    """Return the likeliest cause of a collapse, with the setting to change."""
    noise = settings.likelihood
    if settings.beta > 1:
        return f"The KL weighs more than the reconstruction: lower model.beta={settings.beta:g} to 1"
    if "gaussian" in noise.kind and not noise.learned_variance:  # Lucas et al. 2019, "Don't blame the ELBO!"
        return (
            f"model.likelihood.variance={noise.variance:g} assumes such noisy pixels that the latents have little to "
            f"explain: lower it, or set model.likelihood.learned_variance=true"
        )
    if not settings.beta_warmup_steps:
        return (
            "The KL has its full weight before the decoder has learned to use the latents: set "
            "model.beta_warmup_steps to about a tenth of steps, or model.free_bits=0.1"
        )
    if not settings.free_bits:
        return (
            f"The decoder does not learn to use the latents while the KL weighs little: set model.free_bits=0.1, or "
            f"raise model.beta_warmup_steps={settings.beta_warmup_steps}"
        )
    slower = "lower optimizer.lr or raise optimizer.warmup_steps"
    return f"KL warm-up and free bits are set, but the latents still carry no information: {slower}"
