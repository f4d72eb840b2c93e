"""The two-level VAE: against its exact evidence where all is linear and Gaussian, and its terms one by one."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.models.test_vae import COLOUR, batch, whole
from vaescale.interfaces import Bound, Condition, Shape
from vaescale.models.hvae import Config, build
from vaescale.models.variational import Variational
from vaescale.nn import likelihood
from vaescale.nn.blocks import Network

NETWORK = Network(width=4, halvings=2, hidden=16)
BOTH = pytest.mark.parametrize("posterior", ["bottom-up", "top-down"])


def model(shape: Shape = COLOUR, **changes: object) -> Variational:
    torch.manual_seed(0)
    return build(Config(**{"latent_dim": 4, "top_latent_dim": 2, "network": NETWORK, **changes}), shape)


def test_top_down_the_image_reaches_the_posteriors_at_the_first_step() -> None:
    """How much each layer's output deviates over images: by torch's default it shrinks 2.4 times at each ReLU."""
    vae = model(
        posterior="top-down", network=Network(width=16, halvings=2, hidden=128), latent_dim=16, top_latent_dim=8
    )
    path = [vae.net.encoder.hidden, vae.net.encoder.out, vae.net.q_top[0], vae.net.q_top[2]]
    deviations = []
    for layer in path:
        layer.register_forward_hook(lambda _, __, out: deviations.append(float(out.std(0).square().mean().sqrt())))
    with torch.no_grad():
        vae(batch(64), 0)
    assert min(after / before for before, after in pairwise(deviations[:3])) > 0.7
    assert deviations[3] > 0.3 * deviations[2]


# --- all maps linear: x = W z1 + b, z1 = A z2 + a, of known variances ---

SIDE, LOW, TOP = 4, 3, 2
C, S = 0.04, 0.5  # variance of x given z1; standard deviation of z1 given z2


class Exact:
    """W with orthogonal columns and A diagonal, so that all posteriors are diagonal; fp64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(torch.randn(16, LOW, generator=generator, dtype=torch.float64))
        self.w = basis * torch.tensor([0.9, 0.6, 0.3])
        self.b = 0.1 * torch.randn(16, generator=generator, dtype=torch.float64)
        self.a = torch.zeros(LOW, TOP, dtype=torch.float64)
        self.a[0, 0], self.a[1, 1] = 0.8, -1.2
        self.shift = torch.tensor([0.2, -0.3, 0.1], dtype=torch.float64)

    def evidence(self, x: Tensor) -> Tensor:
        """log p(x) of the 8-bit images, nats [B]: a Gaussian's, less δ²/(24 c) and log 255 a subpixel."""
        spread = self.a @ self.a.T + S**2 * torch.eye(LOW)
        covariance = self.w @ spread @ self.w.T + C * torch.eye(16)
        density = torch.distributions.MultivariateNormal(self.w @ self.shift + self.b + 0.5, covariance)
        return density.log_prob(x.flatten(1).double() / 255) - 16 * (1 / 255**2 / (24 * C) + math.log(255))

    def fill(self, vae: Variational) -> None:
        """p, and the exact q(z1|x) and q(z2|z1)."""
        net = vae.net
        prior = self.a.square().sum(1) + S**2  # variance of each z1
        low = 1 / (1 / prior + self.w.square().sum(0) / C)
        gain = low[:, None] * self.w.T / C
        top = 1 / (1 + self.a.square().sum(0) / S**2)
        back = top[:, None] * self.a.T / S**2
        with torch.no_grad():
            for layer, weight, mean, std in (
                (net.p_low, self.a, self.shift, torch.full((LOW,), S)),
                (net.encoder, gain, low / prior * self.shift - gain @ self.b, low.sqrt()),
                (net.q_top, back, -back @ self.shift, top.sqrt()),
            ):
                layer.weight.copy_(torch.cat([weight, torch.zeros_like(weight)]))
                layer.bias.copy_(torch.cat([mean, std.log()]))
            net.decoder.weight.copy_(self.w)
            net.decoder.bias.copy_(self.b)


@pytest.fixture(scope="module")
def linear() -> tuple[Variational, Exact]:
    given = likelihood.Config(variance=C, learned_variance=False)
    vae = model(Shape(1, SIDE), latent_dim=LOW, top_latent_dim=TOP, network=Network(kind="linear"), likelihood=given)
    exact = Exact()
    exact.fill(vae)
    return vae.requires_grad_(False), exact


@pytest.fixture
def images(linear: tuple[Variational, Exact]) -> Tensor:
    torch.manual_seed(1)
    drawn = linear[0].decode([], Condition(torch.full((30,), -1), torch.zeros(30, 0)), draw=True)
    return (drawn.clamp(0, 1) * 255).round().to(torch.uint8)


def elbo(bound: Bound) -> Tensor:
    return -(bound.distortion + bound.rate.sum(0)).double()


