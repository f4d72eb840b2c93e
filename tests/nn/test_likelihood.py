"""Likelihoods: they sum to one, agree with torch's distributions, and have the moments that brute force gives them."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from vaescale.nn.likelihood import Config, Likelihood, build

DISCRETE = ["discretised-gaussian", "logistic-mixture"]
LEVELS = torch.arange(256, dtype=torch.uint8)


def made(kind: str, channels: int = 1, **changes: object) -> Likelihood:
    return build(Config(kind=kind, **changes), channels)


def outputs(likelihood: Likelihood, count: int, spread: float = 1.0) -> Tensor:
    """One pixel each."""
    return spread * torch.randn(count, likelihood.channels, 1, 1, generator=torch.Generator().manual_seed(0))


def probabilities(likelihood: Likelihood, output: Tensor) -> Tensor:
    """Of the 256 values of one grey pixel, fp64 [B, 256]."""
    count = len(output)
    x = LEVELS.repeat(count).view(-1, 1, 1, 1)
    return likelihood.log_prob(output.repeat_interleave(256, 0), x).double().exp().view(count, 256)


@pytest.mark.parametrize("kind", DISCRETE)
@pytest.mark.parametrize("variance", [1e-5, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_discretised_likelihoods_sum_to_one(kind: str, variance: float, spread: float) -> None:
    """Also where all of it lies beyond an end; `variance` is the Gaussian's, the mixture's scales are drawn."""
    likelihood = made(kind, variance=variance, components=3)
    total = probabilities(likelihood, outputs(likelihood, 200, spread)).sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_the_mixture_of_three_channels_sums_to_that_of_one() -> None:
    """Over all 256² values of green and blue: so both, given what is before them, sum to one, and all 256³ do."""
    colour, grey = made("logistic-mixture", 3, components=2), made("logistic-mixture", components=2)
    output = outputs(colour, 1)
    rest = output[:, 2:].view(1, 2, 9, 1, 1)
    red_alone = torch.cat([output[:, :2], rest[:, :, [0, 3]].reshape(1, 4, 1, 1)], dim=1)
    greens_and_blues = torch.cartesian_prod(LEVELS, LEVELS)
    for red in LEVELS[[0, 100, 255]]:
        x = torch.cat([red.expand(2**16, 1), greens_and_blues], dim=1)[:, :, None, None]
        total = colour.log_prob(output.expand(2**16, -1, 1, 1), x).double().exp().sum()
        expected = grey.log_prob(red_alone, red.view(1, 1, 1, 1)).double().exp()
        torch.testing.assert_close(total, expected[0], rtol=1e-6, atol=0)


def test_the_mixture_is_the_papers() -> None:
    """PixelCNN++, equations 1 to 3, written out in fp64 for one pixel."""
    likelihood = made("logistic-mixture", 3, components=2)
    output = outputs(likelihood, 1)
    x = torch.tensor([[200, 0, 255]], dtype=torch.uint8)[:, :, None, None]
    numbers = output.double().flatten().tolist()
    red, green = 200 / 127.5 - 1, -1.0
    logits, rest = numbers[:2], numbers[2:]
    total = 0.0
    for k in range(2):
        means, scales, (a, b, c) = rest[9 * k :][:3], rest[9 * k :][3:6], map(math.tanh, rest[9 * k :][6:9])
        places = [means[0], means[1] + a * red, means[2] + b * red + c * green]
        cdf = [
            lambda v, m=m, s=s: 1 / (1 + math.exp(-(v - m) / math.exp(s))) for m, s in zip(places, scales, strict=True)
        ]
        middle = cdf[0](red + 1 / 255) - cdf[0](red - 1 / 255)
        weight = math.exp(logits[k]) / sum(map(math.exp, logits))
        total += weight * middle * cdf[1](-1 + 1 / 255) * (1 - cdf[2](1 - 1 / 255))
    assert float(likelihood.log_prob(output, x)) == pytest.approx(math.log(total), rel=1e-5)


def test_the_discretised_gaussian_is_a_difference_of_cdfs() -> None:
    likelihood = made("discretised-gaussian", variance=0.04, learned_variance=False)
    output = outputs(likelihood, 50, 0.3)
    normal = Normal((output.double().flatten() + 0.5)[:, None], 0.2)
    edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 255
    edges[0], edges[-1] = -1e9, 1e9
    expected = normal.cdf(edges[1:]) - normal.cdf(edges[:-1])
    torch.testing.assert_close(probabilities(likelihood, output), expected, rtol=1e-4, atol=1e-9)


def test_the_gaussian_bounds_the_discretised_one_and_meets_it() -> None:
    """E_u log p(x + u) ≤ log E_u p(x + u) (Jensen), the bin's probability. For wide Gaussians they are half the
    variance of log p(x + u) apart, d² δ² / (24 c²) at a distance d."""
    x = LEVELS[1:-1].view(1, 1, 2, 127)  # the outer bins of the discretised one reach further
    output = torch.zeros(1, 1, 2, 127)
    for std in (0.5 / 255, 2 / 255, 20 / 255):
        exact = made("discretised-gaussian", variance=std**2).log_prob(output, x)
        gap = exact - made("gaussian", variance=std**2).log_prob(output, x)
        assert gap > 0
    expected = ((x / 255 - 0.5).square() / 255**2 / (24 * std**4)).sum()
    torch.testing.assert_close(gap, expected[None], rtol=0.02, atol=0)


def test_the_gaussian_is_the_mean_density_of_the_dequantised_image() -> None:
    torch.manual_seed(0)
    likelihood = made("gaussian", 3, variance=1e-5)
    x = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    output = x / 255 - 0.5 + 0.003 * torch.randn(1, 3, 4, 4)
    u = (torch.rand(200_000, 1, 3, 4, 4) - 0.5).div_(255)
    draws = Normal(output + 0.5, 1e-5**0.5).log_prob(x / 255 + u).sum((1, 2, 3, 4)).double() - 48 * math.log(255)
    error = float(draws.std()) / 200_000**0.5
    assert likelihood.log_prob(output, x).item() == pytest.approx(float(draws.mean()), abs=4 * error)
    assert error < 0.05


def test_a_learned_variance_becomes_the_mean_squared_error() -> None:
    """Of the dequantised image (Rybkin et al. 2021, equation 5), whatever it begins at."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    output = x / 255 - 0.5 + 0.07 * torch.randn(8, 1, 8, 8)
    likelihood = made("gaussian", variance=0.5)
    adam = torch.optim.Adam(likelihood.parameters(), 0.003)
    for _ in range(500):
        adam.zero_grad()
        (-likelihood.log_prob(output, x).mean() / 64).backward()
        adam.step()
    expected = (x / 255 - output - 0.5).square().mean() + 1 / (12 * 255**2)
    torch.testing.assert_close(likelihood.variance(), expected, rtol=1e-3, atol=0)


