from pathlib import Path

import pytest
import torch

from vaescale.nn import pixelcnn
from vaescale.nn.pixelcnn import PixelCNN


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_each_output_depends_on_all_codes_before_it_in_its_field_and_on_no_other(depth: int) -> None:
    torch.manual_seed(0)
    height, length = 4, 5
    net = PixelCNN(height, length, 8, depth)
    embedded, condition = torch.randn(2, 1, 20, 8).unbind(0)
    embedded.requires_grad_()
    for place in range(20):
        h = net(embedded, condition[:, 0])[0, place]
        (gradient,) = torch.autograd.grad(h.square().sum(), embedded, allow_unused=True)
        seen = gradient[0].abs().amax(1) > 0
        row, column = divmod(place, length)
        for other in range(20):
            up, side = row - other // length, abs(column - other % length)
            side_left = other // length == row and other < place and column - other % length <= 2 * depth
            above = 0 < up <= 2 * depth and side <= 2
            assert not seen[other] or other < place
            if side_left or (above and up <= 2):
                assert seen[other], (place, other)


def test_the_first_rows_are_computed_without_the_others() -> None:
    torch.manual_seed(0)
    net = PixelCNN(4, 3, 8, 3)
    embedded, condition = torch.randn(2, 12, 8), torch.randn(2, 8)
    torch.testing.assert_close(net(embedded[:, :6], condition), net(embedded, condition)[:, :6])


def test_one_by_one_it_computes_the_same() -> None:
    torch.manual_seed(0)
    net = PixelCNN(2, 3, 8, 3)
    embedded, condition = torch.randn(2, 6, 8), torch.randn(2, 8)
    read = net.reader(condition)
    found = torch.stack([read(i, embedded[:, i - 1] if i else None) for i in range(6)], dim=1)
    torch.testing.assert_close(found, net(embedded, condition))


def test_it_is_short() -> None:
    assert len(Path(pixelcnn.__file__).read_text().splitlines()) <= 120
