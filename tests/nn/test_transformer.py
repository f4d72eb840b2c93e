import math

import pytest
import torch
from torch import Tensor, nn

from vaescale.nn.transformer import Block, Transformer, grid, rotated

WIDTH, HEADS = 24, 2
DIM = WIDTH // HEADS


def test_a_rotation_is_a_product_of_complex_numbers() -> None:
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4), angles)
    torch.testing.assert_close(rotated(x, angles), torch.cat([turned.real, turned.imag], dim=-1))


def test_the_grid_has_the_rows_first_and_wavelengths_up_to_its_base() -> None:
    angles = grid(3, 4, 16, torch.device("cpu")).view(3, 4, 8)
    rates = torch.tensor([100 ** (-i / 4) for i in range(4)])
    for row in range(3):
        for column in range(4):
            expected = torch.cat([row * rates, column * rates])
            torch.testing.assert_close(angles[row, column], expected)


def test_scores_depend_on_distances_only() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    angles = grid(6, 6, 16, torch.device("cpu")).view(6, 6, 8)

    def score(one: tuple[int, int], other: tuple[int, int]) -> Tensor:
        return (rotated(q, angles[one][None]) * rotated(k, angles[other][None])).sum()

    torch.testing.assert_close(score((0, 0), (2, 1)), score((3, 4), (5, 5)))
    assert not torch.isclose(score((0, 0), (2, 1)), score((0, 0), (1, 2)))


def test_a_block_is_written_out() -> None:
    """Attention head by head, and SwiGLU, in float64."""
    torch.manual_seed(0)
    block = Block(WIDTH, HEADS).double()
    x, angles = torch.randn(2, 6, WIDTH, dtype=torch.float64), grid(2, 3, DIM, torch.device("cpu")).double()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    q, k, v = (norm(x, block.norm1.weight) @ block.qkv.weight.T).split(WIDTH, dim=-1)
    heads = []
    for head in range(HEADS):
        part = slice(head * DIM, (head + 1) * DIM)
        turned = [rotated(one[:, None, :, part], angles)[:, 0] for one in (q, k)]
        weights = (turned[0] @ turned[1].mT / math.sqrt(DIM)).softmax(-1)
        heads.append(weights @ v[..., part])
    h = x + torch.cat(heads, dim=-1) @ block.mix.weight.T
    gate, value = (norm(h, block.norm2.weight) @ block.gate.weight.T).chunk(2, dim=-1)
    expected = h + (gate * gate.sigmoid() * value) @ block.out.weight.T
    torch.testing.assert_close(block(x, angles), expected, rtol=0, atol=1e-5)  # angles turn in fp32


def test_the_variance_starts_independent_of_the_depth() -> None:
    torch.manual_seed(0)
    angles = grid(4, 4, 64, torch.device("cpu"))
    x = torch.randn(2, 16, 256)
    added = []
    for depth in (2, 16):
        net = Transformer(256, depth, 4)
        net.norm = nn.Identity()
        net.norm.weight = torch.zeros(())
        added.append(float((net(x, angles) - x).detach().var()))
    assert added[1] == pytest.approx(added[0], rel=0.3)


def test_it_has_as_many_parameters_as_with_a_hidden_layer_of_four_widths() -> None:
    with torch.device("meta"):
        net = Transformer(768, 12, 12)
    count = sum(p.numel() for p in net.parameters())
    assert count == 12 * (4 * 768**2 + 8 * 768**2 + 2 * 768) + 768


def test_the_sum_stays_in_fp32_inside_autocast() -> None:
    net = Transformer(WIDTH, 2, HEADS)
    seen: list[torch.dtype] = []
    for module in net.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 6, WIDTH).bfloat16(), grid(2, 3, DIM, torch.device("cpu")))
    assert seen == [torch.float32] * 5
