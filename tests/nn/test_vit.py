import pytest
import torch

from vaescale.nn.vit import Config, Decoder, Encoder


def test_a_patch_of_the_code_becomes_a_patch_of_pixels() -> None:
    """The linear map's channels are laid out as c, row, column."""
    decoder = Decoder(Config(patch=4, width=16, depth=1, heads=2, head_channels=3), 5, 3, False)
    decoder.pixels.weight.data.zero_()
    decoder.pixels.bias.data = torch.arange(48.0)
    decoder.last = torch.nn.Identity()
    image = decoder(torch.randn(1, 5, 2, 3))
    assert image.shape == (1, 3, 8, 12)
    expected = torch.nn.functional.gelu(torch.arange(48.0)).view(3, 4, 4).tile(1, 2, 3)
    torch.testing.assert_close(image[0], expected)


def test_a_width_that_does_not_divide_is_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"model.network.width=36 must be a multiple of 4 times model.network.heads=2$"
    ):
        Encoder(Config(width=36, heads=2), 3, 8, False)
