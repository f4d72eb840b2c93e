"""The mathematics of diffusion, in float64 with data x ~ N(0, s²), whose best prediction is known."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor

from vaescale.nn import diffusion, gaussian
from vaescale.nn.diffusion import Prediction

LOW, HIGH = -13.3, 5.0
S = 0.3


def sigmoid(gamma: float) -> float:
    return 1 / (1 + math.exp(-gamma))


def best(z: Tensor, gamma: Tensor) -> Prediction:
    """E[x|z] and E[ε|z] of x ~ N(0, S²)."""
    a, b = diffusion.alpha(gamma, z), diffusion.sigma(gamma, z)
    total = (a * S) ** 2 + b**2
    return Prediction(a * S**2 / total * z, b / total * z)


def fp64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def left(gamma: float) -> float:
    """E‖ε − E[ε|z]‖² by our functions: that of x = S u and ε is a quadratic form, so three points give it."""
    total = 0.0
    for u, e in ((1.0, 0.0), (0.0, 1.0)):
        x, noise = S * fp64(u).view(1, 1, 1, 1), fp64(e).view(1, 1, 1, 1)
        found = best(diffusion.noised(x, noise, fp64(gamma)), fp64(gamma))
        total += float(2 * diffusion.step_kl(noise, found.noise, torch.tensor(math.log(2), dtype=torch.float64)))
    return total


def test_the_continuous_loss_is_the_closed_form() -> None:
    """½ log((1 + s² e^−γ0) / (1 + s² e^−γ1))."""
    expected = 0.5 * math.log((1 + S**2 * math.exp(-LOW)) / (1 + S**2 * math.exp(-HIGH)))
    assert quad(lambda gamma: left(gamma) / 2, LOW, HIGH, epsabs=1e-12)[0] == pytest.approx(expected, abs=1e-9)


def discrete(steps: int) -> float:
    down = (HIGH - LOW) / steps
    return sum(math.expm1(down) / 2 * left(LOW + down * (i + 1)) for i in range(steps))


def test_finitely_many_levels_approach_it_as_one_over_their_number() -> None:
    expected = 0.5 * math.log((1 + S**2 * math.exp(-LOW)) / (1 + S**2 * math.exp(-HIGH)))
    gaps = [discrete(steps) - expected for steps in (100, 1000, 10000)]
    assert gaps == pytest.approx([0.480, 0.0455, 0.00453], rel=0.01)


def test_the_bound_exceeds_the_entropy_by_what_is_left_at_the_highest_noise() -> None:
    """KL between the distribution of z_1 and N(0, 1), for the exact posterior in the last step."""
    loss = quad(lambda gamma: left(gamma) / 2, LOW, HIGH, epsabs=1e-12)[0]
    prior = [float(diffusion.prior_kl(fp64(x).view(1, 1, 1, 1), fp64(HIGH)[0])) for x in (0.0, S)]
    last = 0.5 * math.log(2 * math.pi * math.e / (1 / S**2 + math.exp(-LOW)))
    entropy = 0.5 * math.log(2 * math.pi * math.e * S**2)
    variance = (1 - sigmoid(HIGH)) * S**2 + sigmoid(HIGH)
    # The KL is quadratic in x, so at x = S it has its mean over x.
    expected = 0.5 * (variance - 1 - math.log(variance))
    assert prior[1] + loss + last - entropy == pytest.approx(expected, abs=1e-9)
    assert prior[0] < prior[1]


def test_the_last_step_of_a_density_approaches_the_exact_one() -> None:
    """−E log p(x|z_0) under N(z_0 / α_0, σ_0² / α_0²) ignores that x is not spread evenly: by O(σ_0² / s²)."""
    found = diffusion.density(fp64(1.0).view(1, 1, 1, 1), fp64(LOW)[0])  # E ε² = 1
    exact = 0.5 * math.log(2 * math.pi * math.e / (1 / S**2 + math.exp(-LOW)))
    assert float(found) - exact == pytest.approx(0.5 * math.exp(LOW) / S**2, rel=1e-3)


@pytest.mark.parametrize("curve", [lambda t: t, lambda t: t**3, lambda t: (math.exp(2 * t) - 1) / (math.exp(2) - 1)])
def test_the_loss_depends_on_the_ends_of_the_schedule_only(curve: Callable[[float], float]) -> None:
    """The integral over t of γ'(t) ‖ε − ε̂‖² / 2 (VDM, section 5.1)."""

    def rate(t: float) -> float:
        step = 1e-5
        low, high = max(0, t - step), min(1, t + step)
        slope = (HIGH - LOW) * (curve(high) - curve(low)) / (high - low)
        return slope * left(LOW + (HIGH - LOW) * curve(t)) / 2

    expected = 0.5 * math.log((1 + S**2 * math.exp(-LOW)) / (1 + S**2 * math.exp(-HIGH)))
    assert quad(rate, 0, 1, epsabs=1e-9, limit=500)[0] == pytest.approx(expected, rel=1e-6)


