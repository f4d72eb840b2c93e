"""The alarm for posterior collapse: values in, sentence out."""

from collections.abc import Iterable

import pytest

from vaescale.models import hvae, vae, vdvae
from vaescale.monitoring.posterior import GRACE, WINDOW, Posterior, cause
from vaescale.nn import likelihood

EVERY = 50  # steps between reports


def watch(curve: Iterable[list[float]], **settings: float) -> list[tuple[int, str]]:
    """Returns (step, sentence) of each alarm raised by these reports, with a validation at every second one."""
    on: list[str] = []
    posterior = Posterior(vae.Config(**settings), warmup=0, on=on)  # type: ignore[arg-type]
    said = []
    for step, rates in enumerate(curve, start=1):
        said.append((EVERY * step, posterior.report(EVERY * step, EVERY, rates)))
        if step % 2 == 0:
            said.append(
                (EVERY * step, posterior.validation(EVERY * step, active=sum(not rate < 0.1 for rate in rates)))
            )
    return [(step, sentence) for step, sentence in said if sentence]


@pytest.mark.parametrize(
    "rates",
    [[12.0], [0.2], [0.0, 3.0, 0.0, 0.4], [0.11, 0.11], [20.0, -5.0]],
    ids=["usual", "little", "idle levels", "border", "below zero"],
)
def test_there_is_no_alarm_for_latents_in_use(rates: list[float]) -> None:
    assert watch([rates] * 20) == []


def test_a_collapse_is_reported_once_with_its_cause() -> None:
    ((step, sentence),) = watch([[0.004]] * 20)
    assert step == GRACE
    assert sentence == (
        "latents have collapsed at step 500: they carry 0.004 nats per image, and the decoder ignores them. The KL "
        "has its full weight before the decoder has learned to use the latents: set model.beta_warmup_steps to about "
        "a tenth of steps, or model.free_bits=0.1"
    )


def test_a_hierarchy_with_one_useful_level_has_collapsed() -> None:
    ((_, sentence),) = watch([[0.02, 0.0, 9.5, 0.09]] * 20)
    assert "only level 2 of 4 carries information (9.5 nats per image)" in sentence


def test_it_waits_for_both_warm_ups() -> None:
    """The warm-ups of the learning rate and of the KL."""
    ((step, _),) = watch([[0.0]] * 20, beta_warmup_steps=300)
    assert step == 300 + GRACE
    posterior = Posterior(vae.Config(), 400, [])
    assert [posterior.report(step, EVERY, [0.0]) is not None for step in (849, 899, 900)] == [False, False, True]


def test_low_rates_must_last() -> None:
    """For a window of steps, however often reports are written."""
    for every in (1, 50, 1000):
        posterior = Posterior(vae.Config(), 0, [])
        posterior.report(5000, every, [3.0])
        steps = iter(range(5000 + every, 9000, every))
        first = next(step for step in steps if posterior.report(step, every, [0.01]))
        assert first == 5000 + max(every, WINDOW)
    dips = [[0.01], [3.0]] * 10
    assert watch(dips) == []


def test_a_recovery_is_reported() -> None:
    """It is reported once, and only well above the bound at which the alarm began."""
    curve = [[rate] for rate in [5.0] * 12 + [0.01] * 4 + [0.2] * 4 + [0.6] * 2 + [0.3] * 4]
    (_, begun), (step, over) = watch(curve)
    assert "have collapsed at step 700" in begun
    assert (step, over) == (
        1100,
        "latents have recovered at step 1100: they carry 0.6 nats per image, and 1 are active",
    )


def test_inactive_units_are_a_collapse_at_any_rate() -> None:
    """As under free bits, which keep rates at their level."""
    on: list[str] = []
    posterior = Posterior(vae.Config(free_bits=0.5, beta_warmup_steps=100), 0, on)
    assert posterior.validation(1000, active=0) is None  # nothing is known of rates: it may be no VAE
    assert posterior.report(1000, EVERY, [16.0]) is None
    assert posterior.validation(599, active=0) is None
    sentence = posterior.validation(1000, active=0)
    assert sentence is not None
    assert sentence.startswith("latents have collapsed at step 1000: none of them differs between images. ")
    assert "lower optimizer.lr" in sentence
    assert on == ["latents"]
    assert posterior.report(1050, EVERY, [16.0]) is None
    assert posterior.validation(1100, active=0) is None
    assert posterior.validation(1200, active=3) is not None
    assert on == []


def test_an_alarm_is_not_repeated_after_a_resume() -> None:
    posterior = Posterior(vae.Config(), 0, ["latents"])
    assert posterior.validation(1000, active=5) is None  # no report yet says how it goes
    assert posterior.report(1050, 1000, [0.0]) is None
    assert Posterior(vae.Config(), 0, ["codebook"]).report(1050, 1000, [0.0])


def test_rates_that_are_not_finite_are_no_collapse() -> None:
    """A diverging run is reported elsewhere."""
    assert watch([[float("nan")]] * 9) == []


def test_settings_that_are_already_made_are_not_advised() -> None:
    fixed = likelihood.Config(variance=2.0, learned_variance=False)
    assert "lower model.beta=4 to 1" in cause(vae.Config(beta=4, likelihood=fixed))
    assert "model.likelihood.variance=2" in cause(hvae.Config(likelihood=fixed))
    assert "model.beta_warmup_steps to about a tenth" in cause(vdvae.Config())
    assert "model.free_bits=0.1, or raise model.beta_warmup_steps=50" in cause(vae.Config(beta_warmup_steps=50))
    last = cause(vae.Config(beta_warmup_steps=50, free_bits=0.1))
    assert "lower optimizer.lr or raise optimizer.warmup_steps" in last
    assert "model." not in last
