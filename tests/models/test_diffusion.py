"""Diffusion as a model: its bound, what it is built on, its samples."""

import math
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vaescale.interfaces import Batch, Bound, Bounded, Codec, Condition, Diffused, Model, Output, Sampling, Shape
from vaescale.models import diffusion, hvae, kl, pca, vae, variational, vdvae, vqvae
from vaescale.models.diffusion_data import Latents
from vaescale.nn import diffusion as steps
from vaescale.nn import gaussian, noise
from vaescale.nn import likelihood as likelihoods
from vaescale.nn.blocks import Network
from vaescale.nn.condition import dropped
from vaescale.nn.frozen import weights_hash
from vaescale.nn.gaussian import Normal
from vaescale.nn.likelihood import gaussian_log_prob
from vaescale.nn.vqgan import Config as Net

SMALL: dict[str, Any] = {"width": 32, "depth": 1, "heads": 4, "patch": 2}
SHAPE = Shape(1, 8, 0)


def built(codec: Model | None = None, shape: Shape = SHAPE, **given: Any) -> Any:
    """A model whose network says something: no layer starts at zero."""
    torch.manual_seed(0)
    over = {"over": "run"} if codec else {}
    model = diffusion.build(diffusion.Config(**{**SMALL, **over, **given}), shape, 3, codec)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def batch(count: int, shape: Shape = SHAPE, first: int = 0, classes: int = 1) -> Batch:
    draw = torch.Generator().manual_seed(5)
    x = torch.randint(0, 256, (count, shape.channels, shape.size, shape.size), generator=draw, dtype=torch.uint8)
    sample = torch.arange(first, first + count)
    return Batch(x, sample % classes, torch.zeros(count, 0), sample)


def nothing(count: int) -> Condition:
    return Condition(torch.full((count,), -1), torch.zeros(count, 0))


def measured(model: Any) -> Any:
    """Statistics that its latents do not have, so that a mistake shows."""
    channels = torch.arange(len(model.latent_mean))
    model.latent_mean.copy_(torch.tensor([0.5, -1.0, 2.0])[channels % 3])
    model.latent_std.copy_(torch.tensor([0.5, 1.0, 3.0])[channels % 3])
    return model.eval()


def small_vae(**given: Any) -> Any:
    torch.manual_seed(1)
    network = Network(width=8, halvings=1, hidden=16)
    return measured(vae.build(vae.Config(latent_dim=6, network=network, **given), SHAPE))


def small_hvae(posterior: Any = "top-down") -> Any:
    torch.manual_seed(1)
    network = Network(width=8, halvings=1, hidden=16)
    return hvae.build(hvae.Config(latent_dim=6, top_latent_dim=3, posterior=posterior, network=network), SHAPE)


def small_vdvae() -> Any:
    """p of its coarsest latents, maps of 2 × 2, is N(0, I), as in all untrained ones."""
    torch.manual_seed(1)
    down, up = [vdvae.Stage(8, 1), vdvae.Stage(2, 1)], [vdvae.Stage(2, 2), vdvae.Stage(8, 1)]
    config = vdvae.Config(width=8, bottleneck=4, latent_dim=3, encoder=down, decoder=up)
    return measured(vdvae.build(config, SHAPE))


def small_kl() -> Any:
    torch.manual_seed(2)
    net = Net(channels=32, multipliers=[1, 1], blocks=1, attention=[])
    return measured(kl.build(kl.Config(latent_dim=3, network=net, likelihood=likelihoods.Config()), SHAPE))


def telling(model: Any, x: Any) -> None:
    """Makes the model predict x(z, γ)."""

    def noise_of(z: Tensor, gamma: Tensor, given: Tensor, dropout: Any = None) -> steps.Prediction:
        found = x(z, gamma)
        return steps.Prediction(found, (z - steps.alpha(gamma, z) * found) / steps.sigma(gamma, z))

    model._predict = noise_of


# --- the bound