def test_a_given_variance_is_not_learned_and_weighs_the_squared_error() -> None:
    likelihood = made("gaussian", variance=0.02, learned_variance=False)
    assert not list(likelihood.parameters())
    x = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    near, far = x / 255 - 0.5, torch.zeros(2, 1, 4, 4)
    difference = likelihood.log_prob(near, x) - likelihood.log_prob(far, x)
    torch.testing.assert_close(difference, (x / 255 - 0.5).square().sum((1, 2, 3)) / (2 * 0.02))


def test_bernoulli_is_torchs() -> None:
    likelihood = made("bernoulli", 3)
    x = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    x[0, 0, 0] = torch.tensor([0, 127, 128, 255])
    output = torch.randn(5, 3, 4, 4)
    theirs = Bernoulli(logits=output)
    bits = (x.float() > 127.5).float()
    torch.testing.assert_close(likelihood.log_prob(output, x), theirs.log_prob(bits).sum((1, 2, 3)))
    torch.testing.assert_close(likelihood.mean(output), theirs.mean)


@pytest.mark.parametrize("kind", DISCRETE)
def test_means_are_those_of_brute_force(kind: str) -> None:
    """Sums over 256 values. What is clamped to [0, 1] is not rounded to 8 bits: never more than half a level apart."""
    likelihood = made(kind, variance=0.05, components=3)
    output = outputs(likelihood, 200)
    expected = (probabilities(likelihood, output) * LEVELS / 255).sum(1)
    mean = likelihood.mean(output).flatten().double()
    torch.testing.assert_close(mean, expected, rtol=0, atol=2e-5)  # midpoint rule with 255 places
    if kind == "discretised-gaussian":  # so narrow that rounding is all there is
        narrow = made(kind, variance=1e-10)
        expected = (probabilities(narrow, output) * LEVELS / 255).sum(1)
        assert (narrow.mean(output).flatten() - expected).abs().max() <= 0.5 / 255 + 1e-6


def test_the_mixtures_mean_of_three_channels_is_that_of_brute_force() -> None:
    """Sums over 32³ values of a coarse grid stand for those over 256³; the components lie well inside."""
    likelihood = made("logistic-mixture", 3, components=2)
    output = outputs(likelihood, 1, 0.3)
    output[:, 5:8] -= 3.5  # log-scales of the first component
    output[:, 14:17] -= 3.5
    levels = LEVELS[4::8]
    x = torch.cartesian_prod(levels, levels, levels)[:, :, None, None]
    weights = likelihood.log_prob(output.expand(len(x), -1, 1, 1), x).double().softmax(0)
    expected = (weights[:, None] * x[:, :, 0, 0] / 255).sum(0)
    torch.testing.assert_close(likelihood.mean(output).flatten().double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["gaussian", *DISCRETE, "bernoulli"])