def test_with_the_exact_posterior_each_draw_weighs_the_evidence(
    linear: tuple[Variational, Exact], images: Tensor
) -> None:
    vae, exact = linear
    for draw in range(3):
        bound = vae.bound(whole(images), draw)
        weights = (bound.log_ratio - bound.distortion).double()
        torch.testing.assert_close(weights, exact.evidence(images), rtol=1e-5, atol=1e-3)
    many = elbo(vae.bound(whole(images.repeat(2000, 1, 1, 1)))).view(2000, -1)
    error = many.std(0) / 2000**0.5
    assert ((many.mean(0) - exact.evidence(images)).abs() < 5 * error + 1e-3).all()


def test_a_wrong_posterior_loses_what_importance_weights_win_back(
    linear: tuple[Variational, Exact], images: Tensor
) -> None:
    """And the evidence is reached to 1e-3 of itself, from below, doubling by doubling."""
    vae, exact = linear
    images, draws = images[:6], 2**13
    kept = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.net.encoder.bias[:LOW] += 0.15
    vae.net.q_top.bias[TOP:] += 0.3
    bound = vae.bound(whole(images.repeat(draws, 1, 1, 1)))
    vae.load_state_dict(kept)
    weights = (bound.log_ratio - bound.distortion).double().view(draws, -1)
    evidence = exact.evidence(images)
    by_k = [(weights.view(-1, k, 6).logsumexp(1) - math.log(k)).mean(0) for k in (1, 8, 64, 512)]
    assert all((more > fewer).all() for fewer, more in pairwise(by_k))
    assert (by_k[0] < evidence - 0.05).all()
    assert ((elbo(bound).view(draws, -1).mean(0) - by_k[0]).abs() < 5 * weights.std(0) / draws**0.5).all()
    torch.testing.assert_close(weights.logsumexp(0) - math.log(draws), evidence, rtol=1e-3, atol=0)


# --- the terms ---


@BOTH
def test_the_loss_is_distortion_and_both_rates(posterior: str) -> None:
    vae, seen = model(posterior=posterior), batch()
    out = vae(seen, 0)
    levels = [out.metrics["rate/level0"], out.metrics["rate/level1"]]
    nats = 192 * math.log(2)
    torch.testing.assert_close(sum(levels) * nats, out.metrics["rate"])
    torch.testing.assert_close(out.loss * 192, out.metrics["distortion"] + out.metrics["rate"])
    out.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in vae.parameters())
    bound = vae.bound(seen)
    assert [tuple(part.shape) for part in bound] == [(6,), (2, 6), (6,)]


@BOTH
def test_closed_and_drawn_rates_agree_in_the_mean(posterior: str) -> None:
    """E[log q − log p] over draws is the expected KL, whatever part of it has a closed form."""
    vae, seen = model(posterior=posterior).requires_grad_(False), batch(3)
    many = seen._replace(**{name: getattr(seen, name).repeat_interleave(4000, 0) for name in ("x", "label")})
    many = many._replace(attributes=torch.zeros(12000, 0), sample=torch.arange(12000))
    bound = vae.bound(many)
    difference = (bound.rate.sum(0) + bound.log_ratio).double().view(3, 4000)
    assert (difference.mean(1).abs() < 4 * difference.std(1) / 4000**0.5).all()
    assert (difference.std(1) > 1e-3).all()


@BOTH
def test_fewer_latents_are_completed_from_the_prior(posterior: str) -> None:
    vae, seen = model(posterior=posterior, classes=3).eval().requires_grad_(False), batch()
    top, low = vae.encode(seen)
    assert (top.shape, low.shape) == ((6, 2), (6, 4))
    whole_image = vae.decode([top, low], seen.condition)
    assert torch.equal(whole_image, vae.decode([top + 1, low], seen.condition))  # x depends on z1 alone
    torch.manual_seed(3)
    drawn = vae.decode([top], seen.condition)
    assert not torch.allclose(drawn, whole_image)
    torch.manual_seed(3)
    assert torch.equal(drawn, vae.decode([top], seen.condition))
    assert torch.equal(vae.decode([top], seen.condition, 0.0), vae.decode([top], seen.condition, 0.0))
    assert vae.decode([], seen.condition).shape == (6, 3, 8, 8)


def test_half_weights_serve() -> None:
    for posterior in ("bottom-up", "top-down"):
        vae, seen = model(posterior=posterior, classes=3).half(), batch()
        vae(seen, 0).loss.backward()
        assert vae.bound(seen).rate.dtype == torch.float32
        assert vae.decode(vae.encode(seen), seen.condition).dtype == torch.float32
        assert vae.decode([], seen.condition).dtype == torch.float32


def test_what_is_not_linear_is_not_called_so() -> None:
    with pytest.raises(ValueError, match=r"model\.posterior=top-down is not linear"):
        model(posterior="top-down", network=Network(kind="linear"))


@BOTH
def test_the_low_level_has_the_same_noise_whether_the_top_is_given_or_drawn(posterior: str) -> None:
    vae, seen = model(posterior=posterior).eval().requires_grad_(False), batch()
    nothing = seen.condition
    torch.manual_seed(7)
    top = torch.randn(6, 2)
    torch.manual_seed(7)
    drawn = vae.decode([], nothing)
    torch.manual_seed(7)
    assert torch.equal(vae.decode([top], nothing), drawn)
