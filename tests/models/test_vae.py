"""The VAE: against probabilistic PCA in closed form, and its parts one by one."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vaescale.interfaces import Batch, Bounded, Condition, Shape
from vaescale.models.vae import Config, build
from vaescale.models.variational import Variational
from vaescale.nn import gaussian, likelihood
from vaescale.nn.blocks import Network
from vaescale.nn.condition import Conditioner, dropped

NETWORK = Network(width=4, halvings=2, hidden=16)
COLOUR = Shape(3, 8)


def model(shape: Shape = COLOUR, seed: int = 0, **changes: object) -> Variational:
    torch.manual_seed(0)
    return build(Config(**{"latent_dim": 4, "network": NETWORK, **changes}), shape, seed)


def batch(count: int = 6, channels: int = 3, size: int = 8, attributes: int = 0, first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first)
    x = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    said = torch.randn(count, attributes, generator=generator)
    return Batch(x, torch.arange(count) % 3, said, torch.arange(first, first + count))


# --- a linear Gaussian VAE is probabilistic PCA ---

VARIANCE = (10 / 255) ** 2  # c
SIDE, LATENTS = 4, 3


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [400, 1, 4, 4]: five directions of falling variance, two of them to be left out, and noise."""
    generator = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(16, 5, generator=generator))
    scores = torch.randn(400, 5, generator=generator) * torch.tensor([60.0, 45.0, 30.0, 15.0, 12.0])
    grey = 127 + scores @ directions.T + 8 * torch.randn(400, 16, generator=generator)
    return grey.round().clamp(0, 255).to(torch.uint8).view(400, 1, SIDE, SIDE)


def best_log_likelihood(images: Tensor) -> float:
    """Nats an image at the maximum over mean and loadings, the noise variance c given (Tipping, Bishop 1999, equation 8
    with W from equation 15): eigenvalues of the m leading directions become those of the model, the others c. The
    dequantised image's density is less by δ²/(24 c) and more by log δ a subpixel.
    """
    v = images.flatten(1).double() / 255
    values = torch.linalg.eigvalsh(torch.cov(v.T, correction=0)).flip(0)
    modelled = torch.full_like(values, VARIANCE)
    modelled[:LATENTS] = values[:LATENTS].clamp(min=VARIANCE)
    density = -(math.log(2 * math.pi) + modelled.log() + values / modelled).sum() / 2
    return float(density - 16 / 255**2 / (24 * VARIANCE) - 16 * math.log(255))


@pytest.fixture(scope="module")
def linear(images: Tensor) -> Variational:
    vae = model(
        Shape(1, SIDE),
        latent_dim=LATENTS,
        network=Network(kind="linear"),
        likelihood=likelihood.Config(variance=VARIANCE, learned_variance=False),
    )
    steps = 1000
    adam = torch.optim.Adam(vae.parameters(), 0.1, (0.9, 0.95))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    nothing = torch.zeros(len(images), dtype=torch.int64)
    for step in range(steps):
        g = torch.arange(len(images)) + step * len(images)
        adam.zero_grad()
        vae(Batch(images, nothing, torch.zeros(len(images), 0), g), step).loss.backward()
        adam.step()
        falling.step()
    return vae.requires_grad_(False)


def whole(images: Tensor) -> Batch:
    nothing = torch.zeros(len(images), dtype=torch.int64)
    return Batch(images, nothing, torch.zeros(len(images), 0), torch.arange(len(images)))


def test_a_linear_gaussian_vae_reaches_probabilistic_pca(linear: Variational, images: Tensor) -> None:
    """Lucas et al. 2019, "Don't blame the ELBO!": without encoder or optimiser in the way there is no gap."""
    bound = linear.bound(whole(images.repeat(200, 1, 1, 1)))
    elbos = -(bound.distortion + bound.rate.sum(0)).double().view(200, -1).mean(1)
    error = float(elbos.std()) / 200**0.5
    elbo, best = float(elbos.mean()), best_log_likelihood(images)
    assert elbo == pytest.approx(best, rel=1e-3)
    assert elbo < best + 4 * error
    assert error < 1e-4 * abs(best)