class Levels(variational.Net):
    """z_1, z_½ and z_0 of a diffusion with T = 2 as the levels of a hierarchical VAE with a fixed encoder."""

    def __init__(self, model: Any, condition: int, likelihood: likelihoods.Likelihood) -> None:
        super().__init__()
        self.model = model
        self.sizes = [math.prod(model.data.shape)] * 3
        self.gammas = torch.linspace(5.0, -13.3, 3, dtype=torch.float64)
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[Tensor] = []  # z of each level

    def infer(self, x: Tensor, embedded: Tensor | None, draw: Any) -> tuple[Tensor, list[variational.Level]]:
        data, images = 2 * x, len(x)
        gamma = self.gammas[0].expand(images)
        q = Normal(steps.alpha(gamma, data) * data, steps.sigma(gamma, data).log().expand_as(data))
        levels = [variational.Level(draw(0, q), q, gaussian.standard(q.mean))]
        for number in (1, 2):
            z, below = levels[-1].z, self.gammas[number].expand(images)
            q = steps.less_noisy(z, data, gamma, below)
            found = self.model._predict(z, gamma, torch.zeros(images, self.model.config.width))
            levels.append(variational.Level(draw(number, q), q, steps.less_noisy(z, found.x, gamma, below)))
            gamma = below
        self.seen = [level.z for level in levels]
        return levels[-1].z / steps.alpha(gamma, x) / 2, levels

    def generate(self, embedded: Tensor | None, images: int, draw: Any) -> Tensor:
        raise NotImplementedError

    def output(self, h: Tensor, embedded: Tensor | None) -> Tensor:
        return h


