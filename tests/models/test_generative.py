import torch

from tests.models.codes import nothing
from tests.models.test_vqvae import batch, model
from vaescale.interfaces import Bounded, Codebooks, Codec, Shape, WithPrior
from vaescale.models.code_prior import uniform
from vaescale.models.generative import generative
from vaescale.nn.frozen import weights_hash


@torch.no_grad()
def test_only_a_calibrated_codec_gives_a_bound() -> None:
    """Which is that of the distortion and log K for each code. Calibrating changes no code, so the hash stays."""
    vqvae, images = model().eval(), batch(3)
    prior = uniform(vqvae, Shape(3, 32))
    before = weights_hash(vqvae)
    codec = generative(prior)
    assert isinstance(codec, Codec)
    assert isinstance(codec, Codebooks)
    assert isinstance(codec, WithPrior)
    assert not isinstance(codec, Bounded)
    vqvae.calibrate(vqvae.calibration_sums(images))
    assert weights_hash(vqvae) == before
    codec = generative(prior)
    assert isinstance(codec, Bounded)
    bound, latents = codec.bound(images), vqvae.encode(images)
    torch.testing.assert_close(bound.distortion, vqvae.bound_given(images, latents).distortion)
    expected = torch.full((1, 3), latents[0][0].numel() * torch.log(torch.tensor(32.0)))
    torch.testing.assert_close(bound.rate, expected)
    torch.testing.assert_close(bound.log_ratio, -expected[0])


@torch.no_grad()
def test_codes_that_are_left_out_are_drawn() -> None:
    vqvae = model().eval()
    codec = generative(uniform(vqvae, Shape(3, 32)))
    one, other = (codec.decode([], nothing(2), sample=torch.tensor(sample)) for sample in ([1, 2], [2, 3]))
    assert one.shape == (2, 3, 32, 32)
    torch.testing.assert_close(one[1], other[0])
    assert not torch.equal(one[0], one[1])