def test_a_step_costs_the_kl_between_its_two_distributions() -> None:
    """Against the KL of the two normal distributions themselves, for any prediction."""
    draw = torch.Generator().manual_seed(0)
    x, noise, wrong = torch.randn(3, 5, 2, 3, 3, generator=draw, dtype=torch.float64)
    gamma, below = fp64(*np.linspace(-12, 5, 5)), fp64(*np.linspace(-12.5, 2, 5))
    z = diffusion.noised(x, noise, gamma)
    predicted = diffusion.from_noise(z, wrong, gamma).x
    kl = gaussian.kl(diffusion.less_noisy(z, x, gamma, below), diffusion.less_noisy(z, predicted, gamma, below))
    for i in range(5):
        found = diffusion.step_kl(noise[i : i + 1], wrong[i : i + 1], (gamma - below)[i])
        assert float(found) == pytest.approx(float(kl[i].sum()), rel=1e-9)


def test_the_kl_of_the_first_level_is_that_of_a_normal_distribution() -> None:
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    for gamma in (fp64(5.0), fp64(-3.0)):
        q = gaussian.Normal(diffusion.alpha(gamma, x) * x, diffusion.sigma(gamma, x).log().expand_as(x))
        expected = gaussian.kl(q, gaussian.standard(x)).flatten(1).sum(1)
        torch.testing.assert_close(diffusion.prior_kl(x, gamma[0]), expected, rtol=1e-9, atol=1e-12)


def test_the_levels_are_one_markov_chain() -> None:
    """z_t ~ q(z_t|x) followed by z_s ~ q(z_s|z_t, x) has the distribution q(z_s|x): mean and variance."""
    x, zero = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    gamma, below = fp64(1.5), fp64(-2.0)
    means = [float(diffusion.less_noisy(diffusion.noised(x, e, gamma), x, gamma, below).mean) for e in (zero, zero + 1)]
    std = float(diffusion.less_noisy(zero, x, gamma, below).log_std.exp())
    assert means[0] == pytest.approx(0.7 * math.sqrt(sigmoid(2.0)))
    assert (means[1] - means[0]) ** 2 + std**2 == pytest.approx(sigmoid(-2.0))


def test_predictions_of_noise_and_velocity_say_the_same() -> None:
    x, noise = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    gamma = fp64(-10.0, 0.0, 8.0)
    z = diffusion.noised(x, noise, gamma)
    for found in (diffusion.from_noise(z, noise, gamma), diffusion.from_velocity(z, noise - x, gamma)):
        torch.testing.assert_close(found.x, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.noise, noise, rtol=1e-9, atol=1e-9)
    place, share = diffusion.flow(z, gamma)
    torch.testing.assert_close(place, (1 - share) * x + share * noise)
    torch.testing.assert_close(share.flatten(), torch.sigmoid(gamma / 2))