def test_it_is_a_hierarchical_vae_with_a_fixed_encoder() -> None:
    """T = 2. The bound of models/variational.py, by the KL of normal distributions, has for the z that it drew the
    rates and the distortion of the diffusion."""
    model = built(timesteps=2)
    std = math.exp(-13.3 / 2) / 2
    given = likelihoods.Config(kind="discretised-gaussian", variance=std**2, learned_variance=False)
    hierarchical = variational.Variational(variational.Config(likelihood=given), SHAPE, 3, partial(Levels, model))
    x, net = batch(6), hierarchical.net
    assert isinstance(net, Levels)
    with torch.no_grad():
        found = hierarchical.bound(x)
        data = x.x / 127.5 - 1
        expected = [steps.prior_kl(data, net.gammas[0])]
        down, own = net.gammas[0] - net.gammas[1], torch.empty(0)
        for z, gamma in zip(net.seen, net.gammas, strict=True):
            gamma = gamma.expand(6)
            own = (z - steps.alpha(gamma, z) * data) / steps.sigma(gamma, z)
            predicted = model._predict(z, gamma, torch.zeros(6, 32)).noise
            expected.append(steps.step_kl(own, predicted, down))
        distortion = model.data.bound_given(x, data, own, net.gammas[2]).distortion
    torch.testing.assert_close(found.rate, torch.stack(expected[:3]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.distortion, distortion, rtol=1e-3, atol=1e-3)
    # And the means of both bounds over many draws are the same, within 5 standard errors.
    count = 3000
    many = Batch(
        x.x[:1].expand(count, -1, -1, -1), x.label[:1].expand(count), torch.zeros(count, 0), torch.arange(count)
    )
    with torch.no_grad():
        ours, theirs = (one.bound(many) for one in (model, hierarchical))
    for a, b in ((ours.rate.sum(0), theirs.rate.sum(0)), (ours.distortion, theirs.distortion)):
        error = float(a.std() + b.std()) / math.sqrt(count)
        assert float(a.mean()) == pytest.approx(float(b.mean()), abs=5 * error)


@pytest.mark.parametrize("timesteps", [0, 4])
def test_the_rate_is_the_mean_over_all_levels(timesteps: int) -> None:
    """Of many samples of one image, by the numbers of its bound: against sums over a fine grid of levels, each with
    other noise, within 5 standard errors."""
    model = built(timesteps=timesteps, levels=4, gamma_min=-4.0, gamma_max=4.0)
    count = 4000
    one = batch(1)
    many = Batch(one.x.expand(count, -1, -1, -1), torch.full((count,), -1), torch.zeros(count, 0), torch.arange(count))
    with torch.no_grad():
        found = model.bound(many).rate
        data = many.x / 127.5 - 1
        points = timesteps or 200
        levels = torch.arange(1, points + 1) / points if timesteps else (torch.arange(points) + 0.5) / points
        each = []
        for number, level in enumerate(levels.double()):
            gamma = (-4 + 8 * level).expand(400)
            own = noise.normal(torch.arange(400), (1, 8, 8), 99, number)
            z = steps.noised(data[:400], own, gamma)
            error = own - model._predict(z, gamma, torch.zeros(400, 32)).noise
            squares = error.square().flatten(1).sum(1).mean()
            each.append(float(squares) * (math.expm1(8 / points) / 2 if timesteps else 4 / points))
        parts = np.array(each)[::-1].reshape(4, -1).sum(1)
    assert found.shape == (5, count)
    for part, expected in zip(found[1:5], parts, strict=True):
        error = float(part.std()) / math.sqrt(count)
        assert float(part.mean()) == pytest.approx(expected, abs=5 * error, rel=0.01)


@pytest.mark.parametrize(("timesteps", "levels"), [(10, 10), (10, 5), (50, 5), (100, 10), (2, 8)])
def test_each_part_of_the_rate_has_as_many_levels(timesteps: int, levels: int) -> None:
    """Of T levels with the same cost; with fewer levels than parts there is one part for each."""
    model = built(timesteps=timesteps, levels=levels)
    parts = min(timesteps, levels)
    time = (torch.arange(timesteps, dtype=torch.float64) + 0.5) / timesteps
    x = torch.zeros(timesteps, 1, 8, 8)
    with torch.no_grad():
        given = torch.zeros(timesteps, 32)
        noises = model._noises(torch.arange(timesteps), 1)
        rates = model._rates(x, torch.zeros(timesteps), noises, given, time)
    assert rates.shape == (1 + parts, timesteps)
    assert (rates[1:] > 0).sum(1).tolist() == [timesteps // parts] * parts
    coarse = (rates[1:] > 0).double().argmax(0)  # the part of each level, from the least noise on
    assert coarse.tolist() == sorted(coarse.tolist(), reverse=True)


def test_draws_of_an_image_spread_over_the_levels() -> None:
    """16 draws of each of 40 images are nearer to the mean of many than 16 independent ones would be."""
    model = built(gamma_min=-4.0, gamma_max=4.0)
    telling(model, lambda z, gamma: 0.3 * torch.tanh(z))
    x = batch(40)
    with torch.no_grad():
        draws = torch.stack([model.bound(x, draw).rate.sum(0) for draw in range(160)]).double()
    means = draws.view(10, 16, 40).mean(1)
    assert float(means.std(0).mean()) < 0.6 * float(draws.std(0).mean()) / 4


def test_a_toy_of_one_subpixel_by_enumeration() -> None:
    """T = 2 with x̂ = tanh z: on grids of z_1, z_½ and z_0 the model's 256 probabilities sum to 1; the mean of its bound
    is that on the grids, and at least −log p(x)."""
    shape = Shape(1, 1, 0)
    low, high = -6.0, 2.0
    model = built(shape=shape, timesteps=2, patch=1, gamma_min=low, gamma_max=high, levels=2)
    telling(model, lambda z, gamma: torch.tanh(z))
    gammas = torch.tensor([high, (low + high) / 2, low], dtype=torch.float64)
    z = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    width = float(z[1] - z[0])
    flat = z.view(-1, 1, 1, 1)
    density = gaussian.standard(z).log_density(z).exp()
    for gamma, below in pairwise(gammas):
        p = steps.less_noisy(flat, torch.tanh(flat), gamma.expand(len(z)), below.expand(len(z)))
        to = Normal(p.mean.view(-1, 1), p.log_std.view(-1, 1)).log_density(z[None]).exp()
        density = density @ to * width
    values = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    scale = math.sqrt(1 - 1 / (1 + math.exp(-low)))
    mean = ((z / scale + 1) / 2).float().view(-1, 1, 1, 1)
    std = torch.tensor(math.exp(low / 2) / 2)
    chances = torch.stack([gaussian_log_prob(mean, std, one.expand(len(z), 1, 1, 1)).double().exp() for one in values])
    p = chances @ density * width
    assert float(p.sum()) == pytest.approx(1, abs=1e-4)
    for value in (0, 60, 128, 255):
        count = 20000
        x = torch.full((count, 1, 1, 1), value, dtype=torch.uint8)
        given = Batch(x, torch.full((count,), -1), torch.zeros(count, 0), torch.arange(count))
        with torch.no_grad():
            bound = model.bound(given)
        each = bound.rate.sum(0) + bound.distortion
        data = torch.tensor(value / 127.5 - 1, dtype=torch.float64)
        expected = float(steps.prior_kl(data.view(1, 1, 1, 1), gammas[0]))
        for gamma in gammas[:2]:
            one = gamma.expand(1)
            here = Normal(steps.alpha(one, data[None]).flatten() * data, steps.sigma(one, data[None]).log().flatten())
            weight = here.log_density(z).exp() * width
            off = (data - torch.tanh(z)) * steps.alpha(one, z).flatten() / steps.sigma(one, z).flatten()
            expected += float((weight * off.square()).sum()) * math.expm1((high - low) / 2) / 2
        one = gammas[2:]
        here = Normal(steps.alpha(one, data[None]).flatten() * data, steps.sigma(one, data[None]).log().flatten())
        expected -= float((here.log_density(z).exp() * width * chances[value].log()).nan_to_num(0, 0, 0).sum())
        error = float(each.std()) / math.sqrt(count)
        assert float(each.double().mean()) == pytest.approx(expected, abs=5 * error)
        assert expected >= -math.log(float(p[value]))


def test_the_bound_of_an_image_depends_on_no_other() -> None:
    """So it is the same on any number of ranks."""
    model = built(classes=3)
    whole = batch(7, classes=3)
    bound = model.bound(whole, 2)
    for part in (slice(0, 3), slice(3, 7)):
        one = model.bound(Batch(*(tensor[part] for tensor in whole)), 2)
        torch.testing.assert_close(one.rate, bound.rate[:, part], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one.distortion, bound.distortion[part], rtol=1e-4, atol=1e-3)
    other = model.bound(whole, 3)
    assert not torch.equal(other.rate, bound.rate)
    assert bound.log_ratio is None


def test_times_are_spread_evenly_over_consecutive_samples() -> None:
    """Any stretch of n numbers has about as many in each of n parts: discrepancy of a Kronecker sequence, about log n,
    against √n of independent draws."""
    for first in (0, 12345, 2**40):
        times = noise.spread(torch.arange(first, first + 256), 1, 2)
        counts = torch.histc(times.float(), 16, 0, 1)
        assert counts.min() >= 14
        assert counts.max() <= 18
    far = noise.spread(torch.arange(10), 1, 3) - noise.spread(torch.arange(10), 1, 2)
    assert far.remainder(1).std() < 1e-9  # another place to start from
    assert float(far[0].abs()) > 1e-3


def test_a_flow_has_the_bound_of_its_predictions() -> None:
    """Whether a network says noise or velocity."""
    bounds = []
    for weighting in ("elbo", "flow"):
        model = built(weighting=weighting)
        telling(model, lambda z, gamma: 0.3 * torch.tanh(z))
        bounds.append(model.bound(batch(5)))
    torch.testing.assert_close(bounds[0].rate, bounds[1].rate)


def test_learned_ends_have_the_gradient_of_the_bound() -> None:
    """By differences, with the same noise."""
    for number in (0, 1):
        losses = []
        for change in (-0.005, 0.0, 0.005):
            model = built(learned_ends=True, gamma_min=-6.0, gamma_max=3.0, label_dropout=0)
            telling(model, lambda z, gamma: 0.3 * torch.tanh(z))
            with torch.no_grad():
                model.moved.zero_()
                model.moved[number] += change
            loss = model(batch(64), 0).loss
            losses.append(float(loss.detach()))
            if not change:
                assert [float(end.detach()) for end in model.ends()] == [-6, 3]
                loss.backward()
                gradient = float(model.moved.grad[number])
        assert abs(gradient) > 0.01
        assert gradient == pytest.approx((losses[2] - losses[0]) / 0.01, rel=0.01)
    assert "moved" not in dict(built().named_parameters())


# --- what it is over


class Linear(Model):
    """Probabilistic PCA of one image of 2 × 2 pixels, as a codec: p(z) = N(0, 1), p(y|z) = N(w z, τ²), exact q(z|y)."""

    w = torch.tensor([0.8, -0.3, 0.5, 0.1])
    tau = 0.4

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch, step: int) -> Output:
        raise NotImplementedError

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        precision = 1 + float(self.w.square().sum()) / self.tau**2
        mean = self._y(batch) @ self.w[:, None] / self.tau**2 / precision
        return mean, torch.full_like(mean, precision**-0.5)

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        return [self.posterior(batch)[0]]

    def decode(self, latents: list[Tensor], *_: Any, **__: Any) -> Tensor:
        return (latents[0] * self.w).view(-1, 1, 2, 2)

    def bound_given(self, batch: Batch, latents: list[Tensor], draw: int = 0) -> Bound:
        std = torch.full((4,), math.log(self.tau))
        return Bound.exact(-Normal(latents[0] * self.w, std).log_density(self._y(batch)).sum(1))

    def _y(self, batch: Batch) -> Tensor:
        return batch.x.float().flatten(1) / 100 - 1


def test_over_a_linear_encoder_it_is_probabilistic_pca() -> None:
    """Its exact latents are N(0, 1) over the data of the model, of which σ z is the best prediction of the noise. The
    mean of the bound is then −log p(y) under N(0, w wᵀ + τ²), up to the ends of γ: within 5 standard errors."""
    shape, codec = Shape(1, 2, 0), Linear()
    model = built(codec, shape, patch=1, gamma_min=-12.0, gamma_max=9.0)
    telling(model, lambda z, gamma: steps.alpha(gamma, z) * z)
    # −log p(y) of each y: every y counts, as q is exact for each.
    count = 40000
    x = torch.tensor([[10, 200, 120, 90]], dtype=torch.uint8).expand(count, 4).reshape(count, 1, 2, 2)
    given = Batch(x, torch.full((count,), -1), torch.zeros(count, 0), torch.arange(count))
    with torch.no_grad():
        bound = model.bound(given)
    each = (bound.rate.sum(0) + bound.distortion).double()
    covariance = torch.outer(codec.w, codec.w) + codec.tau**2 * torch.eye(4)
    exact = torch.distributions.MultivariateNormal(torch.zeros(4), covariance)
    expected = -float(exact.log_prob(codec._y(given)[0]))
    assert float(each.mean()) == pytest.approx(expected, abs=5 * float(each.std()) / math.sqrt(count))
    assert float(each.std()) / math.sqrt(count) < 0.06


def test_latents_are_measured_in_their_standard_deviations() -> None:
    codec = small_kl()
    latents = Latents(codec, SHAPE, 0, fixed=False)
    assert latents.shape == (3, 4, 4)
    x, negentropy = latents.drawn(batch(4), 7)
    mean, std = codec.posterior(batch(4))
    own = noise.normal(batch(4).sample, (3, 4, 4), 7)
    expected = (mean + std * own - codec.latent_mean[:, None, None]) / codec.latent_std[:, None, None]
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(latents.latents(x)[0], mean + std * own, rtol=1e-4, atol=1e-5)
    scaled = torch.distributions.Normal(0, std / codec.latent_std[:, None, None])
    torch.testing.assert_close(negentropy, -scaled.entropy().flatten(1).sum(1))


@pytest.mark.parametrize("make", [small_vae, small_kl, lambda: measured(small_hvae()), small_vdvae])
def test_the_bound_of_latents_is_that_of_the_codec_with_another_prior(make: Any) -> None:
    """If the network says that the coarsest latents are N(0, I), hence x = (latents − m) / s is N(−m/s, 1/s²), the mean
    of the bound is that of the VAE with its own prior, up to the ends of γ: within 5 standard errors of the difference,
    as the latents of both are drawn with other noise. The rates of finer latents are reported behind."""
    codec = make()
    model = built(codec, patch=1, gamma_min=-13.3, gamma_max=9.0)
    mean, std = codec.latent_statistics()
    mean, variance = (-mean / std)[:, None, None], std[:, None, None] ** -2

    def prediction(z: Tensor, gamma: Tensor) -> Tensor:
        a, b = steps.alpha(gamma, z), steps.sigma(gamma, z)
        return mean + variance * a / (a**2 * variance + b**2) * (z - a * mean)

    telling(model, prediction)
    count = 20000
    one = batch(1)
    many = Batch(one.x.expand(count, -1, -1, -1), torch.full((count,), -1), torch.zeros(count, 0), torch.arange(count))
    with torch.no_grad():
        ours, theirs = model.bound(many), codec.bound(many)
    own = 2 + model.config.levels
    assert len(ours.rate) == own + len(theirs.rate) - 1
    rates = torch.cat([ours.rate[:own].sum(0, keepdim=True), ours.rate[own:]])
    for a, b in (*zip(rates, theirs.rate, strict=True), (ours.distortion, theirs.distortion)):
        error = float(a.std() + b.std()) / math.sqrt(count)
        assert float(a.mean()) == pytest.approx(float(b.mean()), abs=5 * error + 1e-3)


@pytest.mark.parametrize("make", [small_vae, small_vdvae, lambda: small_hvae()])
def test_the_statistics_are_those_of_draws_of_the_coarsest_latents(make: Any) -> None:
    """Against fp64 draws, over all places of maps and in any batches; the hash of the latents stays as it is."""
    model, given = make(), batch(8)
    before = weights_hash(model)
    model.calibrate(
        sum(model.calibration_sums(Batch(*(part[some] for part in given))) for some in ([0, 1, 2], slice(3, 8)))
    )
    assert weights_hash(model) == before
    with torch.no_grad():
        mean, std = (part.double() for part in model.posterior(given))
        assert torch.equal(model.encode(given)[0], mean.float())
    draws = mean + std * torch.randn(4000, *mean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    channels = draws.movedim(2, 0).flatten(1)
    count = 4000 * len(mean)  # of independent draws, at least
    found, deviation = (part.double() for part in model.latent_statistics())
    assert ((channels.mean(1) - found).abs() < 5 * deviation / count**0.5).all()
    torch.testing.assert_close(channels.std(1), deviation, rtol=5 / count**0.5, atol=0)


def test_finer_latents_are_drawn_by_the_other_model() -> None:
    """Those of an image depend only on its number, and all that are given are decoded as there."""
    codec = small_vdvae()
    model, said, sample = built(codec, sample_steps=2), nothing(3), torch.arange(5, 8)
    images = model.decode([], said, sample=sample)
    torch.testing.assert_close(model.decode([], nothing(1), sample=sample[1:2]), images[1:2], rtol=1e-4, atol=1e-5)
    x = model._sampled(said, sample)
    assert torch.equal(codec.decode(model.data.latents(x), said, sample=sample), images)
    assert not torch.equal(codec.decode(model.data.latents(x), said, sample=sample + 1), images)
    latents = model.encode(batch(3))
    assert len(latents) == 3
    assert torch.equal(model.decode(latents, said), codec.decode(latents, said))


def test_a_conditional_base_is_given_the_condition() -> None:
    codec = small_vae(classes=4)
    model = built(codec, classes=4, patch=1, sample_steps=2)
    said, sample = batch(8, classes=4).condition, torch.arange(8)
    images = model.decode([], said, sample=sample)
    x = model._sampled(said, sample)
    assert torch.equal(images, codec.decode(model.data.latents(x), said))
    assert not torch.equal(images, codec.decode(model.data.latents(x), nothing(8)))
    given = batch(8, classes=4)
    z = model.data.latents(model.data.drawn(given, 3, diffusion.BOUND, 0, diffusion.LATENT)[0])
    torch.testing.assert_close(model.bound(given).distortion, codec.bound_given(given, z).distortion)


def test_fixed_noise_of_the_encoder_replaces_its_own() -> None:
    """z_0 has a fixed ratio of signal to noise and is decoded itself, so that nothing is left for a last step."""
    codec = small_kl()
    model = built(codec, encoder_noise=5.0)
    assert float(model.ends()[0]) == -5
    bound = model.bound(batch(3))
    assert len(bound.rate) == 1 + model.config.levels
    x = (codec.posterior(batch(3))[0] - codec.latent_mean[:, None, None]) / codec.latent_std[:, None, None]
    own = noise.normal(batch(3).sample, (3, 4, 4), 3, diffusion.BOUND, 0, diffusion.LAST)
    z = (x + math.exp(-2.5) * own) * codec.latent_std[:, None, None] + codec.latent_mean[:, None, None]
    torch.testing.assert_close(bound.distortion, codec.bound_given(batch(3), [z]).distortion, rtol=1e-4, atol=1e-2)


def test_the_other_model_stays_as_it_is() -> None:
    codec = small_kl()
    model = built(codec)
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    assert not any(one is other for one in model.parameters() for other in codec.parameters())
    model.train()
    model(batch(4), 0).loss.backward()
    assert not codec.training
    assert all(p.grad is None for p in codec.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in codec.state_dict().items())
    assert isinstance(model.codec, kl.KL)
    assert built().codec is None


# --- samples


def test_samples_depend_on_their_number_and_condition_only() -> None:
    codec = small_kl()  # of pixels a network also reads waves, which make rounding errors large in a few steps
    for given in ({}, {"sampler": "ancestral"}, {"sampler": "heun"}, {"weighting": "flow", "gamma_max": 14.0}):
        model = built(codec, classes=3, sample_steps=5, **given)
        condition, sample = Condition(torch.tensor([0, 1, 2, 0]), torch.zeros(4, 0)), torch.tensor([4, 9, 2, 7])
        images = model.decode([], condition, sample=sample)
        assert images.shape == (4, 1, 8, 8)
        one = model.decode([], Condition(condition.label[1:3], condition.attributes[1:3]), sample=sample[1:3])
        torch.testing.assert_close(images[1:3], one, rtol=1e-3, atol=1e-3)
        other = model.decode([], condition, sample=sample + 1)
        assert not torch.allclose(other, images, atol=1e-2)


def test_guidance_is_none_at_one_and_no_condition_at_zero() -> None:
    model = built(small_kl(), classes=3, sample_steps=4)
    condition, sample = Condition(torch.tensor([0, 1, 2]), torch.zeros(3, 0)), torch.arange(3)
    draw = partial(model.decode, [], sample=sample)
    plain, without = draw(condition), draw(nothing(3))
    for guidance, expected in ((1.0, plain), (0.0, without)):
        found = model.with_sampling(Sampling(guidance=guidance)).decode([], condition, sample=sample)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, without, atol=1e-2)
    z, gamma = torch.randn(3, 3, 4, 4), torch.full((3,), -1.0).double()
    both = [model._given(one, 3) for one in (condition, nothing(3))]
    with_it, alone = (model._predict(z, gamma, one) for one in both)
    found = model.with_sampling(Sampling(guidance=2.5))._guided(torch.cat(both), z, gamma)
    torch.testing.assert_close(found.noise, alone.noise + 2.5 * (with_it.noise - alone.noise), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.x, (z - steps.sigma(gamma, z) * found.noise) / steps.alpha(gamma, z), rtol=1e-3, atol=1e-3
    )


def test_what_means_nothing_is_refused() -> None:
    model = built(classes=3, label_dropout=0.0)
    with pytest.raises(ValueError, match=r"no temperature 0\.7"):
        model.decode([], nothing(2), temperature=0.7)
    with pytest.raises(ValueError, match=r"model\.label_dropout above 0"):
        model.with_sampling(Sampling(guidance=2.0))
    with pytest.raises(ValueError, match=r"model\.classes or data\.attributes"):
        built().with_sampling(Sampling(guidance=2.0))
    with pytest.raises(ValueError, match="top_k, top_p, passes and positions are for priors over codes"):
        built(classes=3).with_sampling(Sampling(top_k=3))
    with pytest.raises(ValueError, match="or a condition that says how many"):
        model.decode([])


def test_labels_are_dropped_for_their_share_of_samples() -> None:
    """Which ones depends only on the seed and the sample numbers."""
    model = built(classes=3, label_dropout=0.25).train()
    seen: list[Tensor] = []
    model._given = lambda condition, images: seen.append(condition.label) or torch.zeros(images, 32)
    model(batch(4000, classes=3), 0)
    share = float((seen[0] < 0).double().mean())
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    uniform = noise.uniform(batch(4000).sample, (), 3, diffusion.UNCONDITIONAL)
    assert torch.equal(seen[0], dropped(batch(4000, classes=3).condition, uniform < 0.25).label)


def test_pixels_are_their_own_latents() -> None:
    model = built()
    (x,) = model.encode(batch(3))
    torch.testing.assert_close(model.decode([x]), batch(3).x / 255)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"encoder_noise": 5.0}, "applies to latents"),
        ({"gamma_min": 6.0}, "must be above model.gamma_min"),
        ({"learned_ends": True, "weighting": "flow"}, "set model.weighting=elbo"),
        ({"patch": 3}, "model.patch=3 does not divide data of 8 × 8"),
        ({"net": "unet", "halvings": 4}, "model.halvings=4 does not fit"),
        ({"net": "unet", "width": 40}, "multiple of the 32 groups"),
        ({"heads": 5}, "must be a multiple"),
        ({"codec": small_kl(), "encoder_noise": 5.0, "learned_ends": True}, "learned_ends does not apply"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        built(**given)


def test_models_without_continuous_latents_are_refused() -> None:
    """Bottom-up, z2 is drawn given z1, so that its distribution given the image alone is not known."""
    torch.manual_seed(0)
    for codec in (vqvae.VQVAE(vqvae.Config(), Shape(1, 8, 0)), small_hvae("bottom-up"), pca.PCA(pca.Config(), SHAPE)):
        with pytest.raises(ValueError, match="model whose coarsest latents are continuous"):
            built(codec)


def test_a_conditional_model_needs_a_diffusion_with_its_condition() -> None:
    codec = small_vae(classes=4)
    for classes in (0, 3):
        with pytest.raises(ValueError, match=r"has 4 classes and 0 attributes .* the same model\.classes"):
            built(codec, classes=classes, patch=1)
    built(codec, classes=4, patch=1)


def test_a_codec_without_likelihood_gives_no_bound() -> None:
    codec = small_kl()
    assert isinstance(built(codec), Bounded)
    assert isinstance(built(), Bounded)
    torch.manual_seed(0)
    settings = kl.Config(latent_dim=3, network=Net(channels=32, multipliers=[1, 1], blocks=1, attention=[]))
    settings = kl.Config(**{**vars(settings), "reconstruction": type(settings.reconstruction)(l1=1.0)})
    without = kl.build(settings, SHAPE)
    without.latent_mean.zero_()
    without.latent_std.fill_(1)
    model = built(without)
    assert not isinstance(model, Bounded)
    assert isinstance(model, Codec)
    assert isinstance(model, Diffused)