def test_importance_weighting_rises_from_the_elbo_to_the_log_likelihood(images: Tensor) -> None:
    """Burda et al. 2016, theorem 1, for an encoder that is far from right. Of the same draws: by Jensen the bound rises
    with each doubling, image by image. The limit is known: log N(v; μ, W Wᵀ + c I).
    """
    vae = model(
        Shape(1, SIDE),
        latent_dim=LATENTS,
        network=Network(kind="linear"),
        likelihood=likelihood.Config(variance=0.3, learned_variance=False),
    ).requires_grad_(False)
    draws = 2**13
    bound = vae.bound(whole(images[:50].repeat(draws, 1, 1, 1)))
    weights = (bound.log_ratio - bound.distortion).double().view(draws, 50)
    elbo = -(bound.distortion + bound.rate.sum(0)).double().view(draws, 50).mean(0)

    by_k = []
    for k in (1, 4, 16, 64, 256):
        grouped = weights.view(-1, k, 50)
        by_k.append((grouped.logsumexp(1) - math.log(k)).mean(0))
    error = weights.std(0) / draws**0.5
    assert ((by_k[0] - elbo).abs() < 5 * error).all()
    for fewer, more in pairwise(by_k):
        assert (more > fewer).all()

    loadings = vae.net.decoder.weight.double()
    mean = vae.net.decoder.bias.double() + 0.5
    exact = torch.distributions.MultivariateNormal(mean, loadings @ loadings.T + 0.3 * torch.eye(16).double())
    density = exact.log_prob(images[:50].flatten(1).double() / 255)
    limit = density - 16 / 255**2 / (24 * 0.3) - 16 * math.log(255)
    error = weights.softmax(0).square().sum(0).sqrt()  # 1/√(effective number of draws): of log Σ w, relative to w
    assert error.max() < 0.05
    assert ((weights.logsumexp(0) - math.log(draws) - limit).abs() < 5 * error).all()
    assert (by_k[-1] < limit + 5 * error).all()


# --- the loss ---


