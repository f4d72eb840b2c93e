"""The alarm for critics that have won or gone dead: values in, sentence out."""

from collections.abc import Iterable

from vaescale.monitoring.critic import GRACE, NAME, WINDOW, Critic, Reading, why_dead, why_won
from vaescale.nn.critic import Config

EVERY = 50  # steps between reports
GOOD = Reading(0.7, 0.5, -0.5, 0.005)


def watch(curve: Iterable[Reading], first: int = 0, on: list[str] | None = None, **settings: object) -> list[str]:
    alarm = Critic(Config(weight=0.1, **settings), first, first, [] if on is None else on)  # type: ignore[arg-type]
    said = [alarm.report(EVERY * number, EVERY, reading) for number, reading in enumerate(curve, start=1)]
    return [sentence for sentence in said if sentence]


def won(errors: Iterable[float]) -> list[Reading]:
    return [Reading(0.995, 3.0, -3.0, error) for error in errors]


def test_there_is_no_alarm_for_a_critic_of_use() -> None:
    assert watch([GOOD] * 20) == []
    assert watch([GOOD._replace(error=0.005 * number) for number in range(1, 20)]) == []


def test_an_accurate_critic_is_no_alarm_while_reconstructions_do_not_get_worse() -> None:
    assert watch(won([0.005] * 20)) == []
    assert watch(won(0.01 / number for number in range(1, 20))) == []


def test_a_critic_that_has_won_is_reported_once_with_the_setting() -> None:
    (sentence,) = watch(won(0.004 + 0.0001 * number for number in range(30)))
    assert sentence == (
        "critic has won at step 350: it tells 99.5% of the patches right, and since step 150 the squared error of "
        "reconstructions has risen from 0.0043 to 0.0046. It may know the images by heart: set "
        "adversarial.augment=true, or lower adversarial.weight=0.1"
    )


def test_a_dead_critic_is_reported_once_with_the_setting() -> None:
    (sentence,) = watch([Reading(0.5, 0.2, 0.2001, 0.005)] * 20)
    assert sentence == (
        f"critic has gone dead at step {GRACE + EVERY}: its logits of images and reconstructions differ by 1.0e-04. "
        "Its gradient has vanished: lower optimizer.lr, or set adversarial.loss=non-saturating"
    )


def test_it_waits_for_the_start() -> None:
    """Before the term begins, the model does nothing against the critic."""
    worse = won(0.004 + 0.001 * number for number in range(20))
    assert watch(worse[: (1000 + GRACE + WINDOW) // EVERY - 2], first=1000) == []
    assert len(watch(won(0.004 + 0.001 * number for number in range(40)), first=1000)) == 1


def test_a_state_must_last() -> None:
    flat = Reading(0.5, 0.2, 0.2, 0.005)
    assert watch([*[GOOD] * 9, flat, GOOD, flat, GOOD]) == []


def test_an_alarm_ends_once() -> None:
    curve = [*won(0.004 + 0.001 * number for number in range(12)), Reading(0.97, 1, -1, 0.01), GOOD, GOOD]
    on: list[str] = []
    assert [sentence.split(":")[0] for sentence in watch(curve, on=on)] == [
        "critic has won at step 250",
        "critic is of use again at step 700",
    ]
    assert on == []
    on = [NAME]  # of an earlier process
    (ended,) = watch([GOOD], on=on)
    assert "is of use again at step 50: it tells 70.0% of the patches right" in ended
    assert on == []


def test_causes_name_the_setting_to_change() -> None:
    strict = {"lecam": 0.001, "augment": True}
    assert "set adversarial.lecam=0.001" in why_won(Config(weight=0.1, lecam=0.0))
    assert "set adversarial.r1=0.1" in why_won(Config(weight=0.1, **strict))
    assert "raise adversarial.r1=2" in why_won(Config(weight=0.1, **strict, r1=2.0))
    assert "lower adversarial.r1=2" in why_dead(Config(weight=0.1, r1=2.0))
    assert "lower adversarial.lecam=0.1" in why_dead(Config(weight=0.1, lecam=0.1))
