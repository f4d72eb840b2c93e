import pytest
import torch

from vaescale.interfaces import Batch, Shape
from vaescale.models.vqvae import VQVAE, Config
from vaescale.nn import conv, quantize


def model(**changes: object) -> VQVAE:
    torch.manual_seed(0)
    network = conv.Config(width=16, residual_width=8, **changes)
    config = Config(network=network, quantizer=quantize.Config(codebook_size=32, dim=8))
    return VQVAE(config, Shape())


def batch(count: int = 4, size: int = 32) -> Batch:
    x = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return Batch(x, torch.zeros(count, dtype=torch.int64), torch.zeros(count, 0), torch.arange(count))


@pytest.mark.parametrize("downsample_factor", [2, 4, 8, 16])
def test_shapes(downsample_factor: int) -> None:
    vqvae = model(downsample_factor=downsample_factor)
    (codes,) = vqvae.encode(batch())
    assert codes.shape == (4, 32 // downsample_factor, 32 // downsample_factor)
    assert codes.dtype == torch.int64
    assert vqvae.decode([codes]).shape == (4, 3, 32, 32)


def test_the_papers_setting_has_the_papers_codes() -> None:
    """ImageNet, section 4.1: 128 × 128 × 3 → 32 × 32 × 1 codes, K = 512, 256 hidden units."""
    with torch.device("meta"):
        vqvae = VQVAE(Config(), Shape())
    assert vqvae.config.network.width == 256
    assert vqvae.config.quantizer.codebook_size == 512
    features = vqvae.encoder(torch.empty(1, 3, 128, 128, device="meta"))
    assert features.shape == (1, 64, 32, 32)


def test_decoding_codes_is_reconstructing() -> None:
    vqvae, images = model().eval(), batch()
    torch.testing.assert_close(vqvae.decode(vqvae.encode(images)), vqvae(images, 0).reconstruction)


def test_the_loss_is_its_parts() -> None:
    vqvae, images = model(), batch()
    out = vqvae(images, 0)
    error = (out.reconstruction - images.x / 255).square()
    expected = error.mean() / 0.06 + 0.25 * out.metrics["codebook/commitment"]
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(vqvae.reconstruction_loss(out.reconstruction, images.x), error.mean() / 0.06)
    psnr = (-10 * error.mean(dim=(1, 2, 3)).log10()).mean()
    torch.testing.assert_close(out.metrics["psnr"], psnr)


def test_each_codebook_has_its_name_and_its_commitment() -> None:
    quantizer = quantize.Config(codebook_size=32, dim=8, depth=2)
    vqvae, images = (
        VQVAE(Config(network=conv.Config(width=16, residual_width=8), quantizer=quantizer), Shape()),
        batch(),
    )
    out = vqvae(images, 0)
    assert list(vqvae.usage(clear=False)) == ["codebook0", "codebook1"]
    commitment = [out.metrics["codebook0/commitment"], out.metrics["codebook1/commitment"]]
    expected = vqvae.quantizer(vqvae._features(images.x / 255)).commitment
    torch.testing.assert_close(torch.stack(commitment), expected)


def test_gradients_reach_every_parameter() -> None:
    vqvae = model()
    vqvae(batch(), 0).loss.backward()
    for name, parameter in vqvae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_it_learns_four_pictures() -> None:
    """Overfits a batch: no better check of a straight-through path."""
    vqvae, images = model(), batch(size=16)
    images = images._replace(x=images.x[:, :, :2, :2].repeat_interleave(8, 2).repeat_interleave(8, 3))
    adam = torch.optim.Adam(vqvae.parameters(), 3e-3)
    psnr = []
    for step in range(150):
        out = vqvae(images, step)
        adam.zero_grad()
        out.loss.backward()
        adam.step()
        vqvae.update(step, 3e-3)
        psnr.append(float(out.metrics["psnr"]))
    assert psnr[-1] > psnr[0] + 10


def test_it_cannot_sample_without_a_prior() -> None:
    with pytest.raises(ValueError, match="no prior of its own to draw samples from: give codes"):
        model().decode([])


@torch.no_grad()
def test_the_error_is_calibrated_and_decides_the_distortion() -> None:
    """Against fp64 over all images at once, and the bins' probabilities by the error function."""
    vqvae, images = model().eval(), batch(6)
    assert vqvae.bound_given(images, vqvae.encode(images)).distortion.isinf().all()
    sums = sum(
        vqvae.calibration_sums(batch) for batch in (Batch(*(t[:4] for t in images)), Batch(*(t[4:] for t in images)))
    )
    assert isinstance(sums, torch.Tensor)
    vqvae.calibrate(sums)
    mean, x = vqvae.decode(vqvae.encode(images)).double(), images.x.double()
    std = (mean - x / 255).square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(vqvae.calibration()["root mean square error of the channels"].double(), std)
    normal = torch.distributions.Normal(mean, std[:, None, None])
    high = torch.where(x == 255, 1.0, normal.cdf((x + 0.5) / 255))
    low = torch.where(x == 0, 0.0, normal.cdf((x - 0.5) / 255))
    expected = -(high - low).log().sum((1, 2, 3))
    torch.testing.assert_close(
        vqvae.bound_given(images, vqvae.encode(images)).distortion.double(), expected, rtol=1e-4, atol=0.0
    )


@torch.no_grad()
def test_no_other_deviation_gives_a_smaller_distortion() -> None:
    vqvae, images = model().eval(), batch(6)
    vqvae.calibrate(vqvae.calibration_sums(images))
    codes, best = vqvae.encode(images), vqvae.error_std.clone()
    least = float(vqvae.bound_given(images, codes).distortion.sum())
    for factor in (0.9, 1.1):
        vqvae.error_std.copy_(best * factor)
        assert float(vqvae.bound_given(images, codes).distortion.sum()) > least
