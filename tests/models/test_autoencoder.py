import pytest
import torch

from tests.models.test_pca import batch
from vaescale.interfaces import Shape
from vaescale.models.autoencoder import Autoencoder, Config
from vaescale.nn.blocks import Network


def model(kind: str, channels: int = 3) -> Autoencoder:
    torch.manual_seed(0)
    network = Network(kind=kind, width=4, halvings=2, hidden=16)
    return Autoencoder(Config(latent_dim=6, network=network), Shape(channels, 16))


def images(channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (5, channels, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_encodes_to_vectors_and_decodes_to_its_reconstruction(kind: str, channels: int) -> None:
    autoencoder, x = model(kind, channels), batch(images(channels))
    (z,) = autoencoder.encode(x)
    assert z.shape == (5, 6)
    torch.testing.assert_close(autoencoder.decode([z]), autoencoder(x, 0).reconstruction)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_the_loss_is_the_squared_error_of_an_image(kind: str) -> None:
    autoencoder, x = model(kind), batch(images())
    out = autoencoder(x, 0)
    error = (out.reconstruction - x.x / 255).square().flatten(1)
    torch.testing.assert_close(out.loss, error.sum(1).mean())
    torch.testing.assert_close(out.metrics["mse"], error.mean())
    torch.testing.assert_close(out.metrics["psnr"], -10 * error.mean(1).log10().mean())
    out.loss.backward()
    for name, parameter in autoencoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_it_cannot_sample_without_a_prior() -> None:
    with pytest.raises(ValueError, match="no prior"):
        model("linear").decode([])