def test_draws_have_the_mean_and_the_probability_of_the_likelihood(kind: str, channels: int) -> None:
    torch.manual_seed(0)
    likelihood = made(kind, channels, variance=0.01, components=2)
    output = outputs(likelihood, 1, 0.3)
    if kind == "logistic-mixture":
        split = output[:, 2:].view(2, -1)
        split[:, channels : 2 * channels] -= 3  # narrow, so that hardly anything is clamped, which the mean takes apart
    draws = likelihood.draw(output.expand(-1, -1, 300, 300))
    assert draws.shape == (1, channels, 300, 300)
    flat = draws.flatten(2)[0].double()
    error = flat.std(1) / 300
    assert ((flat.mean(1) - likelihood.mean(output).flatten()).abs() < 4 * error + 1e-4).all()
    if kind in DISCRETE:
        assert torch.equal((255 * flat).round() / 255, (255 * flat).float().round().double() / 255)
        assert (255 * flat - (255 * flat).round()).abs().max() < 1e-3  # 8-bit values
    if kind in DISCRETE and channels == 1:
        frequencies = torch.bincount((255 * flat[0]).round().long(), minlength=256) / 90_000
        expected = probabilities(likelihood, output)[0]
        assert ((frequencies - expected).abs() < 5 * (expected / 90_000).sqrt() + 1e-4).all()
    if kind == "gaussian":
        torch.testing.assert_close(flat.var(1), torch.full((channels,), 0.01).double(), rtol=0.03, atol=0)


def test_three_channels_of_a_draw_are_correlated_as_they_are_probable() -> None:
    """Red moves green: E[(green − mean) (red − mean)] from draws, and from the coefficient."""
    torch.manual_seed(0)
    likelihood = made("logistic-mixture", 3, components=1)
    output = torch.zeros(1, 10, 1, 1)
    output[:, 4:7] = -3.0
    output[:, 7:] = torch.tensor([1.0, 0.5, 0.7])[:, None, None]
    red, green, blue = (2 * likelihood.draw(output.expand(-1, -1, 400, 400)) - 1).flatten(2)[0].double()
    variance = (math.exp(-3) * math.pi) ** 2 / 3  # of a logistic
    assert float((red * green).mean()) == pytest.approx(math.tanh(1) * variance, rel=0.03)
    slope = math.tanh(0.5) + math.tanh(0.7) * math.tanh(1)
    assert float((red * blue).mean()) == pytest.approx(slope * variance, rel=0.03)


@pytest.mark.parametrize("kind", ["gaussian", *DISCRETE, "bernoulli"])
def test_halves_are_read_in_fp32(kind: str) -> None:
    """Inside autocast the log-probability of a bf16 output has the fp64 value's digits; computed in bf16 it has not."""
    torch.manual_seed(0)
    likelihood = made(kind, 3)
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    output = (0.3 * torch.randn(2, likelihood.channels, 16, 16)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = likelihood.log_prob(output, x)
    assert ours.dtype == torch.float32
    float_ = Tensor.float
    try:
        Tensor.float = Tensor.double  # the same code without the island
        exact = likelihood.log_prob(output, x)
        Tensor.float = lambda tensor: tensor.bfloat16()
        rounded = likelihood.log_prob(output, x)
    finally:
        Tensor.float = float_
    torch.testing.assert_close(ours.double(), exact.double(), rtol=2e-6, atol=0)
    assert ((rounded.double() - exact) / exact).abs().max() > 2e-5


@pytest.mark.parametrize("kind", ["gaussian", *DISCRETE, "bernoulli"])
@pytest.mark.parametrize("far", [0.0, 3.0, 30.0])
def test_gradients_are_finite_however_wrong_the_decoder_is(kind: str, far: float) -> None:
    likelihood = made(kind, 3, variance=1e-4)
    x = torch.tensor([0, 1, 128, 254, 255], dtype=torch.uint8).repeat(3, 1).view(1, 3, 1, 5)
    for sign in (1, -1):
        output = torch.full((1, likelihood.channels, 1, 5), sign * far, requires_grad=True)
        value = likelihood.log_prob(output, x).sum()
        value.backward()
        assert value.isfinite()
        assert output.grad.isfinite().all()


def test_values_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match=r"model\.likelihood\.variance=0"):
        made("gaussian", variance=0)
    with pytest.raises(ValueError, match=r"model\.likelihood\.components=0"):
        made("logistic-mixture", components=0)