def test_the_loss_is_the_elbo_in_nats_a_subpixel() -> None:
    """Written out: C ‖x − f‖² + KL and the constants of a Gaussian, with the very noise of the sample numbers."""
    vae, seen = model(likelihood=likelihood.Config(variance=0.02, learned_variance=False)), batch()
    out = vae(seen, 0)
    x = seen.x / 255
    mean, log_std = vae.net.encoder(x - 0.5).chunk(2, dim=1)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum(1)
    errors = (out.reconstruction - x).square().sum((1, 2, 3))
    constant = 192 * (math.log(255) + math.log(2 * math.pi * 0.02) / 2 + 1 / 255**2 / (24 * 0.02))
    distortion = errors / (2 * 0.02) + constant
    torch.testing.assert_close(out.metrics["distortion"], distortion.mean())
    torch.testing.assert_close(out.metrics["rate"], kl.mean())
    torch.testing.assert_close(out.loss, (distortion + kl).mean() / 192)
    torch.testing.assert_close(out.metrics["bits_per_dim"], out.loss / math.log(2))
    torch.testing.assert_close(out.metrics["mse"], errors.mean() / 192)
    torch.testing.assert_close(out.metrics["psnr"], -10 * (errors / 192).log10().mean())
    assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("kind", ["gaussian", "discretised-gaussian", "logistic-mixture", "bernoulli"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("network", [NETWORK, Network(kind="linear")], ids=lambda network: network.kind)
def test_gradients_reach_every_parameter(kind: str, channels: int, network: Network) -> None:
    vae = model(
        Shape(channels, 8, attributes=2),
        network=network,
        likelihood=likelihood.Config(kind=kind, components=2),
        classes=3,
        embedding_dim=2,
    )
    seen = batch(channels=channels, attributes=2)
    seen.label[0], seen.attributes[0] = -1, torch.nan
    vae(seen, 0).loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_beta_and_warm_up_weigh_the_kl_alone() -> None:
    seen = batch()
    plain = model()(seen, 0)
    rate = plain.metrics["rate"] / 192
    for vae, step, weight in (
        (model(beta=4.0), 0, 4.0),
        (model(beta=4.0, beta_warmup_steps=8), 0, 0.5),
        (model(beta=4.0, beta_warmup_steps=8), 3, 2.0),
        (model(beta_warmup_steps=8), 7, 1.0),
        (model(beta_warmup_steps=8), 800, 1.0),
        (model(beta=0.0), 5, 0.0),
    ):
        out = vae(seen, step)
        torch.testing.assert_close(out.loss, plain.loss + (weight - 1) * rate)
        torch.testing.assert_close(out.metrics["bits_per_dim"], plain.metrics["bits_per_dim"])  # always of the ELBO


def test_free_bits_charge_what_a_latent_costs_but_at_least_lambda() -> None:
    """Kingma et al. 2016, equation 15, the mean over the batch; it is that of the step before, so on equal batches
    it is the equation itself, and it is the joined batch's, whether that came in one piece or in three."""
    seen = batch(6)
    plain = model()
    reference = plain(seen, 0)
    mean, log_std = plain.net.encoder(seen.x / 255 - 0.5).chunk(2, dim=1)
    rates = (mean.square() + (2 * log_std).exp() - 1) / 2 - log_std
    bits = rates.mean(0).sort().values[1:3].mean().item()  # two latents are below it, two above
    expected = reference.loss + (rates.mean(0).clamp(min=bits) - rates.mean(0)).sum() / 192

    pieces = [Batch(*(tensor[i : i + 2] for tensor in seen)) for i in (0, 2, 4)]
    for parts in ([seen], pieces):
        vae = model(free_bits=bits)
        torch.testing.assert_close(vae(seen, 0).loss, reference.loss)  # before anything is known, nothing is free
        vae._pending.clear()
        for part in parts:
            vae(part, 0)
        vae.update(0, 0.1)
        torch.testing.assert_close(vae.rates, rates.mean(0))
        loss = vae(seen, 1).loss
        torch.testing.assert_close(loss, expected)
        free = rates.mean(0) < bits
        (gradient,) = torch.autograd.grad(
            loss - vae(seen, 1).loss.detach(), vae.net.encoder.out.bias, retain_graph=True
        )
        (of_all,) = torch.autograd.grad(plain(seen, 1).loss, plain.net.encoder.out.bias)
        kl_part = of_all - gradient  # what the free latents no longer pull
        assert kl_part[:4][~free].abs().max() < 1e-6
        torch.testing.assert_close(kl_part[:4][free], mean.mean(0)[free] / 192)


# --- the codec ---


def test_encoding_decoding_and_bounding() -> None:
    vae, seen = model().eval().requires_grad_(False), batch()
    assert isinstance(vae, Bounded)
    (mean,) = vae.encode(seen)
    assert torch.equal(mean, vae.encode(seen, temperature=0.0)[0])
    q = gaussian.normal(vae.net.encoder(seen.x / 255 - 0.5))
    many = Batch(*(tensor.repeat(2000, *[1] * (tensor.ndim - 1)) for tensor in seen))
    draws = vae.encode(many, temperature=0.5)[0].view(2000, 6, 4)
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.06)
    torch.testing.assert_close(draws.std(0), q.log_std.exp() / 2, rtol=0.1, atol=0)
    assert vae.decode([mean]).shape == (6, 3, 8, 8)
    bound = vae.bound(seen)
    assert [tuple(part.shape) for part in bound] == [(6,), (1, 6), (6,)]
    torch.testing.assert_close(bound.rate[0], gaussian.kl(q, gaussian.standard(q.mean)).sum(1))
    ratios = vae.bound(many._replace(sample=torch.arange(len(many.x)))).log_ratio.view(2000, 6)
    error = ratios.std(0) / 2000**0.5
    assert ((-ratios.mean(0) - bound.rate[0]).abs() < 5 * error).all()


def test_the_noise_of_a_bound_is_decided_by_the_numbers_of_sample_and_draw() -> None:
    vae, seen = model().eval(), batch()
    first, second, again = (vae.bound(seen, draw).log_ratio for draw in (0, 1, 0))
    assert torch.equal(first, again)
    assert (first != second).all()
    alone = vae.bound(Batch(*(tensor[3:4] for tensor in seen)), 1).log_ratio
    torch.testing.assert_close(alone, second[3:4], rtol=1e-4, atol=1e-4)


def test_samples_come_from_the_prior_and_the_likelihood() -> None:
    vae = model(latent_dim=1, network=Network(kind="linear"), likelihood=likelihood.Config(variance=0.04)).eval()
    nothing = Condition(torch.full((4000,), -1), torch.zeros(4000, 0))
    slope = vae.net.decoder.weight.detach().flatten()
    means = vae.decode([], nothing, temperature=0.5).detach().flatten(1)
    torch.testing.assert_close(means.std(0), 0.5 * slope.abs(), rtol=0.1, atol=0)
    drawn = vae.decode([], nothing, temperature=0.5, draw=True).detach().flatten(1)
    torch.testing.assert_close(drawn.var(0), 0.25 * slope.square() + 0.04, rtol=0.15, atol=0)
    with pytest.raises(ValueError, match="how many images"):
        vae.decode([])


def test_training_noise_depends_on_seed_and_sample_only() -> None:
    """The joined batch is its parts, whatever torch's generator was used for; another g or seed is another draw."""
    vae = model(classes=3, label_dropout=0.5)
    seen = batch(6)
    together = vae(seen, 0)
    torch.randn(7)
    parts = [vae(Batch(*(tensor[i : i + 2] for tensor in seen)), 0) for i in (0, 2, 4)]
    torch.testing.assert_close(together.loss, torch.stack([part.loss for part in parts]).mean())
    torch.testing.assert_close(together.reconstruction, torch.cat([part.reconstruction for part in parts]))
    for other in (vae(seen._replace(sample=seen.sample + 6), 0), model(classes=3, label_dropout=0.5, seed=1)(seen, 0)):
        assert not torch.allclose(other.reconstruction, together.reconstruction, atol=1e-3)


# --- conditions ---


def test_not_said_is_a_row_and_a_value_of_its_own() -> None:
    torch.manual_seed(0)
    conditioner = Conditioner(classes=3, embedding=2, attributes=2)
    with torch.no_grad():
        conditioner.unknown.copy_(torch.tensor([5.0, 6.0]))
    label = torch.tensor([0, 2, -1])
    attributes = torch.tensor([[0.1, 0.2], [torch.nan, 0.4], [torch.nan, torch.nan]])
    told = conditioner(Condition(label, attributes))
    assert conditioner.dim == told.shape[1] == 4
    torch.testing.assert_close(told[:, :2], conditioner.label.weight[[0, 2, 3]])
    torch.testing.assert_close(told[:, 2:], torch.tensor([[0.1, 0.2], [5.0, 0.4], [5.0, 6.0]]))
    assert torch.equal(conditioner(conditioner.nothing_said(1)), told[2:])
    told.sum().backward()
    assert torch.equal(conditioner.unknown.grad, torch.tensor([2.0, 1.0]))
    kept = dropped(Condition(label, attributes), torch.tensor([False, True, False]))
    assert kept.label.tolist() == [0, -1, -1]
    assert kept.attributes[1].isnan().all()
    assert torch.equal(kept.attributes[0], attributes[0])


def test_label_and_attributes_reach_both_networks() -> None:
    vae = model(Shape(3, 8, attributes=1), classes=3).eval()
    seen = batch(attributes=1)
    (z,) = vae.encode(seen)
    others = [seen._replace(label=(seen.label + 1) % 3), seen._replace(attributes=seen.attributes + 1)]
    for other in others:
        assert not torch.allclose(vae.encode(other)[0], z, atol=1e-4)
        assert not torch.allclose(vae.decode([z], other.condition), vae.decode([z], seen.condition), atol=1e-4)
        assert not torch.allclose(vae.bound(other).rate, vae.bound(seen).rate, atol=1e-4)
    silent = Condition(torch.full((6,), -1), torch.full((6, 1), torch.nan))
    assert torch.equal(vae.decode([z]), vae.decode([z], silent))


def test_dropout_says_nothing_of_its_share_and_only_in_training() -> None:
    vae = model(classes=3, label_dropout=0.3)
    seen = batch(2000, size=8)
    said: list[Tensor] = []
    vae.conditioner.label.register_forward_pre_hook(lambda _, inputs: said.append(inputs[0]))
    vae(seen, 0)
    vae(seen, 1)
    silent = said[0] == 3
    assert float(silent.float().mean()) == pytest.approx(0.3, abs=0.04)
    assert torch.equal(said[0][~silent], seen.label[~silent])
    assert torch.equal(said[0], said[1])  # the same samples, whenever they are seen
    vae.eval()(seen, 0)
    assert torch.equal(said[2], seen.label)


def test_a_conditional_vae_learns_what_the_label_says() -> None:
    """Three grey levels, one a class: told the label, nothing is left for the latents to say."""
    levels = torch.tensor([40, 120, 220], dtype=torch.uint8)
    rates = {}
    for classes in (0, 3):
        given = likelihood.Config(variance=0.01, learned_variance=False)
        vae = model(Shape(1, 8), likelihood=given, classes=classes, embedding_dim=4)
        adam = torch.optim.Adam(vae.parameters(), 1e-2)
        for step in range(150):
            label = torch.arange(30) % 3
            x = levels[label][:, None, None, None].expand(30, 1, 8, 8)
            out = vae(Batch(x, label, torch.zeros(30, 0), torch.arange(30 * step, 30 * step + 30)), step)
            adam.zero_grad()
            out.loss.backward()
            adam.step()
        rates[classes] = float(out.metrics["rate"])
    assert rates[0] > math.log(3) - 0.1
    assert rates[3] < 0.5
    images = vae.eval().decode([], Condition(torch.arange(3), torch.zeros(3, 0))).mean((1, 2, 3))
    torch.testing.assert_close(images, levels / 255, rtol=0, atol=0.05)


# --- precision and settings ---


@pytest.mark.parametrize("kind", ["gaussian", "discretised-gaussian", "logistic-mixture", "bernoulli"])
def test_bf16_has_the_loss_of_fp32(kind: str) -> None:
    """Only what the networks give is rounded: KL and likelihood are not."""
    vae, seen = model(likelihood=likelihood.Config(kind=kind)), batch()
    with torch.autocast("cpu", torch.bfloat16):
        half = vae(seen, 0)
    assert half.loss.dtype == torch.float32
    assert half.reconstruction.dtype == torch.float32
    torch.testing.assert_close(half.loss, vae(seen, 0).loss, rtol=2e-3, atol=0)


def test_half_weights_serve() -> None:
    """As DeepSpeed's fp16 engine has them."""
    vae = model(Shape(3, 8, attributes=1), classes=3, label_dropout=0.5).half()
    seen = batch(attributes=1)
    out = vae(seen, 0)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in vae.parameters())
    assert vae.bound(seen).distortion.dtype == torch.float32
    assert vae.decode(vae.encode(seen), seen.condition).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_dim": 0}, r"model\.latent_dim=0"),
        ({"beta": -1.0}, r"model\.beta=-1"),
        ({"label_dropout": 1.0}, r"model\.label_dropout=1"),
        ({"classes": -1}, r"model\.classes=-1"),
    ],
)
def test_values_that_cannot_be_are_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(**changes)