def test_ancestral_samples_have_the_covariance_of_the_data() -> None:
    """Of two correlated channels. Of a linear prediction samples are normal, so their covariance says all: within 4
    standard errors of the exact one of T levels, which is near that of the data."""
    steps, count = 200, 40000
    data = torch.tensor([[0.09, 0.05], [0.05, 0.04]], dtype=torch.float64)
    gammas = diffusion.grid(*fp64(LOW, HIGH), steps, False)

    def linear(gamma: Tensor) -> tuple[Tensor, Tensor]:
        """E[x|z] = M z."""
        signal, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
        total = signal * data + noise * torch.eye(2)
        return signal.sqrt() * data @ torch.linalg.inv(total), noise

    def predict(z: Tensor, gamma: Tensor) -> Prediction:
        x = torch.einsum("ij, bjhw -> bihw", linear(gamma[0])[0], z)
        return Prediction(x, (z - diffusion.alpha(gamma, z) * x) / diffusion.sigma(gamma, z))

    exact = torch.eye(2, dtype=torch.float64)
    unit = torch.eye(2, dtype=torch.float64).view(2, 2, 1, 1)
    for gamma, below in zip(gammas[:-1, None], gammas[1:, None], strict=True):
        step = diffusion.less_noisy(unit, predict(unit, gamma).x, gamma, below)
        linear_map = step.mean.view(2, 2).T
        exact = linear_map @ exact @ linear_map.T + torch.eye(2) * float(step.log_std[0, 0].exp()) ** 2
    exact = exact / sigmoid(-LOW)
    torch.testing.assert_close(exact, data, rtol=0.1, atol=0)
    draw = torch.Generator().manual_seed(1)
    noise = [torch.randn(count, 2, 1, 1, generator=draw, dtype=torch.float64) for _ in range(steps + 1)]
    found = torch.cov(diffusion.sampled(predict, noise.__getitem__, gammas, "ancestral").flatten(1).T)
    errors = ((exact.square() + torch.outer(exact.diag(), exact.diag())) / count).sqrt()
    assert ((found - exact).abs() < 4 * errors).all()


@pytest.mark.parametrize("straight", [False, True])
def test_deterministic_samplers_solve_the_flow(straight: bool) -> None:
    """Against scipy's solution of dz/ds = E[ε − x|z] from the same noise. Twice as many steps halve Euler's error, and
    quarter Heun's."""
    ends = [1 / (1 + math.exp(-gamma / 2)) for gamma in (HIGH, LOW)]
    begin = 1.3  # of z with α² + σ² = 1; on the path of the flow it is divided by α + σ

    def velocity(s: float, z: np.ndarray) -> np.ndarray:
        gamma = fp64(2 * math.log(s / (1 - s)))
        total = float(diffusion.alpha(gamma, gamma) + diffusion.sigma(gamma, gamma))
        found = best(torch.from_numpy(z * total).view(-1, 1, 1, 1), gamma)
        return np.asarray((found.noise - found.x).flatten())

    high = fp64(HIGH)
    first = begin / float(diffusion.alpha(high, high) + diffusion.sigma(high, high))
    end = solve_ivp(velocity, ends, [first], rtol=1e-11, atol=1e-13).y[0, -1]
    low = fp64(LOW)
    exact = end * float((diffusion.alpha(low, low) + diffusion.sigma(low, low)) / diffusion.alpha(low, low))
    errors = {}
    for sampler in ("ddim", "heun"):
        for steps in (50, 100, 200):
            gammas = diffusion.grid(*fp64(LOW, HIGH), steps, straight)
            found = diffusion.sampled(best, lambda _: fp64(begin).view(1, 1, 1, 1), gammas, sampler)  # type: ignore[arg-type]
            errors[sampler, steps] = abs(float(found) - exact)
    assert errors["ddim", 50] < 0.05 * abs(exact)
    assert errors["ddim", 200] / errors["ddim", 100] == pytest.approx(1 / 2, rel=0.15)
    assert errors["heun", 200] / errors["heun", 100] == pytest.approx(1 / 4, rel=0.25)
    assert errors["heun", 50] < errors["ddim", 50] / 3


def test_waves_tell_levels_apart() -> None:
    gamma = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    waves = diffusion.waves(gamma, 64)
    assert waves.shape == (4001, 64)
    assert float((waves[1:] - waves[:-1]).norm(dim=1).min()) > 0.1
