import math
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from vaescale.interfaces import Batch, Bounded, Codec, Condition, KLWeighted, Reconstructor, Shape
from vaescale.models import kl
from vaescale.models.kl import Config, build
from vaescale.nn import conv, likelihood, reconstruction, vit

NETWORK = conv.Config(width=16, residual_width=8)  # f = 4
SIDE = 16
SUBPIXELS = 3 * SIDE**2
LOSSES = reconstruction.Config(l1=2.0, l2=0.5)


def model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return build(Config(network=NETWORK, **changes), Shape(3, SIDE), 5)


def batch(count: int = 4, height: int = SIDE, width: int = SIDE) -> Batch:
    x = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Batch(x, torch.zeros(count, dtype=torch.int64), torch.zeros(count, 0), torch.arange(count))


def posterior(of: Any, x: Tensor) -> torch.distributions.Normal:
    """By torch: the encoder gives means and log-variances."""
    mean, log_variance = of.net.encoder(x / 255 - 0.5).chunk(2, dim=1)
    return torch.distributions.Normal(mean, (log_variance / 2).exp())


def rate(of: Any, x: Tensor) -> Tensor:
    """KL(q‖p) in nats of each image."""
    kl = torch.distributions.kl_divergence(posterior(of, x), torch.distributions.Normal(0.0, 1.0))
    return kl.sum((1, 2, 3))


def test_the_loss_is_the_negative_log_likelihood_and_the_weighted_kl_per_subpixel() -> None:
    one = model(beta=0.3, likelihood=likelihood.Config(variance=0.02, learned_variance=False))
    images = batch()
    out = one(images, 0)
    errors = (out.reconstruction - images.x / 255).square() + 1 / 255**2 / 12
    nll = errors / 0.04 + math.log(2 * math.pi * 0.02) / 2 + math.log(255)
    expected = nll.mean() + 0.3 * rate(one, images.x).mean() / SUBPIXELS
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.metrics["rate"], rate(one, images.x).mean())
    assert not any(value.requires_grad for value in out.metrics.values())


def test_losses_of_the_reconstruction_stand_in_place_of_the_likelihood() -> None:
    one, images = model(beta=0.3, reconstruction=LOSSES), batch()
    out = one(images, 0)
    difference = out.reconstruction - images.x / 255
    compared = 2 * difference.abs().mean() + 0.5 * difference.square().mean()
    torch.testing.assert_close(out.loss, compared + 0.3 * rate(one, images.x).mean() / SUBPIXELS)
    torch.testing.assert_close(one.reconstruction_loss(out.reconstruction, images.x), compared)
    assert "bits_per_dim" not in out.metrics


def test_only_with_a_likelihood_it_has_a_bound() -> None:
    bounded, other = model(), model(reconstruction=LOSSES)
    assert isinstance(bounded, Bounded)
    assert isinstance(bounded, KLWeighted)
    assert not isinstance(bounded, Reconstructor)
    assert isinstance(other, Codec)
    assert isinstance(other, Reconstructor)
    assert not isinstance(other, Bounded)
    assert not isinstance(other, KLWeighted)
    assert bounded.kl_settings().beta == 1e-6


def test_the_bound_is_that_of_the_loss_with_a_weight_of_one() -> None:
    one, images = model(beta=1.0), batch()
    bound = one.bound(images)
    torch.testing.assert_close(bound.rate, rate(one, images.x)[None])
    nats = float(one(images, 0).metrics["bits_per_dim"]) * SUBPIXELS * math.log(2)
    assert nats == pytest.approx(
        float((bound.distortion + bound.rate[0]).detach().mean()), rel=0.01
    )  # with other noise


def test_the_noise_belongs_to_the_sample() -> None:
    one, images = model(), batch()
    whole = one(images, 0).reconstruction
    part = one(Batch(*(tensor[2:] for tensor in images)), 7).reconstruction
    torch.testing.assert_close(part, whole[2:])
    same = images._replace(sample=images.sample + 4)
    assert not torch.allclose(one(same, 0).reconstruction, whole)


def test_encoding_gives_the_mean_or_draws_around_it() -> None:
    one, images = model(), batch()
    q = posterior(one, images.x)
    (mean,) = one.encode(images)
    torch.testing.assert_close(mean, q.mean)
    draws = torch.stack([one.encode(images, 0.5)[0] for _ in range(200)])
    assert float(((draws - q.mean) / q.stddev).detach().std()) == pytest.approx(0.5, rel=0.02)
    torch.testing.assert_close(one.decode([mean]), one.net.decoder(mean) + 0.5)


def test_the_deviation_is_that_of_diffusers() -> None:
    """Which clamps the log-variance, too."""
    one = model()
    output = torch.randn(2, 8, 3, 3) * 30
    one.net.encoder.forward = lambda x: output
    _, (level,) = one.net.infer(torch.zeros(2, 3, 12, 12), None, lambda _, q: q.mean)
    theirs = DiagonalGaussianDistribution(output)
    torch.testing.assert_close(level.q.log_std.exp(), theirs.std)
    assert torch.equal(level.q.mean, theirs.mean)


@pytest.mark.parametrize("reconstruction", [reconstruction.Config(), LOSSES], ids=["likelihood", "losses"])
@pytest.mark.parametrize("network", [NETWORK, vit.Config(patch=4, width=16, depth=1, heads=2)], ids=["conv", "vit"])
def test_gradients_reach_every_parameter(reconstruction: Any, network: Any) -> None:
    torch.manual_seed(0)
    one = build(Config(network=network, reconstruction=reconstruction), Shape(3, SIDE), 5)
    one(batch(), 0).loss.backward()
    for name, parameter in one.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("changes", [{}, {"reconstruction": LOSSES}], ids=["likelihood", "losses"])
def test_a_critic_reaches_the_encoder_through_the_reconstruction(changes: Any) -> None:
    one = model(**changes)
    one(batch(), 0).reconstruction.mean().backward()
    assert one.net.encoder[0].weight.grad.abs().sum() > 0
    assert isinstance(one.last_layer, nn.ConvTranspose2d)
    assert one.last_layer.weight.grad.abs().sum() > 0


def test_larger_images_and_draws_from_the_prior() -> None:
    one = model()
    (z,) = one.encode(batch(2, 24, 40))
    assert z.shape == (2, 4, 6, 10)
    assert one.decode([z]).shape == (2, 3, 24, 40)
    condition = Condition(torch.full((5,), -1), torch.zeros(5, 0))
    assert one.decode([], condition).shape == (5, 3, SIDE, SIDE)
    assert torch.equal(model(reconstruction=LOSSES).decode([z], draw=True), model(reconstruction=LOSSES).decode([z]))


def test_a_condition_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^model\.classes=3 does not apply to model\.kind=kl"):
        model(classes=3)
    assert kl.build(Config(network=NETWORK), Shape(3, SIDE, attributes=2)).conditioner is None
