"""The networks between images and vectors."""

import pytest
import torch

from vaescale.interfaces import Shape
from vaescale.nn.blocks import Network, decoder, encoder


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_two_ways_have_the_shapes_that_were_asked_for(kind: str, channels: int) -> None:
    network, shape = Network(kind=kind, width=4, halvings=2, hidden=8), Shape(channels, 8)
    x, condition = torch.randn(5, channels, 8, 8), torch.randn(5, 3)
    assert encoder(network, shape, 6)(x).shape == (5, 6)
    assert encoder(network, shape, 6, condition=3)(x, condition).shape == (5, 6)
    assert decoder(network, shape, 6, 2 * channels)(torch.randn(5, 6)).shape == (5, 2 * channels, 8, 8)


def test_linear_is_linear_in_the_image_the_condition_and_the_latents() -> None:
    network, shape = Network(kind="linear"), Shape(3, 4)
    there, back = encoder(network, shape, 6, condition=2).double(), decoder(network, shape, 6, 3).double()
    for f, inputs in ((there, [(5, 3, 4, 4), (5, 2)]), (back, [(5, 6)])):
        a, b, zero = ([draw(size).double() for size in inputs] for draw in (torch.randn, torch.randn, torch.zeros))
        both = f(*[p + 2 * q for p, q in zip(a, b, strict=True)]) - f(*zero)
        torch.testing.assert_close(both, f(*a) - f(*zero) + 2 * (f(*b) - f(*zero)))


def test_a_size_that_cannot_be_halved_is_named() -> None:
    with pytest.raises(ValueError, match=r"data\.size=20 cannot be halved 3 times"):
        encoder(Network(halvings=3), Shape(3, 20), 6)
