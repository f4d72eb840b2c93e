"""Detects that the critic of an adversarial loss has won or has gone dead, and names the setting to change in one
sentence.

A critic that tells images from reconstructions is no failure by itself: reconstructions of few codes never become
images. It has won if meanwhile they become worse, because the model then learns to please a critic that it cannot
deceive. A dead critic has the same logit for everything, and the model learns nothing from it.
"""

from typing import Any, NamedTuple

NAME = "critic"  # of the alarm
# Both alarms begin beyond the first number and end beyond the second.
WON = 0.98, 0.95  # accuracy
DEAD = 1e-3, 1e-2  # difference between the mean logits of images and reconstructions
WORSE = 1.05  # squared error, over that of the time since when the accuracy has been high
WINDOW = 100  # steps for which a state must have lasted
GRACE = 200  # steps after the critic's and the term's first one without an alarm


class Reading(NamedTuple):
    """Means over the steps since the last report and over ranks."""

    accuracy: float
    real: float  # logit of images
    fake: float  # logit of reconstructions
    error: float  # mean squared error of pixels in [0, 1]


class Critic:
    """The alarm of one run. on: names of the alarms that are on, updated in place."""

    def __init__(self, settings: Any, critic_start: int, start: int, on: list[str]) -> None:
        """settings: the section `adversarial`; critic_start, start: first steps of the critic and of the term."""
        self.settings, self.critic_start, self.start, self.on = settings, critic_start, start, on
        self.high: tuple[int, float] | None = None  # step since which the accuracy has been high, and the error then
        self.flat: int | None = None  # step since which the logits have been the same

    def report(self, step: int, steps: int, reading: Reading) -> str | None:
        """Returns the sentence to log if an alarm begins or ends. reading: over the last `steps` steps."""
        before = NAME in self.on
        accurate = reading.accuracy > WON[before] and step >= self.start + GRACE
        apart = abs(reading.real - reading.fake)
        flat = apart < DEAD[before] and step >= self.critic_start + GRACE
        self.high = (self.high or (step - steps, reading.error)) if accurate else None
        self.flat = (self.flat if self.flat is not None else step - steps) if flat else None
        if before:
            if accurate or flat:
                return None
            self.on.remove(NAME)
            return f"critic is of use again at step {step}: it tells {reading.accuracy:.1%} of the patches right"
        state = ""
        if self.flat is not None and step - self.flat >= WINDOW:
            state = f"has gone dead at step {step}: its logits of images and reconstructions differ by {apart:.1e}"
            state = f"{state}. {why_dead(self.settings)}"
        elif self.high and step - self.high[0] >= WINDOW and reading.error > WORSE * self.high[1]:
            since, error = self.high
            state = (
                f"has won at step {step}: it tells {reading.accuracy:.1%} of the patches right, and since step {since} "
                f"the squared error of reconstructions has risen from {error:.3g} to {reading.error:.3g}. "
                f"{why_won(self.settings)}"
            )
        if not state:
            return None
        self.on.append(NAME)
        return f"{NAME} {state}"


def why_won(settings: Any) -> str:
    """Returns the likeliest cause, with the setting to change."""
    lower = f"lower adversarial.weight={settings.weight:g}"
    if not settings.lecam:
        return f"Nothing restrains it: set adversarial.lecam=0.001, or {lower}"
    if not settings.augment:
        return f"It may know the images by heart: set adversarial.augment=true, or {lower}"
    if not settings.r1:
        return f"Its gradient is not bounded: set adversarial.r1=0.1, or {lower}"
    return f"The model cannot follow it: {lower}, or raise adversarial.r1={settings.r1:g}"


def why_dead(settings: Any) -> str:
    """Returns the likeliest cause, with the setting to change."""
    if settings.r1:
        return f"R1 holds it flat: lower adversarial.r1={settings.r1:g}"
    if settings.lecam > 0.01:
        return f"LeCam holds it flat: lower adversarial.lecam={settings.lecam:g}"
    return "Its gradient has vanished: lower optimizer.lr, or set adversarial.loss=non-saturating"
