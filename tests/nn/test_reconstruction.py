from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.test_vqvae import batch
from vaescale.interfaces import Shape
from vaescale.models.vqvae import VQVAE
from vaescale.models.vqvae import Config as Model
from vaescale.nn import conv, perceptual, quantize
from vaescale.nn.fidelity import squared_errors
from vaescale.nn.reconstruction import Config, Reconstruction, distance_of
from vaescale.training.ema import WeightEMA

RANDOM = perceptual.Config(weight=0.5, trunk="random")
SHAPE = Shape(size=32)


def pair() -> tuple[Tensor, Tensor]:
    x = batch().x
    generator = torch.Generator().manual_seed(1)
    return x / 255 + 0.1 * torch.randn(x.shape, generator=generator), x


def test_without_weights_it_is_the_squared_error_over_the_variance() -> None:
    y, x = pair()
    loss, metrics = Reconstruction(Config(), SHAPE, 0.06)(y, x)
    assert torch.equal(loss, squared_errors(y, x / 255).mean() / 0.06)
    assert list(metrics) == ["mse", "psnr"]


def test_the_loss_is_the_weighted_sum() -> None:
    y, x = pair()
    difference = y - x / 255
    distance = perceptual.drawn("perceptual_random")(y, x / 255).mean()
    absolute, square = difference.abs().mean(), difference.square().mean()
    loss, metrics = Reconstruction(Config(l1=2.0, l2=3.0, perceptual=RANDOM), SHAPE, 0.06)(y, x)
    torch.testing.assert_close(loss, 2 * absolute + 3 * square + 0.5 * distance)
    torch.testing.assert_close(metrics["l1"], absolute)
    torch.testing.assert_close(metrics["perceptual_random"], distance)
    loss, _ = Reconstruction(Config(perceptual=RANDOM), SHAPE, 0.06)(y, x)  # in addition to the default
    torch.testing.assert_close(loss, square / 0.06 + 0.5 * distance)


def test_the_factors_of_published_recipes() -> None:
    """|2r − 2x| = 2 |r − x|, and (2r − 2x)² = 4 (r − x)²."""
    y, x = pair()
    signed = (2 * y - 1) - (2 * (x / 255) - 1)
    loss, _ = Reconstruction(Config(l1=2.0, l2=4.0), SHAPE)(y, x)
    torch.testing.assert_close(loss, signed.abs().mean() + signed.square().mean())


def test_without_a_variance_a_pixel_loss_is_needed() -> None:
    with pytest.raises(ValueError, match=r"set model.reconstruction.l1=1"):
        Reconstruction(Config(perceptual=RANDOM), SHAPE)


def model() -> VQVAE:
    torch.manual_seed(0)
    quantizer = quantize.Config(codebook_size=32, dim=8)
    network = conv.Config(width=16, residual_width=8)
    config = Model(network=network, quantizer=quantizer, reconstruction=Config(l1=1.0, perceptual=RANDOM))
    return VQVAE(config, SHAPE)


def test_the_trunk_is_not_part_of_the_model() -> None:
    """No optimiser, checkpoint, average or broadcast has its weights, and the averaged copy shares them."""
    vqvae = model()
    plain = VQVAE(Model(network=conv.Config(width=16, residual_width=8), quantizer=vqvae.config.quantizer), SHAPE)
    assert vqvae.state_dict().keys() == plain.state_dict().keys()
    assert len(list(vqvae.parameters())) == len(list(plain.parameters()))
    assert len(list(vqvae.buffers())) == len(list(plain.buffers()))
    distance = distance_of(vqvae)
    assert distance is not None
    assert distance_of(WeightEMA(vqvae, 0.9).model) is distance
    assert distance_of(plain) is None


def test_gradients_reach_every_parameter_and_no_weight_of_the_trunk() -> None:
    vqvae = model()
    vqvae(batch(), 0).loss.backward()
    assert all(parameter.grad is not None for parameter in vqvae.parameters())
    distance = distance_of(vqvae)
    assert distance is not None
    assert not any(tensor.requires_grad for tensor in distance.tensors.values())


def test_the_trunk_follows_the_model_to_a_device_but_stays_fp32() -> None:
    vqvae = model().half()
    distance = distance_of(vqvae)
    assert distance is not None
    assert {tensor.dtype for tensor in distance.tensors.values()} == {torch.float32}
    vqvae.to("meta")
    assert {tensor.device.type for tensor in distance.tensors.values()} == {"meta"}


def test_a_model_for_use_reads_no_file() -> None:
    config = Config(l1=1.0, perceptual=perceptual.Config(weight=1.0, weights=str(Path("none"))))
    with pytest.raises(ValueError, match="none cannot be read"):
        Reconstruction(config, SHAPE)
    assert Reconstruction(config.without_files(), SHAPE).distance is None
